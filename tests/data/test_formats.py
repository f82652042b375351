"""Every shape of preference row, by hand and as real data sets write it; and rows that are none."""

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.data import Pairs, load_pairs
from orpo_lite.data.dropped_rows import EMPTY, EMPTY_PROMPT, EQUAL, PROMPTS_DIFFER, WRONG_TYPES, Dropped
from orpo_lite.data.row_shapes import (
    ALPACA,
    BARE_STRINGS,
    EXPLICIT,
    HH,
    IMPLICIT,
    SHAREGPT,
    STRINGS,
    ULTRAFEEDBACK,
    Pair,
    detect,
    row_shape,
    to_pair,
)
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.recipe import DataSection
from tests.data.conftest import write_jsonl
from tests.data.test_tokenize import TOKENIZERS
from tests.tiny import base_tokenizer

ASK, YES, NO = "How do I boil an egg?", "Boil it for eight minutes.", "I cannot help you."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def convert(row: Any, shape: str | None = None, strict: bool = True, apply_template: bool = False) -> Pair:
    return to_pair(row, shape or str(row_shape(row)), strict=strict, apply_template=apply_template, tool_calls=True)


PLAIN = ([user(ASK)], [assistant(YES)], [assistant(NO)])
SYSTEM = ([{"role": "system", "content": "Be kind."}, user(ASK)], *PLAIN[1:])
SEVERAL = ([user("Hello"), assistant("Hello. What is it?"), user(ASK)], *PLAIN[1:])
HH_ROW = {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {YES}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {NO}"}

SHAPES: list[tuple[str, dict[str, Any], tuple[list[Any], list[Any], list[Any]]]] = [
    (EXPLICIT, {"prompt": PLAIN[0], "chosen": PLAIN[1], "rejected": PLAIN[2]}, PLAIN),
    (EXPLICIT, {"prompt": SYSTEM[0], "chosen": SYSTEM[1], "rejected": SYSTEM[2]}, SYSTEM),
    (EXPLICIT, {"prompt": SEVERAL[0], "chosen": SEVERAL[1], "rejected": SEVERAL[2]}, SEVERAL),
    (EXPLICIT, {"prompt": PLAIN[0], "chosen": YES, "rejected": NO}, PLAIN),
    (EXPLICIT, {"prompt": user(ASK), "chosen": assistant(YES), "rejected": assistant(NO)}, PLAIN),
    (EXPLICIT, {"prompt": [human(ASK)], "chosen": [gpt(YES)], "rejected": [gpt(NO)], "system": "Be kind."}, SYSTEM),
    (EXPLICIT, {"prompt": PLAIN[0], "chosen": PLAIN[0] + PLAIN[1], "rejected": PLAIN[0] + PLAIN[2]}, PLAIN),
    (IMPLICIT, {"chosen": PLAIN[0] + PLAIN[1], "rejected": PLAIN[0] + PLAIN[2]}, PLAIN),
    (IMPLICIT, {"chosen": SYSTEM[0] + SYSTEM[1], "rejected": SYSTEM[0] + SYSTEM[2]}, SYSTEM),
    (IMPLICIT, {"chosen": SEVERAL[0] + SEVERAL[1], "rejected": SEVERAL[0] + SEVERAL[2]}, SEVERAL),
    (IMPLICIT, {"chosen": [human(ASK), gpt(YES)], "rejected": [human(ASK), gpt(NO)]}, PLAIN),
    (ULTRAFEEDBACK, {"prompt": ASK, "chosen": PLAIN[0] + PLAIN[1], "rejected": PLAIN[0] + PLAIN[2]}, PLAIN),
    (ULTRAFEEDBACK, {"prompt": ASK, "chosen": PLAIN[1], "rejected": PLAIN[2]}, PLAIN),
    (SHAREGPT, {"conversations": [human(ASK)], "chosen": gpt(YES), "rejected": gpt(NO)}, PLAIN),
    (SHAREGPT, {"conversations": [human(ASK)], "chosen": YES, "rejected": NO, "system": "Be kind."}, SYSTEM),
    (
        SHAREGPT,
        {"conversations": [human("Hello"), gpt("Hello. What is it?"), human(ASK)], "chosen": gpt(YES),
         "rejected": gpt(NO)},
        SEVERAL,
    ),
    (ALPACA, {"instruction": ASK, "chosen": YES, "rejected": NO}, PLAIN),
    (ALPACA, {"instruction": ASK, "input": "", "system": "Be kind.", "chosen": YES, "rejected": NO}, SYSTEM),
    (
        ALPACA,
        {"instruction": ASK, "history": [["Hello", "Hello. What is it?"]], "chosen": YES, "rejected": NO},
        SEVERAL,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "row", "expected"), SHAPES)
def test_conversations_in_any_shape(shape: str, row: dict[str, Any], expected: Any) -> None:
    given = copy.deepcopy(row)
    assert row_shape(row) == shape
    pair = convert(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected
    assert row == given, "the user's row was changed"


def test_alpaca_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Bonjour", "chosen": YES, "rejected": NO}
    assert convert(row).prompt == [user("Translate.\n\nBonjour")]


def test_strings_stay_strings_unless_a_template_is_asked_for() -> None:
    row = {"prompt": ASK, "chosen": YES, "rejected": NO}
    assert row_shape(row) == STRINGS
    assert convert(row)[:3] == (ASK, YES, NO)
    assert convert(row, apply_template=True)[:3] == PLAIN
    assert convert(row | {"system": "Be kind."}, apply_template=True)[:3] == SYSTEM


def test_bare_strings_split_by_trl_rule() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert row_shape(row) == BARE_STRINGS
    assert convert(row)[:3] == ("The sky is", " blue.", " green.")


def test_hh_strings_split_at_the_last_assistant() -> None:
    assert row_shape(HH_ROW) == HH
    prompt, chosen, rejected = convert(HH_ROW)[:3]
    assert (prompt, chosen, rejected) == (f"\n\nHuman: {ASK}\n\nAssistant:", f" {YES}", f" {NO}")
    assert convert(HH_ROW, apply_template=True)[:3] == PLAIN
    before = "\n\nHuman: Hello\n\nAssistant: Hello. What is it?"
    assert convert({k: before + v for k, v in HH_ROW.items()}, apply_template=True)[:3] == SEVERAL


def test_hh_answers_that_open_alike_keep_that_in_the_answer() -> None:
    row = {side: f"\n\nHuman: {ASK}\n\nAssistant: I would {end}" for side, end in (("chosen", "a"), ("rejected", "b"))}
    assert convert(row)[1:3] == (" I would a", " I would b")


def test_tools_and_function_calls() -> None:
    tool = {"type": "function", "function": {"name": "boil", "parameters": {"type": "object", "properties": {}}}}
    row: dict[str, Any] = {
        "conversations": [human(ASK), {"from": "function_call", "value": '{"name": "boil", "arguments": {"n": 1}}'},
                          {"from": "observation", "value": "done"}],
        "chosen": gpt(YES), "rejected": gpt(NO), "tools": json.dumps([tool]),
    }  # fmt: skip
    pair = convert(row)
    assert pair.tools == [tool]
    call = {"type": "function", "function": {"name": "boil", "arguments": {"n": 1}}}
    assert pair.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert pair.prompt[2] == {"role": "tool", "content": "done"}
    as_text = to_pair(row, SHAREGPT, strict=True, apply_template=False, tool_calls=False)
    assert as_text.prompt[1] == assistant('{"name": "boil", "arguments": {"n": 1}}')
    for column in ([tool], tool, [json.dumps(tool)]):
        assert convert(row | {"tools": column}).tools == [tool]
    for column in (None, "", []):
        assert convert(row | {"tools": column}).tools is None
    with pytest.raises(Dropped, match="tools"):
        convert(row | {"tools": "boil(n)"})


def test_text_parts_are_joined_and_null_fields_taken_away() -> None:
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "boil an egg?"}]
    turn = {"role": "user", "content": parts, "tool_calls": None}
    assert convert({"prompt": [turn], "chosen": PLAIN[1], "rejected": PLAIN[2]}).prompt == PLAIN[0]
    image = [{"type": "image", "url": "x.png"}]
    with pytest.raises(Dropped, match="content, expected text"):
        convert({"prompt": [turn | {"content": image}], "chosen": PLAIN[1], "rejected": PLAIN[2]})


