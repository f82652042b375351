"""Repeats, contradictions and what gives the chosen answer away: found, named by row, and left out where asked for."""

import itertools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.data import DropReport, Pairs, TooManyDropped, load_pairs
from orpo_lite.data.quality import (
    COLUMNS,
    CONTRADICTION,
    DUPLICATE,
    LANGUAGE,
    LANGUAGES,
    NEAR,
    TRAITS,
    Finding,
    alike,
    describe,
    end_to_end,
    inspect,
    repeats,
    traits,
)
from orpo_lite.data.repair import check_target, write_fixed
from orpo_lite.data.row_shapes import Pair
from orpo_lite.data.token_cache import Tokenized
from tests.data.conftest import write_jsonl
from tests.data.test_command import run  # noqa: F401 (a fixture)
from tests.data.test_readers import TOKENIZER, spec

WORDS = (
    "amber birch cedar delta ember flint grove heron indigo jade kelp lark maple north ocean pearl quartz river".split()
)


def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def load(folder: Path, given: list[Any], **options: Any) -> Pairs:
    path = write_jsonl(folder / "given.jsonl", given)
    return load_pairs(
        spec(path, **{"eval_fraction": 0, "apply_template": True, "max_length": None} | options), TOKENIZER
    )


def found(pairs: Pairs) -> dict[str, Finding]:
    return {finding.name: finding for finding in inspect(pairs.sources, TOKENIZER) if finding.pairs}


def places(finding: Finding) -> list[tuple[int, ...]]:
    return [tuple(int(number) for number in re.findall(r"\d+", one)) for one in finding.examples]


@pytest.fixture
def case(shared_data: Path) -> Path:
    file = shared_data.parent / "cases" / "data" / "duplicates_and_contradictions.jsonl"
    if not file.is_file():
        pytest.skip(f"no case at {file}")
    return file


# ---- the case that was reported --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [False, True])
def test_the_case_is_told_by_row(case: Path, template: bool) -> None:
    pairs = load_pairs(spec(case, eval_fraction=0, apply_template=template), TOKENIZER)
    findings = found(pairs)
    assert places(findings["exact duplicates"]) == [(10, 0), (11, 1), (12, 2), (13, 3)]
    assert places(findings["contradictions"]) == [(14, 4), (15, 5)]
    assert places(findings["near duplicates"]) == [(16, 7)]
    assert findings["non-answers"].says == "only in chosen 2, only in rejected 15, in both 0"
    assert len(pairs.train) == 17
    [note] = [note for note in pairs.report.notes if "contradiction" in note]
    assert (
        "4 pairs (exact duplicates) and 4 pairs (contradictions)" in note
        and "--fix FILE" in note
        and "data.deduplicate=true" in note
    )


def test_deduplicate_leaves_them_out_of_the_run_and_counts_them(case: Path) -> None:
    plain = load_pairs(spec(case, eval_fraction=0), TOKENIZER)
    pairs = load_pairs(spec(case, eval_fraction=0, deduplicate=True), TOKENIZER)
    assert pairs.train["row"][:] == [0, 1, 2, 3, 6, 7, 8, 9, 16]
    assert pairs.report.dropped == {"exact duplicate": 4, "contradiction": 4}
    assert {drop.row: drop.detail for drop in pairs.report.drops}[14] == "of row 4"
    assert (pairs.report.kept, pairs.report.rows) == (9, 17) and [s["kept"] for s in pairs.shapes.values()] == [9]
    assert not [note for note in pairs.report.notes if "--fix" in note] and pairs.fingerprint != plain.fingerprint
    findings = found(pairs)
    assert places(findings["near duplicates"]) == [(16, 7)] and "contradictions" not in findings


