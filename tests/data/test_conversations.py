"""What was written is what is labeled: templates of many models, shapes of conversation, real formats that went wrong."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from orpo_lite.common.errors import RequestError
from orpo_lite.data.collate import PackedCollator, PaddedCollator, from_trl
from orpo_lite.data.dropped_rows import CHANGED, DropReport, TooManyDropped
from orpo_lite.data.lengths import answer_tokens
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.trainer.trl_names import trl_columns
from tests.tiny import template_text, tiny_tokenizer

CASES = Path(__file__).parents[2].parent / "shared" / "cases" / "data"
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<think>", "</think>")  # noqa: RUF001
SMOLLM3 = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if '<think>' not in m.content else '') + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GRANITE = """{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
CHATML_PLAIN = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + eos_token }}{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"""
MAGISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{% if m.content is string %}{{ m.content }}{% else %}{% for block in m.content %}{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] == 'thinking' %}{{ '[THINK]' + block['thinking'] + '[/THINK]' }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"""
# template, special tokens, BOS, EOS; those in quotes are shipped by TRL
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str | None, str]] = {
    "qwen2.5": ("qwen2_5.jinja", CHATML, None, "<|im_end|>"),
    "qwen3": ("qwen3.jinja", (*CHATML, "<think>", "</think>"), None, "<|im_end|>"),
    "qwen3.6": ("qwen3_6.jinja", CHATML, None, "<|im_end|>"),
    "qwen3.8": ("qwen3_8.jinja", CHATML, None, "<|im_end|>"),
    "llama-3.1": ("llama3_1.jinja", LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.2": ("llama3_2.jinja", LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "gemma-2": ("gemma.jinja", ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "gemma-3": ("gemma3.jinja", ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "<s>", "</s>"),
    "phi-3": ("phi3.jinja", ("<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>"),
    "gpt-oss": ("gptoss.jinja", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"), "<|startoftext|>",
                "<|return|>"),
    "r1": ("deepseek_r1_distill.jinja", R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    "zephyr": (ZEPHYR, (), "<s>", "</s>"),
    "chatml": (CHATML_PLAIN, CHATML, None, "<|im_end|>"),
    "smollm3": (SMOLLM3, CHATML, None, "<|im_end|>"),
    "granite": (GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), None, "<|end_of_text|>"),
    "magistral": (MAGISTRAL, ("[INST]", "[/INST]", "[THINK]", "[/THINK]"), "<s>", "</s>"),
    "nemotron": ("nemotron_3_nano.jinja", CHATML, None, "<|im_end|>"),
    "gemma-4": ("gemma4_v5.jinja", ("<|turn>", "<turn|>", "<|channel>", "<channel|>"), "<bos>", "<turn|>"),
    "glm-4": ("glm4moe.jinja", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"), None, "<|endoftext|>"),
}  # fmt: skip
THOUGHT, ANSWER, OTHER = "Boil it.\nEight minutes: 8.", 'Paris,\n\n  the *capital*: {"a": 1} & <b>', "No  idea é 中."
TOOL = {"type": "function", "function": {"name": "stock", "description": "How much", "parameters": {
    "type": "object", "properties": {"fruit": {"type": "string"}}, "required": ["fruit"]}}}  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def called(fruit: str) -> dict[str, Any]:
    return assistant(
        "", tool_calls=[{"type": "function", "function": {"name": "stock", "arguments": {"fruit": fruit}}}]
    )


HISTORY = [user("How do I boil an egg?"), assistant("Boil it."), user("And then?")]
STEPS = [called("red apples"), {"role": "tool", "name": "stock", "content": "12 red ones"}]
SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"prompt": [user("Which is the capital?")], "chosen": [assistant(ANSWER)], "rejected": [assistant(OTHER)]},
    "history": {"prompt": HISTORY, "chosen": [assistant(ANSWER)], "rejected": [assistant(OTHER)]},
    "reasoning": {"prompt": [user("Why?")], "chosen": [assistant(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")],
                  "rejected": [assistant(f"<think>\nHm.\n</think>\n\n{OTHER}")]},
    "prefill": {"prompt": [user("Why?"), assistant("Let me count: ")], "chosen": [assistant("5.")],
                "rejected": [assistant("too many.")]},
    "user between": {"prompt": [user("Hi")], "chosen": [assistant("Hello you."), user("Why?"), assistant(ANSWER)],
                     "rejected": [assistant("Hello me."), user("Why?"), assistant(OTHER)]},
    "call": {"prompt": [user("How many?")], "chosen": [called("red apples")], "rejected": [assistant(OTHER)],
             "tools": [TOOL]},
    "steps": {"prompt": [user("How many?")], "chosen": [*STEPS, assistant(ANSWER)], "rejected": [*STEPS, assistant(OTHER)],
              "tools": [TOOL]},
}  # fmt: skip
WITHOUT_CALLS = {"gemma-2", "gemma-3", "phi-3", "mistral", "magistral", "zephyr", "chatml", "smollm3", "granite", "r1"}
"""Their templates know no calls (R1's wants them as no data set has them): such rows are left out, never trained on."""


def tokenizer_of(name: str) -> Any:
    template, specials, bos, eos = TEMPLATES[name]
    return tiny_tokenizer(specials, template_text(template), bos=bos, eos=eos)


def tokenize(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[datasets.Dataset, DropReport]:
    options = {"completion_end": "turn", "strict": True, "max_length": None} | options
    return tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, TokenizeOptions(**options))


def labels_of(row: dict[str, Any], side: str, tokenizer: Any) -> list[str]:
    """The text of each run of labels."""
    ids, places = row[f"{side}_ids"], list(answer_tokens(row, side))
    runs = [[places[0]]]
    for before, place in pairwise(places):
        if place != before + 1:
            runs.append([])
        runs[-1].append(place)
    return [tokenizer.decode([ids[place] for place in run]) for run in runs]


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_what_was_written(name: str, shape: str, strict: bool) -> None:
    """The labels of every answer hold all of its parts in order, begin where generation begins, end with its end."""
    tokenizer, row = tokenizer_of(name), SHAPES[shape]
    if shape in ("call", "steps") and name in WITHOUT_CALLS:
        with pytest.raises(TooManyDropped, match="rewritten|refused"):
            tokenize([row], tokenizer, strict=strict)
        return
    pairs, report = tokenize([row], tokenizer, strict=strict, completion_end="turn" if strict else "trl")
    unopened = any("without the reasoning" in note for note in report.notes)
    for side in ("chosen", "rejected"):
        ids, start = pairs[0][f"{side}_ids"], pairs[0][f"{side}_start"]
        runs = labels_of(pairs[0], side, tokenizer)
        answers = [turn for turn in row[side] if turn["role"] == "assistant"]
        assert len(runs) == len(answers)
        for text, turn in zip(runs, answers, strict=True):
            if turn.get("tool_calls"):
                assert "stock" in text and "red apples" in text and "12" not in text
                continue
            thought, _, answer = turn["content"].rpartition("</think>")
            assert answer.strip() in text and "How many" not in text and "12 red" not in text
            if thought:
                head, _, tail = text.partition("</think>")
                assert (
                    head.removeprefix("<think>").split("<think>")[-1].strip() == thought.removeprefix("<think>").strip()
                )
                assert tail.strip().startswith(answer.strip())
            assert text.count("<think>") <= 1 >= text.count("</think>")
        ends = (tokenizer.eos_token, "<end_of_turn>", "<|end|>", "<|call|>", "<|tool_response>")
        assert runs[-1].rstrip().endswith(ends)
        prompt = tokenizer.decode(ids[:start])
        if shape == "prefill":
            # the space may be part of the next word's token
            assert prompt.rstrip().endswith("Let me count:") and runs[0].lstrip().startswith(answers[0]["content"])
        elif strict:
            options = {"tools": row["tools"]} if "tools" in row else {}
            generated = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False, **options
            )
            prompt, generated = (text.removeprefix(tokenizer.bos_token or "") for text in (prompt, generated))
            # where the template writes an answer without reasoning otherwise than it opens one, which is said
            assert prompt == generated or (unopened and generated.startswith(prompt) and "<think>" in generated)


THOUGHTS: dict[str, dict[str, Any]] = {
    "reasoning_content": {"reasoning_content": THOUGHT, "content": ANSWER},
    "reasoning": {"reasoning": THOUGHT, "content": ANSWER},
    "thinking": {"thinking": THOUGHT, "content": ANSWER},
    "parts": {"content": [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": ANSWER}]},
    "lists of parts": {"content": [
        {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, {"type": "text", "text": ANSWER}]},
}  # fmt: skip


@pytest.mark.parametrize("form", THOUGHTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_apart_is_labeled_or_the_row_is_left_out(name: str, form: str) -> None:
    """Whatever field holds the reasoning, the template gets it in the form that it takes; the same row every time."""
    tokenizer = tokenizer_of(name)
    plain = {"prompt": [user("Why?")], "rejected": [assistant(OTHER)]}
    found = []
    for fields in (THOUGHTS["reasoning_content"], THOUGHTS[form]):
        try:
            pairs, _ = tokenize([plain | {"chosen": [{"role": "assistant", **fields}]}], tokenizer)
        except TooManyDropped as error:
            assert error.report.drops[0].reason == CHANGED and "reasoning" in error.report.drops[0].detail
            found.append(None)
        else:
            found.append(pairs[0])
    assert found[0] == found[1]
    takes = {"qwen3", "qwen3.6", "qwen3.8", "gpt-oss", "r1", "magistral", "nemotron", "gemma-4", "glm-4"}
    assert (found[0] is not None) == (name in takes)
    if found[0]:
        [text] = labels_of(found[0], "chosen", tokenizer)
        assert THOUGHT in text and ANSWER in text.partition(THOUGHT)[2]


def test_two_reasonings_of_one_answer_are_refused() -> None:
    turn = {"role": "assistant", "content": ANSWER, "reasoning": "one", "thinking": "two"}
    with pytest.raises(TooManyDropped, match="different texts as its reasoning"):
        tokenize([{"prompt": [user("Why?")], "chosen": [turn], "rejected": [assistant(OTHER)]}], tokenizer_of("qwen3"))


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama-3.1", "gpt-oss", "nemotron"])
def test_layouts_agree_on_answers_of_several_turns(name: str) -> None:
    """Every layout has the same labels for the same pair and predicts each from the same tokens."""
    pairs, _ = tokenize([SHAPES["steps"], SHAPES["one turn"], SHAPES["call"]], tokenizer_of(name))
    rows = [pairs[n] for n in range(3)]
    for scope in ("prompt+chosen", "chosen"):
        found = []
        for collator in (PaddedCollator(0, scope), PackedCollator(scope), PackedCollator(scope, share=False)):
            batch = collator(rows)
            found.append(counted(batch))
        assert found[0] == found[1] == found[2]
    trl = [trl_columns(row) for row in rows]
    width = max(len(row["chosen_input_ids"] + row["rejected_input_ids"]) for row in trl)
    names = [key for key in trl[0] if key.split("_")[0] != "prompt"]
    fill = {"labels": -100, "ids": 0, "mask": 0}
    padded = {key: torch.tensor([row[key] + [fill[key.split("_")[-1]]] * (width - len(row[key])) for row in trl])
              for key in names}  # fmt: skip
    again = from_trl(padded, PaddedCollator(0, "chosen"))
    assert counted(again) == counted(PaddedCollator(0, "chosen")(rows))


def counted(batch: dict[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """For each of the three counts the label ids by pair."""
    return {
        name: sorted((int(pair), int(token)) for pair, token in zip(batch[name], batch["label_ids"], strict=True) if pair >= 0)
        for name in ("chosen_pair", "rejected_pair", "nll_pair")
    }  # fmt: skip


def test_a_template_that_changes_answers_is_refused_with_the_remedy() -> None:
    shouting = CHATML_PLAIN.replace(
        "m.content +", "(m.content | upper if m.role == 'assistant' and m.content | length > 9 else m.content) +"
    )
    tokenizer = tiny_tokenizer(CHATML, shouting, eos="<|im_end|>")
    tokenizer.chat_template = shouting.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt and false %}"
    )
    with pytest.raises(TooManyDropped, match=r"rewritten by the template.*model\.chat_template"):
        tokenize([SHAPES["one turn"]] * 4, tokenizer)
    few = [
        {"prompt": [user("Hi")], "chosen": [assistant(f"yes {n}")], "rejected": [assistant("no")]} for n in range(500)
    ]
    pairs, report = tokenize([*few, SHAPES["one turn"]], tokenizer)
    assert len(pairs) == 500 and report.dropped == {CHANGED: 1}
    with pytest.raises(TooManyDropped, match="rewritten by the template"):
        tokenize([*few, *[SHAPES["one turn"]] * 30], tokenizer)


def case(name: str) -> list[dict[str, Any]]:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not there: small inputs that went wrong")
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text("utf-8").splitlines()]


def reasoning_tokenizer() -> Any:
    template = (CASES / "reasoning_template.jinja").read_text("utf-8")
    return tiny_tokenizer(("<|User|>", "<|Assistant|>"), template, bos="<s>", eos="</s>")


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
def test_case_reasoning(strict: bool) -> None:
    rows, tokenizer = case("reasoning"), reasoning_tokenizer()
    pairs, _ = tokenize(rows, tokenizer, strict=strict)
    assert len(pairs) == 10
    assert tokenizer.decode(pairs[0]["chosen_ids"][: pairs[0]["chosen_start"]]).endswith("<|Assistant|><think>\n")
    assert labels_of(pairs[0], "chosen", tokenizer) == ["There are 2 and 3 come in: 5.\n</think>\n\n5 apples.</s>"]
    assert len(tokenize(case("reasoning_alone_differs"), tokenizer, strict=strict)[0]) == 10


def test_case_plain_messages_under_a_reasoning_template() -> None:
    tokenizer = reasoning_tokenizer()
    pairs, report = tokenize(case("plain_messages"), tokenizer)
    assert tokenizer.decode(pairs[0]["chosen_ids"][: pairs[0]["chosen_start"]]).endswith("<|Assistant|><think>\n")
    assert labels_of(pairs[0], "chosen", tokenizer) == ["5 apples.</s>"]
    assert any("10 pairs" in note and "model.chat_template" in note for note in report.notes)


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "gpt-oss"])
def test_case_arguments_as_string_are_those_as_object(name: str, strict: bool) -> None:
    tokenizer = tokenizer_of(name)
    found = [tokenize(case(f"tool_arguments_as_{form}"), tokenizer, strict=strict)[0] for form in ("string", "object")]
    assert found[0].to_list() == found[1].to_list() and len(found[0]) == 10
    if name == "gpt-oss":
        assert tokenizer.decode(found[0][0]["chosen_ids"]).endswith("<|call|>")


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama-3.1"])
def test_case_tool_steps(name: str, strict: bool) -> None:
    tokenizer = tokenizer_of(name)
    pairs, report = tokenize(case("tool_steps_same_call"), tokenizer, strict=strict)
    assert len(pairs) == 10
    call, answer = labels_of(pairs[0], "chosen", tokenizer)
    assert "stock" in call and call.endswith(tokenizer.eos_token) and "12" not in call
    assert "There are 12 apples." in answer and tokenizer.eos_token in answer
    assert any("10 pairs have completions of several turns" in note for note in report.notes)


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
def test_case_prefilled_answer(strict: bool) -> None:
    tokenizer = tokenizer_of("qwen2.5")
    pairs, _ = tokenize(case("prefilled_answer"), tokenizer, strict=strict)
    assert tokenizer.decode(pairs[0]["chosen_ids"][: pairs[0]["chosen_start"]]).endswith("assistant\nLet me count: ")
    assert (
        labels_of(pairs[0], "chosen", tokenizer)[0].rstrip("\n").removesuffix("\n<|im_end|>") == "5 apples.<|im_end|>"
    )


# ---- formats of other tools ------------------------------------------------------------------------------------------


ASKED, YES, NO = [user("How many?")], [assistant("5.")], [assistant("No idea.")]
SAME = {
    "axolotl": {"messages": ASKED, "chosen": YES[0], "rejected": NO[0]},
    "OpenAI": {"input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True}, "preferred_output": YES,
               "non_preferred_output": NO},
    "ms-swift, text": {"messages": ASKED + YES, "rejected_response": "No idea."},
    "ms-swift, messages": {"messages": ASKED + YES, "rejected_messages": ASKED + NO},
    "ms-swift, answer": {"messages": ASKED + YES, "rejected_messages": NO},
    "Unsloth": {"instruction": "How many?", "input": "", "accepted": "5.", "rejected": "No idea."},
    "arena, conversations": {"conversation_a": ASKED + NO, "conversation_b": ASKED + YES, "winner": "model_b"},
    "scores, messages": {"prompt": ASKED, "responses": ["so so", "5.", "No idea."], "scores": [2, 4.5, 1]},
}  # fmt: skip
TEXTS = {
    "Stack Exchange": {"question": "How many?", "response_j": "5.", "response_k": "No idea."},
    "arena": {"prompt": "How many?", "response_a": "5.", "response_b": "No idea.", "winner": "model_a"},
    "UltraFeedback, raw": {"instruction": "How many?", "completions": [
        {"response": "No idea.", "overall_score": 2.0}, {"response": "5.", "overall_score": 8.5}]},
    "Nectar": {"prompt": "How many?", "answers": [
        {"answer": "so so", "rank": 2.0}, {"answer": "5.", "rank": 1.0}, {"answer": "No idea.", "rank": 7.0}]},
    "question": {"question": "How many?", "chosen": "5.", "rejected": "No idea."},
}  # fmt: skip


@pytest.mark.parametrize("name", [*SAME, *TEXTS])
def test_formats_of_other_tools_have_the_same_tokens(name: str) -> None:
    tokenizer = tokenizer_of("qwen2.5")
    plain = {"prompt": "How many?", "chosen": "5.", "rejected": "No idea."}
    row, expected = (
        (SAME[name], {"prompt": ASKED, "chosen": YES, "rejected": NO}) if name in SAME else (TEXTS[name], plain)
    )
    found, expected = (tokenize([one], tokenizer)[0].to_list() for one in (row, expected))
    assert found == expected and len(found) == 1


def test_rated_answers_are_paired_by_prompt() -> None:
    rows = [
        {"prompt": "one", "completion": "good", "label": True},
        {"prompt": "two", "completion": "bad", "label": False},
        {"prompt": "one", "completion": "bad", "label": False},
        {"prompt": "two", "completion": "good", "label": True},
        {"prompt": "two", "completion": "better", "label": True},
    ]
    tokenizer = tokenizer_of("qwen2.5")
    pairs, report = tokenize(rows, tokenizer)
    assert [labels_of(row, "chosen", tokenizer) for row in pairs] == [["good<|im_end|>"]] * 2
    assert [labels_of(row, "rejected", tokenizer) for row in pairs] == [["bad<|im_end|>"]] * 2
    assert report.dropped == {"rated answer without a partner": 1}
    assert pairs["row"] == [0, 3] and [drop.row for drop in report.drops] == [4]
    with pytest.raises(RequestError, match=r"at least one answer of each label"):
        tokenize(rows[:1] + rows[3:], tokenizer)


def test_all_answers_with_scores_are_paired_if_asked_for() -> None:
    scored = {"prompt": "How many?", "responses": ["so so", "5.", "No idea.", "none"], "scores": [2, 4.5, 1, 1]}
    tokenizer = tokenizer_of("qwen2.5")
    pairs, report = tokenize([scored, scored | {"scores": [1, 1, 1, 1]}, scored | {"scores": [None, 3, 1, None]}], tokenizer,
                             pairing="all")  # fmt: skip
    sides = [tuple(labels_of(row, side, tokenizer)[0].removesuffix("<|im_end|>") for side in ("chosen", "rejected"))
             for row in pairs]  # fmt: skip
    assert sorted(sides[:5]) == [("5.", "No idea."), ("5.", "none"), ("5.", "so so"), ("so so", "No idea."),
                                 ("so so", "none")]  # fmt: skip
    assert sides[5:] == [("5.", "No idea.")] and pairs["row"] == [0] * 5 + [2]
    assert report.dropped == {"no better answer": 1} and any(
        note.startswith("5 pairs are of rows") for note in report.notes
    )


def test_ties_are_counted() -> None:
    row = {"prompt": "How many?", "response_a": "5.", "response_b": "No idea.", "winner": "model_a"}
    pairs, report = tokenize([row, row, row | {"winner": "tie (bothbad)"}], tokenizer_of("qwen2.5"))
    assert len(pairs) == 2 and report.dropped == {"no better answer": 1}


@pytest.mark.parametrize("name", ["axolotl_messages", "openai_preference"])
def test_case_messages_of_other_tools(name: str) -> None:
    tokenizer, plain = tokenizer_of("qwen2.5"), case("plain_messages")
    pairs, _ = tokenize(case(name), tokenizer)
    assert len(pairs) == 10
    for row, same in zip(pairs, plain, strict=True):
        assert same["prompt"][0]["content"] in tokenizer.decode(row["chosen_ids"][: row["chosen_start"]])


def test_case_accepted_rejected() -> None:
    rows = case("accepted_rejected")
    alpaca = [{("chosen" if key == "accepted" else key): value for key, value in row.items()} for row in rows]
    tokenizer = tokenizer_of("qwen2.5")
    assert tokenize(rows, tokenizer)[0].to_list() == tokenize(alpaca, tokenizer)[0].to_list()


def test_case_system_turn() -> None:
    rows, tokenizer = case("system_turn"), tokenizer_of("gemma-2")
    with pytest.raises(TooManyDropped, match=r"refused by the template.*data\.system=merge"):
        tokenize(rows, tokenizer)
    pairs, report = tokenize(rows, tokenizer, system="merge")
    prompt = tokenizer.decode(pairs[0]["chosen_ids"][: pairs[0]["chosen_start"]])
    assert f"user\n{rows[0]['prompt'][0]['content']}\n\n{rows[0]['prompt'][1]['content']}<end_of_turn>" in prompt
    assert any(note.startswith("10 rows have a system turn") for note in report.notes)


def test_case_image_part() -> None:
    with pytest.raises(TooManyDropped, match=r"row 0 of train.*part 0 is image, and this trains text only"):
        tokenize(case("image_part"), tokenizer_of("qwen2.5"))


@pytest.mark.parametrize("name", ["qwen2.5", "zephyr", "mistral", "gemma-2"])
def test_text_that_carries_a_template_is_recognized(name: str) -> None:
    tokenizer = tokenizer_of(name)
    made = [tokenizer.apply_chat_template(ASKED + turns, tokenize=False) for turns in (YES, NO)]
    prompt = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    row = {"prompt": prompt, "chosen": made[0][len(prompt) :], "rejected": made[1][len(prompt) :]}
    pairs, report = tokenize([row], tokenizer)
    assert any("carries a chat template already" in note for note in report.notes)
    assert not any("apply_template" in note for note in report.notes)
    ids = list(pairs[0]["chosen_ids"])
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[pairs[0]["chosen_start"] :]).count(tokenizer.eos_token) <= 1
    with pytest.raises(TooManyDropped, match=r"leave out data\.apply_template"):
        tokenize([row], tokenizer, apply_template=True)


def test_case_text_with_chatml() -> None:
    rows = case("text_with_chatml")
    pairs, report = tokenize(rows, tokenizer_of("qwen2.5"))
    assert len(pairs) == 10 and not any("apply_template=true" in note for note in report.notes)
    with pytest.raises(TooManyDropped, match=r"leave out data\.apply_template"):
        tokenize(rows, tokenizer_of("qwen2.5"), apply_template=True)


# ---- what an attack found ----------------------------------------------------------------------------------------------


NEMO = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and messages[0].role == 'system' %}{{ '[INST] ' + messages[0].content + '\\n\\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("strict", [True, False], ids=["recipe", "Python"])
def test_a_question_is_never_labeled_where_the_template_moves_the_system_turn(strict: bool) -> None:
    """Mistral-Nemo's way: the system text stands in the last user turn, and nowhere once an answer follows."""
    tokenizer = tiny_tokenizer(("[INST]", "[/INST]"), NEMO, bos="<s>", eos="</s>")
    row = {"prompt": [SYSTEM, user("How many?")], "chosen": [assistant("5.")], "rejected": [assistant("No.")]}
    pairs, _ = tokenize([row], tokenizer, strict=strict)
    assert (
        tokenizer.decode(pairs[0]["chosen_ids"][: pairs[0]["chosen_start"]])
        == "<s>[INST] Be brief.\n\nHow many?[/INST]"
    )
    assert labels_of(pairs[0], "chosen", tokenizer)[0].strip() == "5.</s>"


def test_reasoning_that_is_not_closed_keeps_that_of_the_other_answer() -> None:
    tokenizer = tokenizer_of("qwen3")
    row = {"prompt": [user("Why?")], "chosen": [assistant(f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")],
           "rejected": [assistant("<think>\nNever closed")]}  # fmt: skip
    pairs, _ = tokenize([row], tokenizer)
    for side, text in (("chosen", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"), ("rejected", "<think>\nNever closed")):
        assert labels_of(pairs[0], side, tokenizer)[0].startswith(text)


def test_the_opening_of_a_call_is_not_cut_in_two() -> None:
    """The generation prompt opens `<think>`, and the answer is `<tool_call>`: both begin with `<t`."""
    opened = CHATML_PLAIN.replace(
        "'<|im_start|>assistant\\n' }}{% endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    calls = (
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>\\n' + c.function | tojson + '\\n</tool_call>' }}{% endfor %}"
    )
    tokenizer = tiny_tokenizer(
        CHATML, opened.replace("m.content + '<|im_end|>", f"m.content }}}}{calls}{{{{ '<|im_end|>"), eos="<|im_end|>"
    )
    pairs, _ = tokenize([SHAPES["call"]], tokenizer)
    assert labels_of(pairs[0], "chosen", tokenizer)[0].startswith("<tool_call>")


def test_reasoning_behind_a_closed_reasoning_is_refused() -> None:
    with pytest.raises(
        TooManyDropped, match="closes a reasoning, and the answer has its own: leave out enable_thinking"
    ):
        tokenize([SHAPES["reasoning"]], tokenizer_of("qwen3"), template_kwargs={"enable_thinking": False})


def test_turns_that_the_template_leaves_out_are_counted() -> None:
    shouting = {"role": "prompter", "content": "How many apples?"}
    row = {"prompt": [shouting, user("How many?")], "chosen": [assistant("5.")], "rejected": [assistant("No.")]}
    only_known = CHATML_PLAIN.replace(
        "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
    )
    _, report = tokenize([row], tiny_tokenizer(CHATML, only_known, eos="<|im_end|>"))
    assert any(note.startswith("1 pair has a turn before the answer") for note in report.notes)
    _, report = tokenize([row | {"prompt": [user("How many?")]}], tiny_tokenizer(CHATML, only_known, eos="<|im_end|>"))
    assert not any("turn before the answer" in note for note in report.notes)


def test_a_developer_turn_is_a_system_turn_where_the_template_knows_no_other() -> None:
    rows = [{"prompt": [{"role": role, "content": "Be brief."}, *ASKED], "chosen": YES, "rejected": NO}
            for role in ("developer", "system")]  # fmt: skip
    tokenizer = tokenizer_of("qwen3")
    (one, said), (other, _) = (tokenize([row], tokenizer) for row in rows)
    assert one.to_list() == other.to_list() and any("has a developer turn" in note for note in said.notes)
    merged, _ = tokenize(rows[:1], tokenizer_of("gemma-2"), system="merge")
    assert "Be brief.\n\nHow many?" in tokenizer_of("gemma-2").decode(merged[0]["chosen_ids"])
    assert not any("developer" in note for note in tokenize(rows[:1], tokenizer_of("gpt-oss"))[1].notes)


def test_text_of_another_family_s_template_is_recognized() -> None:
    row = {
        "prompt": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "5.",
        "rejected": "No.",
    }
    _, report = tokenize([row], tokenizer_of("llama-3.1"))
    assert any("carries a chat template already" in note for note in report.notes)
    with pytest.raises(TooManyDropped, match=r"leave out data\.apply_template"):
        tokenize([row], tokenizer_of("llama-3.1"), apply_template=True)


@pytest.mark.parametrize("name", ["llama-3.1", "qwen2.5", "qwen3", "gpt-oss"])
def test_results_of_tools_in_json_are_context(name: str) -> None:
    """Llama-3.1's template and gpt-oss's write a tool's text as JSON once more."""
    result = {"role": "tool", "name": "stock", "content": '{"count": 12, "fruit": "red \u00e9"}\nnext'}
    sides = [[STEPS[0], result, assistant(text)] for text in (ANSWER, OTHER)]
    row = SHAPES["steps"] | {"chosen": sides[0], "rejected": sides[1]}
    tokenizer = tokenizer_of(name)
    pairs, report = tokenize([row, row | {"prompt": [*row["prompt"], *sides[0][:2]], "chosen": [assistant(ANSWER)],
                                          "rejected": [assistant(OTHER)]}], tokenizer)  # fmt: skip
    call, answer = labels_of(pairs[0], "chosen", tokenizer)
    assert "stock" in call and "count" not in call + answer and ANSWER in answer
    assert len(labels_of(pairs[1], "chosen", tokenizer)) == 1 and not any("leaves out" in note for note in report.notes)


@pytest.mark.parametrize("name", ["arguments", "parameters", "args"])
def test_arguments_of_calls_by_other_names(name: str) -> None:
    tokenizer = tokenizer_of("qwen2.5")
    call = assistant("", tool_calls=[{"name": "stock", name: {"fruit": "red apples"}}])
    found, expected = (
        tokenize([SHAPES["call"] | {"chosen": [turn]}], tokenizer)[0].to_list() for turn in (call, called("red apples"))
    )
    assert found == expected


def test_labels_of_rated_answers_in_words_and_numbers() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    for good, bad in ((True, False), (1, 0), ("True", "False"), ("1", "-1"), ("desirable", "undesirable")):
        rows = [{"prompt": "one", "completion": text, "label": label} for text, label in (("good", good), ("bad", bad))]
        pairs, report = tokenize([*rows, rows[0] | {"label": None}] if good is True else rows, tokenizer)
        assert [labels_of(row, "chosen", tokenizer) for row in pairs] == [["good<|im_end|>"]]
        assert report.dropped == ({"rated answer without a partner": 1} if good is True else {})


def test_a_conversation_that_holds_the_answer_is_no_started_answer() -> None:
    row = {"messages": [*ASKED, *YES], "chosen": YES[0], "rejected": NO[0]}
    plain = {"prompt": ASKED, "chosen": YES, "rejected": NO}
    tokenizer = tokenizer_of("qwen2.5")
    assert tokenize([row], tokenizer)[0].to_list() == tokenize([plain], tokenizer)[0].to_list()
    _, report = tokenize([SHAPES["prefill"]], tokenizer)
    assert any("ends in a started answer" in note for note in report.notes)


def test_a_column_that_decides_is_not_mapped_away() -> None:
    row = {"prompt": "How many?", "response1": "5.", "response2": "No.", "preference_strength": -2}
    with pytest.raises(RequestError, match="preference_strength seems to say in each row which answer is better"):
        tokenize([row], tokenizer_of("qwen2.5"))


def test_an_answer_that_carries_its_end_is_refused() -> None:
    row = {"prompt": ASKED, "chosen": [assistant("5.<|im_end|>")], "rejected": NO}
    with pytest.raises(TooManyDropped, match=r"an answer ends with '<\|im_end\|>'"):
        tokenize([row], tokenizer_of("qwen2.5"))


@pytest.mark.parametrize("name", ["input", "query", "trajectory"])
def test_prompts_by_other_names(name: str) -> None:
    tokenizer, plain = tokenizer_of("qwen2.5"), {"chosen": "The answer is 5.", "rejected": "The answer is no."}
    found = tokenize([plain | {name: "How many?"}], tokenizer)[0].to_list()
    assert found == tokenize([plain | {"prompt": "How many?"}], tokenizer)[0].to_list()
