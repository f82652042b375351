"""Tokens, labels, truncation and drops; TRL's own tokenization runs beside ours."""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import (
    COMPLETION_TOO_LONG,
    EQUAL,
    NO_LABELS,
    PROMPT_TOO_LONG,
    REFUSED,
    DropReport,
    TooManyDropped,
)
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.data.tokenize import boundaries
from orpo_lite.trainer.trainer import ORPOTrainer
from tests.tiny import CORPUS, base_tokenizer, chatml, template_text, tiny_tokenizer

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}"
    "{% endif %}{% endfor %}"
)
IM = ("<|im_start|>", "<|im_end|>")


def metaspace(prepend: str = "always", template: str | None = None, legacy: bool = False) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE whose merges cross the boundary between prompt and completion."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    if legacy:  # Llama-2's tokenizer.json: no pre-tokenizer, so that merges may span words
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(CORPUS.split("\n"), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "chatml": lambda: base_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct"),
    "chatml without bos": lambda: tiny_tokenizer(IM, chatml("Be kind."), eos="<|im_end|>"),
    "chatml, markers as text": lambda: tiny_tokenizer((), chatml("Be kind."), bos="<s>", eos="</s>", add_bos=True),
    "qwen2.5": lambda: base_tokenizer("Qwen/Qwen2.5-7B-Instruct"),
    "qwen3": lambda: base_tokenizer("Qwen/Qwen3-4B"),
    "llama-3": lambda: base_tokenizer("meta-llama/Llama-3.2-3B-Instruct"),
    "gemma": lambda: base_tokenizer("google/gemma-2-9b-it"),
    "zephyr": lambda: tiny_tokenizer((), ZEPHYR, bos="<s>", eos="</s>", add_bos=True),
    "mistral": lambda: tiny_tokenizer(("[INST]", "[/INST]"), MISTRAL, bos="<s>", eos="</s>", add_bos=True),
    "phi-3": lambda: tiny_tokenizer(("<|user|>", "<|assistant|>", "<|end|>"), template_text("phi3.jinja")),
    "deepseek-r1": lambda: tiny_tokenizer(("<think>",), template_text("deepseek_r1_distill.jinja"), bos="<bos>"),
    "metaspace, zephyr": lambda: metaspace("first", ZEPHYR),
    "llama-2 legacy, mistral": lambda: metaspace(template=MISTRAL, legacy=True),
}  # fmt: skip


def trl_row(trl_orpo: Any, row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, Any] | Exception:
    """What TRL 1.16 makes of a row."""
    PartialState()  # TRL's logger wants it
    trainer = types.SimpleNamespace(is_encoder_decoder=False, processing_class=tokenizer, max_length=max_length)
    trainer.build_tokenized_answer = types.MethodType(trl_orpo.ORPOTrainer.build_tokenized_answer, trainer)
    try:
        row = maybe_apply_chat_template(maybe_extract_prompt(row), tokenizer)
        return trl_orpo.ORPOTrainer.tokenize_row(trainer, row)
    except Exception as error:
        return error