def test_the_command_shows_and_fixes_the_case(run: Any, case: Path, tmp_path: Path) -> None:  # noqa: F811
    fixed = tmp_path / "fixed.jsonl"
    words = (f"data.train={case}", "data.eval=null", "data.eval_fraction=0", "--examples", "0")
    status, out, err = run(*words, "--fix", str(fixed))
    assert status == 0
    text = " ".join(out.split())
    assert (
        "exact duplicates: 4 pairs (23.5%): row 10 and row 0, row 11 and row 1, row 12 and row 2, row 13 and row 3"
        in text
    )
    assert "contradictions: 4 pairs (23.5%): row 14 and row 4, row 15 and row 5" in text
    assert "near duplicates: 1 pair (5.9%): row 16 and row 7" in text
    assert "'shorter wins' is right in 88% of those that differ, where chance is 50% ± 30%" in text
    assert "checked, nothing found: refusals" in text
    assert "--fix FILE" not in text and text.endswith(f"next: python -m orpo_lite.data --recipe quickstart data.eval=null "
                                                      f"data.eval_fraction=0 data.train={fixed}")  # fmt: skip
    assert f"wrote 8 rows to {fixed}, and to {fixed}.changes.jsonl those left out: 4 " in text

    given = case.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in fixed.read_text("utf-8").splitlines()] == [
        json.loads(given[n]) for n in (0, 1, 2, 3, 6, 7, 8, 9)
    ]
    changes = [json.loads(line) for line in Path(f"{fixed}.changes.jsonl").read_text("utf-8").splitlines()]
    assert [(one["row"], one["reason"], one["detail"]) for one in changes if one["row"] in (4, 10, 16)] == [
        (4, "contradiction", "of row 14"),
        (10, "exact duplicate", "of row 0"),
        (16, "near duplicate", "of row 7"),
    ] and len(changes) == 9  # fmt: skip

    status, out, err = run(*words, "--fix", str(fixed))
    assert status == 2 and "exists, and is not overwritten" in err and not out
    status, out, _ = run(f"data.train={fixed}", *words[1:], "--json")
    content = json.loads(out)
    assert content["pairs"] == {"train": 8} and not {one["name"] for one in content["quality"]} & {
        "exact duplicates", "contradictions", "near duplicates"}  # fmt: skip


# ---- repeats ---------------------------------------------------------------------------------------------------------


def test_repeats_equal_a_naive_search(tmp_path: Path) -> None:
    """Few words make many repeats and contradictions; every pair is compared with every other."""
    chance = random.Random(0)
    answers = ["yes", "no", "maybe so", "ask me later"]
    given = [row(chance.choice("abc") + "?", *chance.sample(answers, 2)) for _ in range(60)]
    expected = {}
    for n, one in enumerate(given):
        turned = row(one["prompt"], one["rejected"], one["chosen"])
        if turned in given:
            expected[n] = CONTRADICTION, given.index(turned)
        elif given.index(one) < n:
            expected[n] = DUPLICATE, given.index(one)
    assert {reason for reason, _ in expected.values()} == {CONTRADICTION, DUPLICATE}
    assert repeats(end_to_end(load(tmp_path, given).sources)) == expected


def test_case_and_spaces_make_near_duplicates_and_contradictions(tmp_path: Path) -> None:
    given = [row("Why?", "Because of it.", "Go away."), row("why? ", "because  of it.\n", "go away."),
             row("WHY?", "GO AWAY.", "because of it."), row("And?", "Well, so it is.", "So what?"),
             row(" and?", "Well, so  it is.", "so what?")]  # fmt: skip
    findings = found(load(tmp_path, given))
    assert places(findings["contradictions"]) == [(2, 0)] and places(findings["near duplicates"]) == [(4, 3)]


def test_a_preference_for_case_alone_contradicts_nothing(tmp_path: Path) -> None:
    given = [row("Name it.", "paris", "Paris"), row("Name it.", "PARIS", "paris"), row("Other?", "Oslo", "oslo")]
    findings = found(load(tmp_path, given))
    assert "contradictions" not in findings and "exact duplicates" not in findings
    given.append(row("Other?", "oslo", "Oslo"))
    assert places(found(load(tmp_path, given))["contradictions"]) == [(3, 2)]


