"""`orpo-lite pairs MODEL --prompts FILE`: sample answers to prompts, rank them, and write the pairs that training takes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import runpy
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.console import console, load, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import counted, shown
from orpo_lite.evaluate.__main__ import JudgeMaxTokens, JudgeModel, MaxNewTokens, TopP, TrustRemoteCode, check_judge
from orpo_lite.evaluate.answer_file import answer_questions, read_questions
from orpo_lite.recipe import DataSection, DataSource, Recipe
from orpo_lite.recipe.loading import ADDRESS, MODEL_FOLDER, check_folder, check_model_path, is_recipe

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Side, Turns
    from orpo_lite.evaluate.ranking import Scores

Rules = dict[str, Callable[["Turns", str], Any]]
"""Checks of an answer to a prompt, by the option that names each: they return a number, or true or false."""


def command(
    model: Annotated[str, typer.Argument(help="what answers: run, adapter or model folder, hub id, recipe (its base), or the "
                                         "http address of an OpenAI-compatible server")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="prompts: rows, or lines of .txt")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="the .jsonl of pairs to write; answers and scores go beside it")],
    samples: Annotated[int, typer.Option(min=2, help="answers to each prompt")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="of the sampling")] = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="answers generated together")] = 32,
    model_name: Annotated[str, typer.Option("--model-name", metavar="NAME", help="the model's name at the address")] = "",
    must: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="regular expression that a good answer matches; may be repeated")] = None,
    must_not: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="regular expression that a good answer does not match")] = None,
    min_words: Annotated[int | None, typer.Option(help="words that a good answer has at least")] = None,
    max_words: Annotated[int | None, typer.Option(help="words that a good answer has at most")] = None,
    as_json: Annotated[bool, typer.Option("--json-valid", help="a good answer is one JSON value")] = False,
    rule: Annotated[str | None, typer.Option(metavar="FILE.py:FUNCTION", help="your function of the prompt's messages and the "
                                             "answer, which returns a number, or true or false; the file is run")] = None,
    reward_model: Annotated[str | None, typer.Option(metavar="MODEL", help="hub id or folder of a reward model with one score")] = None,
    log_odds: Annotated[str | None, typer.Option(metavar="RUN", help="rank by the log-odds under this run, adapter or model")] = None,
    judge: Annotated[str | None, typer.Option(metavar="MODEL|URL", help="a judge compares answers two at a time, in both orders")] = None,
    judge_model: JudgeModel = None,
    judge_max_tokens: JudgeMaxTokens = 1024,
    you: Annotated[bool, typer.Option("--you", help="you choose the best and the worst answer here, blind")] = False,
    every: Annotated[bool, typer.Option("--every", help="every pair of answers that differ by the margin, not best and worst alone")] = False,
    margin: Annotated[float, typer.Option(min=0, help="least difference of two scores; 0: any")] = 0.0,
    match_length: Annotated[float, typer.Option(min=0, help="the longer answer of a pair has at most so many times the characters "
                                                "of the other, such as 1.25, so that length does not win by itself; 0: any")] = 0.0,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="share of the prompts whose pairs are kept apart for evaluation")] = 0.1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Make preference pairs from prompts: sample answers, rank them, pair the best with the worst."""
    answers = beside(output, "answers")
    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise RequestError(f"--output: found {output}, expected the name of a .jsonl file in a folder that exists")
    if output.exists() and not answers.exists():
        raise RequestError(f"--output: {output} exists, and this command did not write it: give another name")
    rules = find_rules(must or [], must_not or [], min_words, max_words, as_json, rule)
    if not (rules or reward_model or log_odds or judge or you):
        raise RequestError(
            "nothing says which answers are better: give rules (--must, --must-not, --min-words, --max-words, --json-valid, "
            "--rule), --reward-model, --log-odds, --judge or --you; several are added up"
        )
    check_judge(judge, judge_model)
    for option, path in {"": model, "--reward-model": reward_model, "--log-odds": log_odds}.items():
        if path and is_recipe(path):
            check_model_path(Recipe.load(path).model.name_or_path)
        elif path and not path.startswith(ADDRESS):
            check_folder(path, MODEL_FOLDER, field=option)
    if model.startswith(ADDRESS) != bool(model_name):
        raise RequestError(
            f"--model-name: found {model_name or 'none'} for {model}: an address needs it, and nothing else"
        )
    questions = read_questions(prompts)
    if longer := sum(bool(one.turns) for one in questions):
        console.print(f"{counted(longer, 'prompt')} of several turns: the first is answered, the others are left out")
        questions = [type(one)(one.id, one.category, one.prompt, []) for one in questions]
    load("orpo_lite.evaluate.ranking")
    from orpo_lite.evaluate import ranking
    from orpo_lite.evaluate.answering import Sampling, find_sides
    from orpo_lite.evaluate.judge import Endpoint, find_judge

    sampling, rankers = Sampling(max_new_tokens, temperature, top_p), list[Any]()
    remote = model_name and Endpoint(model, model_name, sampling, "MODEL")
    side = remote or find_sides(model, trust_remote_code)[-1]
    if reward_model:
        rankers.append(ranking.reward_model(reward_model, trust_remote_code))
    if log_odds:
        rankers.append(ranking.log_odds(log_odds, trust_remote_code))
    if judge:
        rankers.append(ranking.Comparisons(find_judge(judge, judge_model, judge_max_tokens, trust_remote_code)))
    if you:  # the last, since the user may end before all prompts are rated
        rankers.append(ranking.your_choice())
    try:
        asked = [one for one in questions for _ in range(samples)]
        rows = answer_questions([side], asked, sampling, seed, batch_size, answers)
        vars(side).pop("loaded", None)  # the rankers need its memory
        groups = [Group.of(rows[n : n + samples], held_out) for n in range(0, len(rows), samples)]
        apply_rules(rules, groups)
        for ranker in rankers:
            found = ranker.scores(groups, beside(output, ranker.key))
            if len(found) < len(groups):
                console.print(f"\n{len(found):,} of {counted(len(groups), 'prompt')} rated: pairs are made of these")
            groups = groups[: len(found)]
            for group, scores in zip(groups, found, strict=True):
                group.scores.append(scores)
    except (KeyboardInterrupt, RuntimeError):
        kept = f"what is done is in {answers} and beside it: the same command goes on from there"
        console.print(kept, soft_wrap=True, markup=False)
        raise
    add_up(groups)
    pairs, report = make_pairs(groups, every, margin, match_length)
    files = write(pairs, output, side)
    report |= {"rules": shares(groups, [*rules]), "files": files}
    report["judge"] = next((one.summary for one in rankers if isinstance(one, ranking.Comparisons)), None)
    report["settings"] = {"model": model, "prompts": prompts, "match_length": match_length} | rows[0]["settings"]
    write_atomically(beside(output, "report", ".json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show(report)
    check(side, model, files)


def beside(output: Path, what: str, ending: str = ".jsonl") -> Path:
    """Return the name of a file that belongs to the pairs."""
    return output.with_name(f"{output.stem}.{what}{ending}")


# ---- rules -----------------------------------------------------------------------------------------------------------


def find_rules(
    must: list[str], must_not: list[str], min_words: int | None, max_words: int | None, as_json: bool, function: str | None
) -> Rules:  # fmt: skip
    """Return the rules that the command line names.

    Raises:
        RequestError: a pattern that is no regular expression, or a function that is not there.
    """
    found: Rules = {f"--must {text}": matcher("--must", text, True) for text in must}
    found |= {f"--must-not {text}": matcher("--must-not", text, False) for text in must_not}
    if min_words is not None:
        found[f"--min-words {min_words}"] = lambda _, answer: len(answer.split()) >= min_words
    if max_words is not None:
        found[f"--max-words {max_words}"] = lambda _, answer: len(answer.split()) <= max_words
    if as_json:
        found["--json-valid"] = lambda _, answer: is_json(answer)
    return found | ({f"--rule {function}": find_function(function)} if function else {})


def matcher(option: str, pattern: str, wanted: bool) -> Callable[[Turns, str], bool]:
    """Return a check for a regular expression, searched without regard to case as a recipe's `evaluation.rule` is."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RequestError(f"{option}: {shown(pattern)} is no regular expression ({error}): fix it") from None
    return lambda _, answer: bool(compiled.search(answer)) == wanted


def is_json(text: str) -> bool:
    """Return True for one JSON value and nothing else."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def find_function(place: str) -> Callable[[Turns, str], Any]:
    """Return the function that FILE.py:FUNCTION names; the file is run.

    Raises:
        RequestError: no such file, it fails, or it has no such function.
    """
    file, _, name = place.rpartition(":")
    try:
        found = runpy.run_path(file)[name]
        if not callable(found):
            raise TypeError(f"{name} is {shown(found)}")
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise RequestError(
            f"--rule: found {place}, expected FILE.py:FUNCTION, a function of the prompt's messages and the answer "
            f"({type(error).__name__}: {error})"
        ) from error
    return found


def apply_rules(rules: Rules, groups: list[Group]) -> None:
    """Set what the rules give to each answer: 1 where one is kept and 0 where not, or a number.

    Raises:
        RequestError: the user's function fails, or returns no finite number.
    """

    def points(row: int, group: Group, answer: str, name: str) -> float:
        try:
            found = rules[name](copy.deepcopy(group.prompt), answer)  # which it may change
            if not isinstance(found, int | float | np.number | np.bool_) or not math.isfinite(found):
                raise TypeError(f"it returns {shown(found)}, expected a number, or true or false")
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            place = f"row {row} of the prompts" + f" (id {group.id})" * (group.id != str(row))
            raise RequestError(
                f"{name} fails at {place}, on the answer {shown(answer)} ({type(error).__name__}: {error}): fix it, and give the "
                "same command again, which samples nothing twice"
            ) from error
        return float(found)

    for row, group in enumerate(groups, 1):
        group.kept = [[points(row, group, answer, name) for name in rules] for answer in group.answers]


# ---- pairing ---------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """The different answers to one prompt that can be part of a pair."""

    id: str
    prompt: Turns
    answers: list[str]
    left_out: Counter[str]
    """Why others are not among them, and how many."""
    held_out: bool
    kept: list[list[float]] = field(default_factory=list)
    """Points by answer and rule."""
    scores: list[Scores] = field(default_factory=list)
    """Scores by ranker and answer."""
    totals: list[float] = field(default_factory=list)
    """The score of each answer by all rules and rankers together."""

    @classmethod
    def of(cls, rows: list[dict[str, Any]], share: float) -> Group:
        """Leave out answers that are empty, cut by a limit or repeated; hold a share of all prompts out.

        Args:
            rows: of the file of answers, all of one prompt.
        """
        answers, left, prompt = list[str](), Counter[str](), rows[0]["prompt"]
        for row in rows:
            [[text]], [[ended]] = row["answers"].values(), row["ended"].values()
            unfit = {"empty": not text.strip(), "cut at --max-new-tokens": not ended, "repeated": text in answers}
            why = [reason for reason, found in unfit.items() if found][:1]
            answers += [] if why else [text]
            left.update(why)
        # by the prompt alone, so that it stays on its side in the next round
        place = int(hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:12], 16) / 16**12
        return cls(rows[0]["id"], prompt, answers, left, place < share)


def add_up(groups: list[Group]) -> None:
    """Leave out answers that a ranker could not score, and set the totals of the others.

    What rules give counts as it is, and so do the scores of a ranker alone. Scores of a ranker beside others count as the share of
    the prompt's other answers that each is better than, so that no scale outweighs another.
    """
    for group in groups:
        scores, places = list[Any](group.scores), range(len(group.answers))
        fit = [n for n in places if all(each[n] is not None and math.isfinite(each[n]) for each in scores)]
        group.left_out["not scored"] += len(group.answers) - len(fit)
        group.answers, group.kept = [group.answers[n] for n in fit], [group.kept[n] for n in fit]
        scores = [[each[n] for n in fit] for each in scores]
        points = scores if len(scores) == 1 and not any(group.kept) else [*map(beaten, scores)]
        group.totals = [sum(each) for each in zip(map(sum, group.kept), *points, strict=True)]


def beaten(values: list[Any]) -> list[float]:
    """Return for each value the share of the others that are smaller; equal ones count half."""
    others = max(1, len(values) - 1)
    return [(sum((one > other) + (one == other) / 2 for other in values) - 0.5) / others for one in values]


def make_pairs(
    groups: list[Group], every: bool, margin: float, match_length: float
) -> tuple[list[tuple[Group, str, str]], dict[str, Any]]:
    """Pair answers, (better, worse), and count what was made, what was not and why.

    Raises:
        RequestError: no prompt has answers of different scores.
    """

    def pick(group: Group, match: float) -> list[tuple[str, str]]:
        """Return all pairs, or the one whose scores differ most, and of these the nearest in length."""
        scored = list(zip(group.totals, group.answers, strict=True))
        # rounded, since 0.3 - 0.1 is less than 0.2
        ways = [(-gap, abs(len(a) - len(b)), a, b) for high, a in scored for low, b in scored
                if (gap := round(high - low, 9)) > 0 and gap >= margin
                and (not match or max(len(a), len(b)) <= match * min(len(a), len(b)))]  # fmt: skip
        return [(a, b) for *_, a, b in sorted(ways)[: None if every else 1]]

    pairs, any_length, without = [], [], Counter[str]()
    for group in groups:
        free, found = pick(group, 0), pick(group, match_length)
        any_length += free
        pairs += [(group, *two) for two in found]
        if not found:
            why = "fewer than two different answers" if len(group.answers) < 2 else "no two scores differ enough"
            without["no two answers of similar length" if free else why] += 1
    left_out = sum((group.left_out for group in groups), Counter[str]())
    if all(group.held_out for group, *_ in pairs):
        told = [f"{counted(count, 'prompt')}: {reason}" for reason, count in without.items()]
        told += [f"{counted(count, 'answer')}: {reason}" for reason, count in left_out.items()]
        why = "; ".join(told + ["the pairs that were made are of held-out prompts"] * bool(pairs))
        raise RequestError(
            f"no pair could be made ({why or 'no prompt is rated'}): sample more answers (--samples, --temperature) or longer ones "
            "(--max-new-tokens), or take a rule that some of them keep and others do not, a smaller --margin, a wider --match-length"
        )

    def longer(found: list[Any]) -> float:
        """Return the share whose better answer is the longer one; equal lengths count half."""
        return float(np.mean([(len(a) > len(b)) + (len(a) == len(b)) / 2 for *_, a, b in found]))

    return pairs, {
        "prompts": len(groups),
        "answers": sum(len(group.answers) for group in groups),
        "left_out": dict(left_out),
        "histogram": histogram([total for group in groups for total in group.totals]),
        "prompts_without_a_pair": dict(without),
        "longer_chosen": {"any length": longer(any_length), "written": longer(pairs)},
    }


def histogram(values: list[float], bins: int = 8) -> list[tuple[float, float, int]]:
    """Count scores, each value where there are few of them, else in bins of equal width: (from, to, how many)."""
    if len(known := Counter(values)) <= bins:
        return [(value, value, known[value]) for value in sorted(known)]
    counts, edges = np.histogram(values, bins)
    return [(float(low), float(high), int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def shares(groups: list[Group], rules: list[str]) -> dict[str, list[float]]:
    """Return what each rule, and all of them together, give on average to all answers and to those to held-out prompts."""
    parts = (groups, [group for group in groups if group.held_out])
    tables = [np.array([each for group in part for each in group.kept]) for part in parts if part]
    found = {rule: [float(table[:, n].mean()) for table in tables] for n, rule in enumerate(rules)}
    if len(rules) > 1:
        found["all rules"] = [float((table > 0).all(1).mean()) for table in tables]
    return found


def write(pairs: list[tuple[Group, str, str]], output: Path, side: Side) -> dict[str, int]:
    """Write the pairs, those of held-out prompts to a file of their own; return the files with their numbers of pairs."""
    parts: dict[Path, list[str]] = {output: [], beside(output, "held-out"): []}
    for group, better, worse in pairs:
        line = json.dumps(side.format.row(group.prompt, better, worse), ensure_ascii=False)
        parts[beside(output, "held-out") if group.held_out else output].append(line + "\n")
    for file, lines in parts.items():
        write_atomically(file, "".join(lines))
    return {str(file): len(lines) for file, lines in parts.items()}


def show(report: dict[str, Any]) -> None:
    """Print how many pairs were made, of what, and how much length has to do with it."""
    from orpo_lite.evaluate.judge import show_unparsable

    console.print(f"\n{counted(report['answers'], 'answer')} to {counted(report['prompts'], 'prompt')}", style="bold")
    for why, count in report["left_out"].items():
        console.print(f"left out: {count:,} {why}")
    table = Table("rule kept", "by all answers", "to held-out prompts", box=None)
    for name, values in report["rules"].items():
        table.add_row(escape(name), *(f"{one:.0%}" if 0 <= one <= 1 else f"{one:.3g}" for one in values))
    if report["rules"]:
        console.print(table)
    if found := report["judge"]:
        told = found["wins"] + found["ties"] + found["losses"] - found["identical"]
        agreed = (told - found["inconsistent"]) / max(1, told)
        console.print(f"the judge says the same in both orders of {agreed:.0%} of {told:,} comparisons")
        show_unparsable(found)
    console.print("answers by score")
    most = max(count for *_, count in report["histogram"])
    for low, high, count in report["histogram"]:
        name = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        console.print(f"  {name:>16} {'█' * round(30 * count / most)} {count:,}")
    for why, count in report["prompts_without_a_pair"].items():
        console.print(f"{counted(count, 'prompt')} without a pair: {why}")
    before, after = report["longer_chosen"].values()
    unmatched = f" ({before:.0%} without --match-length)" if report["settings"]["match_length"] else ""
    console.print(f"the answer of more characters is the chosen one in {after:.0%} of the pairs{unmatched}")
    (train, count), (apart, held) = report["files"].items()
    made = f"{counted(count, 'pair')} in {train}" + f", {held:,} of held-out prompts in {apart}" * bool(held)
    console.print(made, style="bold", soft_wrap=True, markup=False)


def check(side: Side, word: str, files: dict[str, int]) -> None:
    """Print what `orpo-lite data` finds in the pairs, and the command that trains on them from where the model stands."""
    from orpo_lite.data import load_pairs
    from orpo_lite.data.__main__ import print_report
    from orpo_lite.data.quality import inspect

    source = side.source
    data = dict(zip(("train", "eval"), [file for file, count in files.items() if count], strict=False))
    if not word.startswith(ADDRESS):
        train, held = [DataSource(path=data["train"])], [DataSource(path=data["eval"])] if "eval" in data else None
        section = source.recipe.data if source.recipe else DataSection(train=train)
        section = section.model_copy(update={"train": train, "eval": held, "eval_fraction": 0.0})
        pairs = load_pairs(section, side.tokenizer)
        print_report(pairs.report, pairs.shapes, pairs, [], False, False, inspect(pairs.sources, side.tokenizer), None)
    start = {"adapter": "adapter.init_from", "fine-tuned": "model.name_or_path"}.get(source.kind)
    words = [f"data.{name}={file}" for name, file in data.items()] + [f"{start}={source.path}"] * bool(start)
    if source.recipe:
        command = ["train", "--recipe", word if source.kind == "model" else source.path, *words]
    else:
        base = "MODEL" if word.startswith(ADDRESS) else source.model.name_or_path
        command = ["new", data["train"], *words[1:], "--model", base]
    console.print(f"\nnext: {shlex.join(['orpo-lite', *command])}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command(command)