def compare(trl_orpo: Any, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> tuple[int, DropReport]:
    """Assert equal ids and labels on every row that TRL can tokenize with labels left; the number of those."""
    given = datasets.Dataset.from_list(rows)
    ours, report = tokenize_rows(given, tokenizer, TokenizeOptions(max_length=max_length))
    by_row = {row["row"]: row for row in ours}
    dropped = {drop.row: drop for drop in report.drops}
    equal = 0
    for number, row in enumerate(rows):
        theirs = trl_row(trl_orpo, row, tokenizer, max_length)
        if isinstance(theirs, Exception):
            assert number in by_row or dropped[number].reason == REFUSED, (theirs, dropped[number])
            continue
        if any(all(label == -100 for label in theirs[f"{side}_labels"]) for side in ("chosen", "rejected")):
            assert dropped[number].reason in (PROMPT_TOO_LONG, NO_LABELS)
            continue
        equal += 1
        for side in ("chosen", "rejected"):
            ids, start = by_row[number][f"{side}_ids"], by_row[number][f"{side}_start"]
            assert ids == theirs[f"{side}_input_ids"]
            assert [-100] * start + ids[start:] == theirs[f"{side}_labels"]
    return equal, report


@pytest.fixture(scope="module")
def real_rows(shared_data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared_data / "train.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("max_length", [100_000, 700])
def test_tokens_and_labels_equal_trl(name: str, max_length: int, real_rows: list[Any], trl_orpo: Any) -> None:
    rows = real_rows[::30]  # with system turns and several turns among them
    equal, _ = compare(trl_orpo, rows, TOKENIZERS[name](), max_length)
    assert equal > len(rows) / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_and_labels_equal_trl_on_all_rows(name: str, real_rows: list[Any], trl_orpo: Any) -> None:
    equal, report = compare(trl_orpo, real_rows, TOKENIZERS[name](), 2048)
    assert equal > 1200 and report.rows == 1409


@pytest.mark.parametrize(
    "variant", ["train_implicit_conversational", "train_standard_string", "train_ultrafeedback_style"]
)
@pytest.mark.parametrize("name", ["chatml", "metaspace, zephyr", "llama-2 legacy, mistral"])
def test_other_shapes_equal_trl(variant: str, name: str, shared_data: Path, trl_orpo: Any) -> None:
    lines = (shared_data / "variants" / f"{variant}.jsonl").read_text("utf-8").splitlines()[::20]
    equal, _ = compare(trl_orpo, [json.loads(line) for line in lines], TOKENIZERS[name](), 100_000)
    assert equal > len(lines) / 2


PAIRS = [
    ("What is the cap", "ital of France?", "tain's name?"),  # merges cross the boundary
    ("Sure, here is a short", " poem", "er poem:"),
    ("", "The capital", "A poem"),
    ("The quick brown", " fox ", ""),
    (" ", " ", "  x"),
]


@pytest.mark.parametrize("name", ["chatml", "chatml without bos", "metaspace, zephyr", "llama-2 legacy, mistral"])
def test_strings_equal_trl_where_tokens_merge_across_the_boundary(name: str, trl_orpo: Any) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    tokenizer = TOKENIZERS[name]()
    equal, report = compare(trl_orpo, rows, tokenizer, 100)
    assert equal >= 3 and report.rows == len(rows)


def test_boundary_never_fails_where_trl_gives_up() -> None:
    # the prompt's tokens 1 2 3 are 1 9 in one whole and unlike at two places in the other
    assert boundaries([1, 2, 3], [1, 9], [1, 7, 8, 5]) == (1, 1)
    assert boundaries([1, 2, 3], [1, 2, 3, 4], [1, 2, 9, 4]) == (3, 2)
    assert boundaries([], [4], [5]) == (0, 0)


def chat(user: str, chosen: str, rejected: str, *before: tuple[str, str]) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in (*before, ("user", user))]
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": turns} | dict(zip(("chosen", "rejected"), answers, strict=True))


def run(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[list[dict[str, Any]], DropReport]:
    pairs, report = tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, TokenizeOptions(**options))
    return list(pairs), report


GOOD = chat("How do I boil an egg?", "Boil it for eight minutes.", "I cannot help you with that, sorry.")


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("qwen2.5", "<|im_end|>"), ("llama-3", "<|eot_id|>"), ("gemma", "<end_of_turn>"),
     ("phi-3", "<|end|>"), ("mistral", "</s>"), ("zephyr", "</s>")],
)  # fmt: skip
def test_completion_end_turn_cuts_after_the_first_end_of_turn(name: str, end: str) -> None:
    tokenizer = TOKENIZERS[name]()
    [pair], report = run([GOOD], tokenizer, completion_end="turn")
    labels = pair["chosen_ids"][pair["chosen_start"] :]
    assert tokenizer.decode(labels).strip() == f"Boil it for eight minutes.{end}"
    assert not [note for note in report.notes if "end-of-turn" in note]
    [as_trl], _ = run([GOOD], tokenizer)
    assert as_trl["chosen_ids"][: len(pair["chosen_ids"])] == pair["chosen_ids"]
    assert as_trl["chosen_ids"][-1] == tokenizer.eos_token_id