@pytest.mark.parametrize("field", ["system", "tools"])
def test_another_system_turn_or_tool_makes_another_pair(tmp_path: Path, field: str) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    values = ["Be kind.", "Be brief."] if field == "system" else [[tool], None]
    given = [row("What time is it?", "Noon.", "No idea.") | {field: value} for value in values]
    assert "exact duplicates" not in found(load(tmp_path, given))


def test_repeats_are_found_across_sources_and_named_with_them(tmp_path: Path) -> None:
    one, other = row("Why?", "Because of it.", "Go away."), row("And?", "Well, so it is.", "So what?")
    sources = [write_jsonl(tmp_path / "a.jsonl", [one, other]), write_jsonl(tmp_path / "b.jsonl", [other, one, one])]
    options = {"eval_fraction": 0, "apply_template": True}
    pairs = load_pairs(spec([{"path": path} for path in sources], **options), TOKENIZER)
    finding = found(pairs)["exact duplicates"]
    assert finding.examples == [
        f"row {n} of {sources[1]} and row {other} of {sources[0]}" for n, other in ((0, 1), (1, 0), (2, 0))
    ]
    pairs = load_pairs(spec([{"path": path} for path in sources], deduplicate=True, **options), TOKENIZER)
    assert (pairs.train["source"][:], pairs.train["row"][:]) == ([0, 0], [0, 1])
    assert [(d.source, d.row, d.detail) for d in pairs.report.drops][0] == (sources[1], 0, f"of row 1 of {sources[0]}")


def test_nothing_left_by_deduplicate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="all 2 pairs contradict each other .* none is left"):
        load(tmp_path, [row("Why?", "Because.", "Go."), row("Why?", "Go.", "Because.")], deduplicate=True)


# ---- near duplicates -------------------------------------------------------------------------------------------------


def sentence(chance: random.Random, words: int) -> list[str]:
    return [chance.choice(WORDS) + str(chance.randrange(30)) for _ in range(words)]


def edited(chance: random.Random, text: str, edits: int) -> str:
    words = text.split()
    for place in chance.sample(range(len(words)), edits):
        words[place] = "other"
    return " ".join(words)


def test_edited_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Every pair is compared with every other: what is above the threshold by far is found, what is below it is not."""
    chance = random.Random(1)
    given = [row(*(" ".join(sentence(chance, n)) for n in (20, 60, 60))) for _ in range(150)]
    for n in range(150):
        kept = list(given[n].values())
        part = n % 3
        kept[part] = edited(chance, kept[part], 1 if n % 2 else [8, 30, 30][part])
        given.append(row(*kept))
    near = repeats(end_to_end(load(tmp_path, given).sources), near=True)
    assert near == {150 + n: (NEAR, n) for n in range(1, 150, 2)}


def test_a_task_with_short_answers_is_no_near_duplicate(tmp_path: Path) -> None:
    """A long instruction that all prompts share, a few words of input, and two labels as answers."""
    chance, task = random.Random(2), " ".join(sentence(random.Random(3), 150))
    answers = [("positive", "negative"), ("negative", "positive")]
    given = [row(f"{task}\nText: {' '.join(sentence(chance, 6))}", *chance.choice(answers)) for _ in range(200)]
    assert not {"near duplicates", "contradictions"} & found(load(tmp_path, given)).keys()


def test_many_copies_of_one_pair_are_all_found(tmp_path: Path) -> None:
    chance = random.Random(4)
    parts = [" ".join(sentence(chance, n)) for n in (30, 60, 60)]
    given = [row(edited(chance, parts[0], 1), *parts[1:]) for _ in range(120)]
    finding = found(load(tmp_path, given))
    assert finding["near duplicates"].pairs + getattr(finding.get("exact duplicates"), "pairs", 0) == 119


def test_all_three_parts_have_to_be_alike() -> None:
    one, same, other = list(range(20)), [*range(19), 99], list(range(40, 60))
    assert alike([one, one, one], [same, same, same])
    assert not any(alike([one, one, one], [*parts]) for parts in itertools.permutations([one, one, other]))
    assert alike([one, one, [1]], [one, one, [1]]) and not alike([one, one, [1]], [one, one, [2]])


@pytest.mark.slow
def test_61_000_pairs_take_less_than_a_minute(shared_data: Path) -> None:
    """Real answers, joined to UltraFeedback's length, a tenth of their words exchanged; each twentieth nearly repeats."""
    chance = random.Random(5)
    real = [json.loads(line) for line in (shared_data / "train.jsonl").read_text("utf-8").splitlines()]
    words = [word for one in real for word in one["chosen"][-1]["content"].split()]
    unique = []
    for _ in range(3000):
        texts = (
            " ".join(one[side][-1]["content"] for one in chance.choices(real, k=4)) for side in ("chosen", "rejected")
        )
        unique.append(row(chance.choice(real)["prompt"][-1]["content"], *texts))
    given = list(unique)
    while len(given) < 61_000:
        one = chance.choice(unique)
        changed = {side: " ".join(chance.choice(words) if chance.random() < 0.1 else word for word in one[side].split())
                   for side in ("chosen", "rejected")}  # fmt: skip
        given += [one | changed] if len(given) % 20 else [one | {"chosen": edited(chance, one["chosen"], 1)}]
    start = time.process_time()
    described = [describe(Pair(one["prompt"], one["chosen"], one["rejected"])) for one in given]
    spent = time.process_time() - start
    rows = as_tokens(given, described)
    start = time.process_time()
    findings = {finding.name: finding for finding in inspect([Tokenized(rows, DropReport(), "", "", "all")], TOKENIZER)}
    assert spent + time.process_time() - start < 60
    assert findings["near duplicates"].pairs > 0.95 * 2900