def test_detect_takes_the_most_frequent_shape_and_knows_no_other() -> None:
    good = SHAPES[0][1]
    assert detect([good, HH_ROW, good, 3, None, {}]) == EXPLICIT
    assert detect([{"text": "hello"}, {"question": ASK, "chosen": 1}, "chosen"]) is None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"chosen": None}, EMPTY, "chosen is missing"),
    ({"rejected": [assistant("  ")]}, EMPTY, "rejected is empty"),
    ({"chosen": []}, EMPTY, "chosen holds no turn"),
    ({"rejected": PLAIN[1]}, EQUAL, "the same text"),
    ({"prompt": []}, EMPTY_PROMPT, "no turn"),
    ({"prompt": [user(" ")]}, EMPTY_PROMPT, "turn 1"),
    ({"prompt": [user("Hello"), assistant(""), user(ASK)]}, EMPTY_PROMPT, "turn 2"),
    ({"prompt": [{"role": "system", "content": "x"}]}, WRONG_TYPES, "ends with a system turn"),
    ({"chosen": 3}, WRONG_TYPES, "chosen is a number"),
    ({"chosen": [user("x")]}, WRONG_TYPES, "ends with a user turn"),
    ({"prompt": [{"content": "x"}]}, WRONG_TYPES, "prompt[0] has no role (found content)"),
    ({"prompt": [user(ASK), "text"]}, WRONG_TYPES, "prompt[1] is text"),
    ({"prompt": [user(3)]}, WRONG_TYPES, "prompt[0] has a number as content"),  # pyright: ignore
    ({"prompt": [{"from": "wizard", "value": "x"}]}, WRONG_TYPES, "'wizard', expected human"),
    ({"prompt": [{"from": ["human"], "value": "x"}]}, WRONG_TYPES, "expected human"),
    ({"prompt": [user("half \ud83d")]}, WRONG_TYPES, "half a character"),
    ({"chat_template_kwargs": 3}, WRONG_TYPES, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("change", "reason", "detail"), BAD)