def test_completion_end_turn_without_such_a_token_is_trl_and_says_so() -> None:
    tokenizer = TOKENIZERS["chatml, markers as text"]()
    (turn, report), (trl, _) = run([GOOD], tokenizer, completion_end="turn"), run([GOOD], tokenizer)
    assert turn == trl and turn[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    assert "no end-of-turn token" in report.notes[0]


def test_truncate_cuts_completions_without_eos_and_drop_drops() -> None:
    tokenizer = TOKENIZERS["chatml"]()
    long = chat("How do I boil an egg?", "Boil it for eight minutes. " * 20, "No.")
    [_, full], _ = run([GOOD, long], tokenizer, max_length=1000)
    length = full["chosen_start"] + 10
    [_, cut], report = run([GOOD, long], tokenizer, max_length=length)
    assert cut["chosen_ids"] == full["chosen_ids"][:length] and cut["rejected_ids"] == full["rejected_ids"]
    assert (report.completion_cut, report.prompt_cut, report.kept) == (2, 0, 2)
    kept, report = run([GOOD, GOOD, long], tokenizer, max_length=len(full["rejected_ids"]) + 25, overlong="drop")
    assert len(kept) == 2 and report.dropped == {COMPLETION_TOO_LONG: 1}
    assert report.drops[0].row == 2 and "room for" in report.drops[0].detail


def test_a_prompt_that_fills_max_length_never_leaves_an_empty_completion() -> None:
    tokenizer = TOKENIZERS["chatml"]()
    long = chat("Roses are red, violets are blue. " * 30, "Yes.", "No.")
    for options in ({}, {"overlong": "drop"}, {"strict": True, "overlong": "drop"}):
        kept, report = run([GOOD, GOOD, long], tokenizer, max_length=80, **options)
        assert len(kept) == 2 and report.dropped == {PROMPT_TOO_LONG: 1}


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "mistral", "metaspace, zephyr"])
def test_truncate_takes_the_oldest_turns_and_keeps_the_template(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    old = [("user", "Roses are red. " * 12), ("assistant", "Violets are blue. " * 12)]
    system = [] if name in ("gemma", "mistral") else [("system", "You are a helpful assistant.")]
    row = chat("How do I boil an egg?", "Boil it for eight minutes.", "No, sorry.", *system, *old, *old)
    whole = chat("How do I boil an egg?", "Boil it for eight minutes.", "No, sorry.", *system)
    [expected], _ = run([whole], tokenizer)
    limit = max(len(expected["chosen_ids"]), len(expected["rejected_ids"]))
    [pair], report = run([row], tokenizer, max_length=limit, overlong="truncate", strict=True)
    assert pair == expected and report.prompt_cut == 1 and report.completion_cut == 0

    # only part of the last turn fits: its end is kept, the system turn and the template around it too
    row = chat("Roses are red. " * 40 + "How do I boil an egg?", "Boil it for eight minutes.", "No, sorry.", *system)
    [pair], report = run([row], tokenizer, max_length=limit + 12, overlong="truncate", strict=True)
    text = tokenizer.decode(pair["chosen_ids"])
    assert "How do I boil an egg?" in text and "eight minutes" in text and text.count("Roses") < 5
    assert len(pair["chosen_ids"]) <= limit + 12 and report.prompt_cut == 1
    assert not system or "helpful assistant" in text
    opening = pair["chosen_ids"][: pair["chosen_start"]]
    assert opening[:2] == expected["chosen_ids"][:2]
    tail = expected["chosen_ids"][expected["chosen_start"] - 3 : expected["chosen_start"]]
    assert opening[-3:] == tail


def test_truncate_cuts_strings_by_tokens_and_keeps_bos() -> None:
    tokenizer = TOKENIZERS["zephyr"]()
    row = {"prompt": "Roses are red. " * 20 + "What is the capital?", "chosen": " Paris is.", "rejected": " France."}
    [full], _ = run([row], tokenizer, max_length=1000)
    [pair], report = run([row], tokenizer, max_length=40, overlong="truncate", strict=True)
    assert report.prompt_cut == 1 and report.completion_cut == 0
    for side in ("chosen", "rejected"):
        ids, whole = pair[f"{side}_ids"], full[f"{side}_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids[1:] == whole[len(whole) - len(ids) + 1 :]
        assert ids[pair[f"{side}_start"] :] == whole[full[f"{side}_start"] :] and len(ids) <= 40


def test_max_prompt_length_is_honoured() -> None:
    tokenizer = TOKENIZERS["chatml"]()
    row = chat("Roses are red. " * 10 + "What?", "Boil it.", "No.")
    [pair], _ = run([row], tokenizer, max_length=500, max_prompt_length=80)
    assert 70 <= pair["chosen_start"] <= 80
    _, report = run([GOOD, GOOD, row], tokenizer, max_length=500, max_prompt_length=90, overlong="drop")
    assert report.dropped == {PROMPT_TOO_LONG: 1}


def test_sides_that_become_equal_are_dropped_from_recipes_only() -> None:
    tokenizer = TOKENIZERS["llama-3"]()  # its template trims
    row = chat("How?", "Sure.", "Sure.  ")
    kept, report = run([GOOD, row], tokenizer, strict=True)
    assert len(kept) == 1 and report.dropped == {EQUAL: 1}
    assert len(run([GOOD, row], tokenizer)[0]) == 2


def test_a_row_the_template_refuses_is_counted_with_its_words() -> None:
    rows = [GOOD, GOOD, chat("How?", "Yes.", "No.", ("system", "Be kind."))]
    kept, report = run(rows, TOKENIZERS["gemma"]())
    assert len(kept) == 2
    [drop] = report.drops
    assert (drop.row, drop.reason) == (2, REFUSED) and "System role not supported" in drop.detail


def test_no_chat_template_names_the_remedy() -> None:
    with pytest.raises(RequestError, match="model.chat_template"):
        run([GOOD], tiny_tokenizer((), None))


def test_more_than_half_dropped_is_an_error_with_counts() -> None:
    tokenizer = TOKENIZERS["chatml"]()
    bad = GOOD | {"chosen": None}
    with pytest.raises(TooManyDropped, match="2 of 3 rows dropped .2 empty or missing side.*row 1 of mine") as caught:
        tokenize_rows(datasets.Dataset.from_list([GOOD, bad, bad]), tokenizer, TokenizeOptions(), "mine")
    assert [drop.row for drop in caught.value.report.drops] == [1, 2]
    assert run([GOOD, bad], tokenizer)[1].kept == 1


def test_what_is_no_table_is_refused_by_name() -> None:
    table = datasets.Dataset.from_list([GOOD])
    given: list[Any] = [datasets.DatasetDict({"train": table}), [GOOD]]
    for rows, name in zip(given, ("DatasetDict", "list"), strict=True):
        with pytest.raises(RequestError, match=f"mine: found a {name}, expected a datasets.Dataset"):
            tokenize_rows(rows, TOKENIZERS["chatml"](), TokenizeOptions(), "mine")
    with pytest.raises(RequestError, match=r"found columns text.*data\.columns"):
        run([{"text": "hello"}], TOKENIZERS["chatml"]())


def test_the_trainer_warns_only_where_rows_were_dropped_or_cut(caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = types.SimpleNamespace(drop_reports={}, tokenizer=TOKENIZERS["chatml"](), _own_collator=False)

    def warned(rows: list[Any], length: int) -> str:
        caplog.clear()
        trainer._tokenize_options = TokenizeOptions(max_length=length)
        ORPOTrainer._tokenized(trainer, datasets.Dataset.from_list(rows), "train")
        return "".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)

    long = chat("How?", "Boil it. " * 30, "No.")
    assert not warned([GOOD, long], 1000) and trainer.drop_reports["train"].kept == 2
    assert "train: 2 of 3 rows kept\n  dropped 1: empty or missing" in warned(
        [GOOD, GOOD, GOOD | {"chosen": None}], 1000
    )
    assert "completion cut at the end in 1 pair" in warned([GOOD, long], 120)
    assert trainer.drop_reports["train"].remarks() == ["completion cut at the end in 1 pair"]


def test_template_kwargs_and_tools_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(
        (),
        "{{ greeting }}{% for t in tools or [] %}{{ t['function']['name'] }} {% endfor %}" + chatml("Be kind."),
        bos="<s>",
    )
    tools = [{"type": "function", "function": {"name": "boil_egg", "parameters": {}}}]
    for column in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        rows = datasets.Dataset.from_list([GOOD | {"tools": column}])
        [pair], _ = tokenize_rows(rows, tokenizer, TokenizeOptions(template_kwargs={"greeting": "Hello! "}))
        assert tokenizer.decode(pair["chosen_ids"]).startswith("<s>Hello! boil_egg <|im_start|>system")
    _, report = run([GOOD | {"tools": json.dumps(tools)}], TOKENIZERS["zephyr"]())
    assert "1 row has tools" in report.notes[0]


def test_mixed_tool_schemas_are_not_filled_with_nulls() -> None:
    tokenizer = tiny_tokenizer((), "{{ tools | tojson }}" + chatml("Be kind."))
    rows = [GOOD | {"tools": [{"name": "a", "parameters": {"x": {"type": "int"}}}]},
            GOOD | {"tools": [{"name": "b", "parameters": {"y": {"type": "str"}}}]}]  # fmt: skip
    pairs, _ = run(rows, tokenizer)
    for pair, own, other in zip(pairs, "xy", "yx", strict=True):
        text = tokenizer.decode(pair["chosen_ids"])
        assert f'"{own}"' in text and f'"{other}"' not in text and "null" not in text


def test_columns_and_types() -> None:
    pairs, _ = tokenize_rows(datasets.Dataset.from_list([GOOD]), TOKENIZERS["chatml"](), TokenizeOptions())
    types_ = {name: str(pairs.features[name]) for name in pairs.column_names}
    assert types_ == {
        "chosen_ids": "List(Value('int32'))", "rejected_ids": "List(Value('int32'))", "chosen_start": "Value('int32')",
        "rejected_start": "Value('int32')", "row": "Value('int64')", "source": "Value('int32')",
    }  # fmt: skip


def test_tokens_lie_in_a_temporary_file_that_goes_with_the_process(tmp_path: Path) -> None:
    words = [
        "from tests.data.test_tokenize import *",
        "pairs, _ = tokenize_rows(datasets.Dataset.from_list([GOOD] * 3), TOKENIZERS['chatml'](), TokenizeOptions())",
        "print(pairs.cache_files[0]['filename'], len(pairs))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(words)],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)), done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