def as_tokens(given: list[dict[str, str]], described: list[Any]) -> datasets.Dataset:
    """Return the pairs with one token a word, without a tokenizer's minutes."""
    vocabulary: dict[str, int] = {}

    def lists(texts: list[str]) -> pa.Array:
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in text.split()] for text in texts]
        offsets = np.cumsum([0, *map(len, ids)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(itertools.chain(*ids), pa.int32()))

    columns = {
        f"{side}_ids": lists([f"{one['prompt']} {one[side]}" for one in given]) for side in ("chosen", "rejected")
    }
    starts = pa.array([len(one["prompt"].split()) for one in given], pa.int32())
    columns |= {"chosen_start": starts, "rejected_start": starts, "row": pa.array(range(len(given)), pa.int64())}
    columns |= {
        name: pa.array(values, pa.int64()) for name, values in zip(COLUMNS, zip(*described, strict=True), strict=True)
    }
    return datasets.Dataset(pa.table(columns | {"source": pa.array([0] * len(given), pa.int32())}))


# ---- what gives the answer away --------------------------------------------------------------------------------------


def named(text: str) -> set[str]:
    return {name for n, name in enumerate(TRAITS) if traits(text) >> n & 1}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "refusals") for text in (
            "I cannot help with that.", "I can't do that, sorry.", "I'm sorry, but I can’t assist with this request.",
            "Sorry, I won't write that.", "As an AI language model, I do not have feelings.", "I am unable to answer.",
            "Unfortunately, I cannot say.", "Es tut mir leid, aber das geht nicht.", "Lo siento, no puedo ayudar.",
            "抱歉，我无法回答这个问题。", "Извините, я не могу помочь.", "I apologize, but I cannot continue.")),
        *((text, "non-answers") for text in (
            "No idea.", "I don't know.", "I don’t know", "N/A", "...", "None", "not sure", "I have no idea!", "null", "-",
            "Keine Ahnung.", "[deleted]", "不知道。")),
        *((text, "one-word answers") for text in ("Yes.", "5.", "entails", "Paris", "是")),
    ],
)  # fmt: skip
def test_answers_that_are_seldom_wanted(text: str, kind: str) -> None:
    assert named(text) == {kind}