def test_bad_rows_are_dropped_with_reason_and_place(change: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(Dropped) as caught:
        convert(SHAPES[0][1] | change, EXPLICIT)
    assert caught.value.reason == reason and detail in caught.value.detail


def test_prompts_that_differ() -> None:
    row = {"chosen": [user("One"), assistant(YES)], "rejected": [user("Two"), assistant(NO)]}
    with pytest.raises(Dropped) as caught:
        convert(row)
    assert caught.value.reason == PROMPTS_DIFFER and "differ from turn 1" in caught.value.detail
    with pytest.raises(Dropped) as caught:
        convert(HH_ROW | {"rejected": f"\n\nHuman: Why?\n\nAssistant: {NO}"})
    assert caught.value.reason == PROMPTS_DIFFER and "'How do I" in caught.value.detail


def test_a_row_of_another_family_is_dropped_by_name() -> None:
    with pytest.raises(Dropped, match="found strings, explicit prompt, the source is conversations") as caught:
        convert({"prompt": ASK, "chosen": YES, "rejected": NO}, EXPLICIT)
    assert caught.value.reason == WRONG_TYPES


# ---- real data in every shape ------------------------------------------------------------------------------------


def load(path: Path, name: str = "chatml", **options: Any) -> Pairs:
    spec = DataSection(train=[{"path": str(path)}], eval_fraction=0, max_length=None, **options)  # pyright: ignore
    return load_pairs(spec, TOKENIZERS[name]())


def tokens(pairs: Pairs) -> list[tuple[Any, ...]]:
    columns = ("chosen_ids", "rejected_ids", "chosen_start", "rejected_start")
    return [tuple(str(row[name]) for name in columns) for row in pairs.train]


@functools.cache
def reference(path: Path) -> list[tuple[Any, ...]]:
    """Tokens of the rows that the variants were made of."""
    return tokens(load(path))


def test_explicit_and_implicit_conversations_give_identical_tokens(shared_data: Path) -> None:
    implicit = load(shared_data / "variants" / "train_implicit_conversational.jsonl")
    assert tokens(implicit) == reference(shared_data / "train.jsonl") and len(implicit.train) == 1409


@pytest.mark.parametrize("name", ["llama-3", "gemma", "metaspace, zephyr"])
def test_so_they_do_with_other_tokenizers(name: str, shared_data: Path) -> None:
    files = shared_data / "train.jsonl", shared_data / "variants" / "train_implicit_conversational.jsonl"
    explicit, implicit = (load(file, name, max_rows=200) for file in files)
    assert tokens(explicit) == tokens(implicit) and len(explicit.train) > 180
    assert explicit.report.dropped == implicit.report.dropped


@pytest.mark.parametrize(
    ("variant", "original", "rows", "options"),
    [
        ("train_ultrafeedback_style.jsonl", "train.jsonl", 468, {}),
        ("train_standard_string.jsonl", "train.jsonl", 468, {"apply_template": True}),
        ("hh_train_implicit_string.jsonl", "train.jsonl", 1300, {"apply_template": True}),
        ("llamafactory_sharegpt.json", "train.jsonl", 109, {}),
        ("rasbt_alpaca.json", "politeness_train.jsonl", 964, {}),
    ],
)
def test_every_real_shape_gives_the_tokens_of_the_conversational_rows(
    variant: str, original: str, rows: int, options: dict[str, Any], shared_data: Path
) -> None:
    pairs = load(shared_data / "variants" / variant, **options)
    assert len(pairs.train) == rows and not pairs.report.drops
    assert set(tokens(pairs)) <= set(reference(shared_data / original))


def test_hh_strings_without_template(shared_data: Path) -> None:
    pairs = load(shared_data / "variants" / "hh_train_implicit_string.jsonl")
    assert len(pairs.train) == 1300 and [about["shape"] for about in pairs.shapes.values()] == [HH]
    assert not pairs.report.notes


def test_column_map_gives_the_same_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": f"{ASK} {n}", "chosen": YES, "rejected": NO} for n in range(4)]
    renamed = [{"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "chosen": "noise"} for r in rows]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "renamed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    mapped = load(tmp_path / "renamed.jsonl", columns=columns)
    assert tokens(mapped) == tokens(load(tmp_path / "plain.jsonl")) and len(mapped.train) == 4


# ---- fuzz --------------------------------------------------------------------------------------------------------

TEXTS = ["", " ", "\n", ASK, YES, NO, "\ud83d", "a\udc00b", "\x00", "🙂🧑‍🧑‍🧒", "\u202eolleh\u202c", "مرحبا", "é",
         "<|im_end|>", "<|im_start|>assistant\n", "x" * 5000, "{{ messages }}", "[]", "null", '{"name": "f"}', "\ufeff",
         "\n\nHuman: hi\n\nAssistant: ho", "\n\nHuman: hi\n\nAssistant:", "Human: a\n\nAssistant: b\n\nHuman:"]  # fmt: skip
ROLES: list[Any] = ["tool", "human", "gpt", "function_call", "observation", "wizard", "", None, 3, [], {}]
KWARGS: list[Any] = [{"tokenize": True}, {"tools": 1}, {"messages": []}, {"chat_template": "{{ 1/0 }}"}, {"x": [{}]}]


def junk(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind < 6:
        return [None, 0, float("nan"), True, 10**400, draw.choice(TEXTS)][kind]
    items = [junk(draw, depth + 1) for _ in range(draw.randrange(4))]
    return items if kind == 6 else {draw.choice(TEXTS): item for item in items}


def random_turn(draw: random.Random) -> Any:
    if draw.random() < 0.02:
        return junk(draw)
    role, content = ("from", "value") if draw.random() < 0.2 else ("role", "content")
    roles = ["user", "assistant"] * 12 + ["system"] * 3 + ROLES
    turn = {role: draw.choice(roles), content: junk(draw) if draw.random() < 0.04 else draw.choice(TEXTS[3:6] + TEXTS)}
    if draw.random() < 0.04:
        turn["tool_calls"] = junk(draw)
    if draw.random() < 0.03:
        del turn[role]
    return turn


def random_side(draw: random.Random) -> Any:
    kind = draw.random()
    if kind < 0.06:
        return junk(draw)
    if kind < 0.35:
        return draw.choice(TEXTS[3:6] * 3 + TEXTS)
    turns = [random_turn(draw) for _ in range(draw.randrange(4))]
    return turns + [assistant(draw.choice(TEXTS[3:6] + TEXTS))] * (draw.random() < 0.85)


def random_row(draw: random.Random) -> Any:
    if draw.random() < 0.03:
        return junk(draw)
    chances = {"chosen": 0.97, "rejected": 0.97, "prompt": 0.6, "conversations": 0.1, "instruction": 0.1, "input": 0.05,
               "history": 0.05, "system": 0.05, "tools": 0.05, "chat_template_kwargs": 0.02}  # fmt: skip
    row = {name: random_side(draw) for name, chance in chances.items() if draw.random() < chance}
    return row | ({"chat_template_kwargs": draw.choice(KWARGS)} if draw.random() < 0.04 else {})


@pytest.mark.parametrize("seed", range(2))
def test_random_rows_are_kept_whole_or_dropped_with_a_reason(seed: int) -> None:
    draw = random.Random(seed)
    names = ["chatml", "qwen2.5", "llama-3", "gemma", "llama-2 legacy, mistral", "chatml, markers as text"]
    tokenizers = {name: TOKENIZERS[name]() for name in names}
    kept = dropped = 0
    for _ in range(60):
        rows = [random_row(draw) for _ in range(8)]
        options = TokenizeOptions(
            strict=draw.random() < 0.6, apply_template=draw.random() < 0.3, overlong=draw.choice(["drop", "truncate"]),
            completion_end=draw.choice(["trl", "turn"]), max_length=draw.choice([None, 40, 1024]),
            max_prompt_length=draw.choice([None, None, 20]),
        )  # fmt: skip
        shape = detect(rows)
        if shape is None:
            continue
        chunk = PairTokenizer(tokenizers[draw.choice(names)], options, shape)(list(enumerate(rows)))
        assert sorted(chunk.columns["row"] + [row for row, _, _ in chunk.drops]) == list(range(len(rows)))
        assert all(reason and detail and len(detail) < 400 for _, reason, detail in chunk.drops)
        for n in range(len(chunk.columns["row"])):
            for side in ("chosen", "rejected"):
                ids = chunk.columns[f"{side}_ids"][n]
                start = chunk.columns[f"{side}_start"][n]
                assert start < len(ids) <= (options.max_length or len(ids))
                assert start <= (options.max_prompt_length or start)
        kept, dropped = kept + len(chunk.columns["row"]), dropped + len(chunk.drops)
    assert kept > 10 and dropped > 20


def test_deeply_nested_fields_are_dropped() -> None:
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    rows = [SHAPES[0][1] | change for change in ({"tools": deep}, {"chat_template_kwargs": {"x": deep}}, {})]
    work = PairTokenizer(base_tokenizer("Qwen/Qwen3-4B"), TokenizeOptions(), EXPLICIT)
    chunk = work(list(enumerate(rows)))
    assert [row for row, _, _ in chunk.drops] == [0, 1] and chunk.columns["row"] == [2]


def test_a_file_of_rows_with_junk_between_is_read_to_its_end(tmp_path: Path) -> None:
    good = {"prompt": PLAIN[0], "chosen": PLAIN[1], "rejected": PLAIN[2]}
    path = write_jsonl(tmp_path / "mixed.jsonl", [good, 3, good, None, [good], "text", good, good, good, {}])
    pairs = load(Path(path))
    assert pairs.train["row"][:] == [0, 2, 6, 7, 8] and [drop.row for drop in pairs.report.drops] == [1, 3, 4, 5, 9]