@pytest.mark.parametrize(
    "text",
    ["I can't wait to show you this recipe!", "I cannot recommend it highly enough.", "You cannot divide by zero.",
     "I know that one: it is blue.", "None of them fit, so take the third.", "There is no idea as old as this one.",
     "这是一个很长的句子没有空格", "As an artist, I would say blue.", "The answer is 5 - 3 = 2 | 4.", "a < b and c > d",
     "It costs $5 here and $6 there.", "C# is fine, and 3.5 is a number."],
)  # fmt: skip
def test_plain_answers_have_no_traits(text: str) -> None:
    assert not named(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("So:\n## Steps\nfirst take it", "headings"), ("Take:\n- an egg\n- a pan", "lists"),
        ("Do this:\n1. boil it\n2. eat it", "lists"), ("This is **very** important", "bold"),
        ("Run:\n```\nls -l\n```", "code fences"), ("So:\n| a | b |\n|---|---|\n| 1 | 2 |", "tables"),
        ("One<br>two lines", "HTML"), ("It is \\(x^2\\) then", "LaTeX"), ("See https://example.org for it", "links"),
        ("Well done 🎉 my friend", "emoji"), ("<think>so it is</think> five of them", "reasoning tags"),
    ],
)  # fmt: skip
def test_markup(text: str, name: str) -> None:
    assert named(text) == {name}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The house is on the hill and you can see it.", "English"), ("Das Haus ist auf dem Berg und nicht hier.", "German"),
        ("La maison est sur le bord du lac, et les gens.", "French"), ("El perro que vive en la casa es un amigo.", "Spanish"),
        ("O cão que mora em casa não é um gato, mas do rei.", "Portuguese"), ("Il cane che è del re non sono i gatti.", "Italian"),
        ("Het huis is niet van de koning en dat is voor een kat.", "Dutch"), ("Дом стоит на горе.", "Cyrillic"),
        ("房子在山上。", "Chinese"), ("家は丘の上にあります。", "Japanese"), ("집은 언덕 위에 있습니다.", "Korean"),
        ("البيت على التل", "Arabic"), ("Το σπίτι είναι στον λόφο", "Greek"), ("", ""), ("print(x)", ""), ("“Quote” – 5 €", ""),
    ],
)  # fmt: skip
def test_languages(text: str, name: str) -> None:
    assert LANGUAGES[traits(text) >> LANGUAGE] == name


def pairs_with(folder: Path, chosen: str, rejected: str, share: float = 1.0) -> dict[str, Finding]:
    """Findings for 40 pairs, of which a share have these beginnings, and answers of equal length."""
    given = []
    for n in range(40):
        own = [chosen, rejected] if n < 40 * share else ["", ""]
        texts = [" ".join(sentence(random.Random(2 * n + side), 8)) for side in (0, 1)]
        given.append(row(f"Question {n}?", *(f"{a}{b}" for a, b in zip(own, texts, strict=True))))
    return found(load(folder, given))


def test_markup_of_one_side_is_said_with_shares_and_an_example(tmp_path: Path) -> None:
    finding = pairs_with(tmp_path, "## So\n", "##So \n", 0.5)["headings"]
    assert finding.says == "only in chosen 20, only in rejected 0, in both 0"
    assert finding.examples[0].startswith("row 0 chosen: '## So")


def test_markup_of_both_sides_or_of_few_pairs_is_not_said(tmp_path: Path) -> None:
    assert "headings" not in pairs_with(tmp_path, "## So\n", "## So\n")
    assert "headings" not in pairs_with(tmp_path, "## So\n", "##So \n", 0.05)


def test_languages_that_differ_are_said(tmp_path: Path) -> None:
    finding = pairs_with(
        tmp_path, "The house is on the hill and you see it. ", "Das Haus ist auf dem Berg und nicht hier. "
    )
    assert finding["different languages"].says == "English chosen and German rejected 40"
    assert [one.split(":")[0] for one in finding["different languages"].examples] == ["row 0 chosen", "row 0 rejected"]


def test_length_is_said_above_sixty_percent_only(tmp_path: Path) -> None:
    longer = pairs_with(tmp_path, "one two three four five six seven eight nine ten ", "")
    assert "'longer wins' is right in 100% of those that differ" in longer["length"].says
    one, other = row("Why {}?", "one two three", "one"), row("Why {}?", "one", "one two three")
    given = [
        x | {"prompt": x["prompt"].format(n)} for n, x in enumerate(itertools.islice(itertools.cycle([one, other]), 60))
    ]
    assert "length" not in found(load(tmp_path, given))


def test_nothing_found_prints_what_was_checked_alone(run: Any, tmp_path: Path) -> None:  # noqa: F811
    given = [row(" ".join(sentence(random.Random(n), 6)), *(" ".join(sentence(random.Random(n * s), 9)) for s in (31, 37)))
             for n in range(1, 9)]  # fmt: skip
    status, out, _ = run(f"data.train={write_jsonl(tmp_path / 'a.jsonl', given)}", "data.eval=null", "--examples", "0")
    assert (
        status == 0
        and "checked, nothing found: exact duplicates, contradictions, near duplicates, length" in " ".join(out.split())
    )


# ---- truncation, and --fix -------------------------------------------------------------------------------------------


def test_answers_that_differ_only_behind_the_cut_have_their_own_reason(tmp_path: Path) -> None:
    same = " ".join(WORDS * 6)
    given = [row(f"Why {n}?", f"{same} yes", f"{same} no") for n in range(2)] + [
        row(f"How {n}?", "So.", "No.") for n in range(4)
    ]
    pairs = load(tmp_path, given, max_length=64, overlong="truncate")
    assert pairs.report.dropped == {"chosen equal to rejected once cut": 2}
    assert pairs.report.drops[0].detail == "chosen and rejected are the same tokens"


def test_fix_keeps_original_columns_and_drops_what_a_run_drops(tmp_path: Path) -> None:
    given: list[Any] = [{"id": n, "question": f"Why {n}?", "good": f"Since {n} – 🎉.", "bad": "Go.", "more": {"x": [n, None]}}
                        for n in range(5)]  # fmt: skip
    given[3]["good"] = ""
    path, columns = tmp_path / "given.jsonl", {"prompt": "question", "chosen": "good", "rejected": "bad"}
    section = spec(write_jsonl(path, [*given, given[0]]), eval_fraction=0, columns=columns)
    pairs = load_pairs(section, TOKENIZER)
    fixed = write_fixed(section, pairs.sources[0], tmp_path / "fixed.jsonl")
    kept = [json.loads(line) for line in Path(fixed["path"]).read_text("utf-8").splitlines()]
    assert kept == [given[n] for n in (0, 1, 2, 4)]
    assert fixed["left_out"] == {"empty or missing side": 1, "exact duplicate": 1}
    again = load_pairs(section.model_copy(update={"train": spec(fixed["path"]).train}), TOKENIZER)
    assert again.report.dropped == {} and len(again.train) == 4


def test_fix_works_where_a_run_is_refused(run: Any, tmp_path: Path) -> None:  # noqa: F811
    given = [row("Why?", "So.", "No."), *[row(f"How {n}?", "", "No.") for n in range(3)]]
    path, fixed = write_jsonl(tmp_path / "bad.jsonl", given), tmp_path / "fixed.jsonl"
    words = (f"data.train={path}", "data.eval=null", "data.eval_fraction=0", "--examples", "0")
    status, out, _ = run(*words, "--fix", str(fixed))
    assert status == 0 and "wrote 1 row to" in out and json.loads(fixed.read_text("utf-8")) == given[0]
    path = write_jsonl(tmp_path / "none.jsonl", given[1:])
    assert run(f"data.train={path}", *words[1:], "--fix", str(tmp_path / "none-fixed.jsonl"))[0] == 2
    assert not (tmp_path / "none-fixed.jsonl").exists()


def test_fix_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row("Why?", "So.", "No.")])
    for target, several, words in (
        ("b.json", False, "ends in .jsonl"), ("a.jsonl", False, "is not overwritten"),
        ("none/b.jsonl", False, "there is no folder"), ("b.jsonl", True, "one source at a time"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            check_target(spec([{"path": path}] * (1 + several)), tmp_path / target)
    with pytest.raises(RequestError, match="set data.max_rows=null"):
        check_target(spec(path, max_rows=5), tmp_path / "b.jsonl")


def test_too_many_dropped_names_the_sources(tmp_path: Path) -> None:
    with pytest.raises(TooManyDropped) as caught:
        load(tmp_path, [row("Why?", "", "No.")] * 3)
    assert [one.label for one in caught.value.sources] == [str(tmp_path / "given.jsonl")]


def test_prompts_that_are_held_out_and_trained_on_are_named_by_row(tmp_path: Path) -> None:
    given = [row(f"Why {n}?", f"Since {n}.", "Go.") for n in range(6)]
    held = write_jsonl(tmp_path / "held.jsonl", [row("New?", "Yes.", "No."), row("Why 4?", "Because.", "Go away.")])
    [note] = [note for note in load(tmp_path, given, eval=held).report.notes if "trained on as well" in note]
    assert note == (
        "1 of 2 held-out pairs have a prompt that is trained on as well: held-out row 1 and row 4 of training"
    )


def test_several_turns_are_compared_by_what_is_labeled(tmp_path: Path) -> None:
    """The answers are the same, only what the tool says differs; or the answers differ, but behind the cut."""

    def turns(said: str, answer: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": "Let me look."}, {"role": "tool", "content": said},
                {"role": "assistant", "content": answer}]  # fmt: skip

    asked = [{"role": "user", "content": "What time is it?"}]
    long = " ".join(WORDS * 20)
    given = [row(asked, turns("12:00", "Noon."), turns("13:00", "Noon.")),  # pyright: ignore
             row(asked, turns(long, "Noon."), turns(long + " x", "One."))]  # pyright: ignore  # fmt: skip
    given += [row(asked, turns("12:00", f"Noon {n}."), turns("12:00", "No idea.")) for n in range(4)]  # pyright: ignore
    report = load(tmp_path, given, max_length=200, overlong="truncate").report
    reasons = {drop.row: drop.reason for drop in report.drops}
    assert reasons == {0: "chosen equal to rejected", 1: "chosen equal to rejected once cut"}


def test_fix_of_rated_answers_is_refused(tmp_path: Path) -> None:
    """A pair of them is two rows of the file: leaving out one would leave the other without a partner."""
    given = [{"prompt": f"Why {n}?", "completion": text, "label": label} for n in (1, 2, 2)
             for text, label in (("Since then.", True), ("Go away.", False))]  # fmt: skip
    section = spec(write_jsonl(tmp_path / "kto.jsonl", given), eval_fraction=0)
    with pytest.raises(RequestError, match=r"these are rated answers: set data\.deduplicate=true"):
        write_fixed(section, load_pairs(section, TOKENIZER).sources[0], tmp_path / "fixed.jsonl")
    assert not (tmp_path / "fixed.jsonl").exists()


def test_fix_keeps_a_row_of_which_a_pair_stays(tmp_path: Path) -> None:
    answers = [{"text": "Since then.", "score": 9}, {"text": "Go.", "score": 2}, {"text": "go.", "score": 1}]
    given = [{"prompt": "Why?", "completions": answers}, {"prompt": "And?", "completions": answers}]
    section = spec(write_jsonl(tmp_path / "scored.jsonl", given), eval_fraction=0, pairing="all")
    source = load_pairs(section, TOKENIZER).sources[0]
    assert len(source.rows) == 6 and not repeats(source.rows, near=True)  # answers of one row are near each other
    fixed = write_fixed(section, source, tmp_path / "fixed.jsonl")
    assert [json.loads(line) for line in Path(fixed["path"]).read_text("utf-8").splitlines()] == given
