"""`orpo-lite pairs MODEL --prompts FILE`: sample answers to prompts, rank them, and write the pairs that training takes."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.console import console, load, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import counted
from orpo_lite.evaluate.__main__ import JudgeMaxTokens, JudgeModel, MaxNewTokens, TopP, TrustRemoteCode

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Side
    from orpo_lite.evaluate.ranking import Group, Ranker
    from orpo_lite.trainer.generate import Sampling

BINS = 8
"""Of the histogram of scores."""


def command(
    model: Annotated[str, typer.Argument(help="what answers: run, adapter or model folder, hub id, recipe (its base), or the "
                                         "http address of an OpenAI-compatible server")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="prompts: rows, or lines of .txt")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="the .jsonl of pairs to write; answers and scores go beside it")],
    samples: Annotated[int, typer.Option(min=2, help="answers to each prompt")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="of the sampling")] = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Annotated[int, typer.Option(help="of the sampling, and of the order in which answers are compared")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="answers generated together")] = 32,
    model_name: Annotated[str, typer.Option("--model-name", metavar="NAME", help="the model's name at the address")] = "",
    must: Annotated[list[str] | None, typer.Option(help="regular expression that a good answer matches; may be repeated")] = None,
    must_not: Annotated[list[str] | None, typer.Option(help="regular expression that a good answer does not match")] = None,
    min_words: Annotated[int | None, typer.Option(help="words that a good answer has at least")] = None,
    max_words: Annotated[int | None, typer.Option(help="words that a good answer has at most")] = None,
    as_json: Annotated[bool, typer.Option("--json-valid", help="a good answer is one JSON value")] = False,
    rule: Annotated[str | None, typer.Option(metavar="FILE.py:FUNCTION", help="your function of the prompt's messages and the "
                                             "answer, which returns a number, or true or false; the file is run")] = None,
    reward_model: Annotated[str | None, typer.Option(help="hub id or folder of a reward model with one score")] = None,
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
    if judge_model and not judge:
        raise RequestError("--judge-model names a model at an address: give the address with --judge URL")
    load("orpo_lite.evaluate.ranking")
    from orpo_lite.evaluate import ranking
    from orpo_lite.evaluate.answer_file import answer_questions, read_questions
    from orpo_lite.evaluate.judge import find_judge
    from orpo_lite.trainer.generate import Sampling

    rankers: list[Ranker] = [*ranking.find_rules(must or [], must_not or [], min_words, max_words, as_json, rule)]
    rules = len(rankers)
    if reward_model:
        rankers.append(ranking.RewardModel(reward_model, trust_remote_code))
    if log_odds:
        rankers.append(ranking.LogOdds(log_odds, trust_remote_code))
    if judge:
        rankers.append(ranking.Judge(find_judge(judge, judge_model, judge_max_tokens, trust_remote_code), seed))
    if you:  # the last, since the user may end before all prompts are rated
        rankers.append(ranking.You(seed))
    if not rankers:
        raise RequestError(
            "nothing says which answers are better: give rules (--must, --must-not, --min-words, --max-words, --json-valid, "
            "--rule), --reward-model, --log-odds, --judge or --you; several are added up"
        )
    questions, sampling = read_questions(prompts), Sampling(max_new_tokens, temperature, top_p)
    if longer := sum(bool(one.turns) for one in questions):
        console.print(f"{counted(longer, 'prompt')} of several turns: the first is answered, the others are left out")
        questions = [type(one)(one.id, one.category, one.prompt, []) for one in questions]
    side = find_side(model, model_name, sampling, trust_remote_code)
    try:
        asked = [one for one in questions for _ in range(samples)]
        rows = answer_questions([side], asked, sampling, seed, batch_size, answers)
        vars(side).pop("loaded", None)  # the rankers need its memory
        groups = [ranking.Group.of(rows[n : n + samples], held_out) for n in range(0, len(rows), samples)]
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
    add_up(groups, rules)
    pairs, report = make_pairs(groups, every, margin, match_length)
    files = write(pairs, output, side)
    report |= {"rules": shares(groups, rankers[:rules]), "files": files}
    report["judge"] = next((one.summary for one in rankers if isinstance(one, ranking.Judge)), None)
    report["settings"] = {"model": model, "prompts": prompts, "match_length": match_length} | rows[0]["settings"]
    write_atomically(beside(output, "report", ".json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show(report)
    check(side, model, files)


def beside(output: Path, what: str, ending: str = ".jsonl") -> Path:
    """Return the name of a file that belongs to the pairs."""
    return output.with_name(f"{output.stem}.{what}{ending}")


def find_side(word: str, name: str, sampling: Sampling, trust_remote_code: bool) -> Side:
    """Find what answers: an address, the base of a recipe, or what `find_sides` takes.

    Raises:
        RequestError: there is no such model, or an address without the model's name.
    """
    from orpo_lite.evaluate.answering import Side, find_sides
    from orpo_lite.evaluate.judge import RemoteSide
    from orpo_lite.evaluate.loading import ModelSource
    from orpo_lite.recipe import Recipe
    from orpo_lite.recipe.loading import shipped_recipes

    remote = word.startswith(("http://", "https://"))
    if remote != bool(name):
        raise RequestError(f"--model-name: found {name or 'none'} for {word}, expected the model's name at an address")
    if remote:
        return RemoteSide(word, name, sampling)
    if word.endswith((".yaml", ".yml")) or word in shipped_recipes():
        recipe = Recipe.load(word)
        return Side("base", ModelSource(recipe.model.name_or_path, "model", recipe.model, recipe=recipe))
    return find_sides(word, trust_remote_code)[-1]


def add_up(groups: list[Group], rules: int) -> None:
    """Leave out answers that a ranker could not score, and set the totals of the others.

    What rules give counts as it is, and so do the scores of a single ranker. Scores of a model beside others count as the share of
    the prompt's other answers that each is better than, so that no scale outweighs another.

    Args:
        rules: how many of the rankers are rules; they come first.
    """
    for group in groups:
        kept = [place for place, each in enumerate(zip(*group.scores, strict=True)) if None not in each]
        group.left_out["not scored"] += len(group.answers) - len(kept)
        group.answers = [group.answers[place] for place in kept]
        group.scores = [[each[place] for place in kept] for each in group.scores]
        models = group.scores[rules:]
        points = group.scores[:rules] + (models if len(group.scores) == 1 else [*map(beaten, models)])
        group.totals = [sum(each) for each in zip(*points, strict=True)]


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
        ways = [(low - high, abs(len(a) - len(b)), a, b) for high, a in scored for low, b in scored
                if high > low and high - low >= margin and (not match or max(len(a), len(b)) <= match * min(len(a), len(b)))]  # fmt: skip
        return [(a, b) for *_, a, b in sorted(ways)[: None if every else 1]]

    pairs, any_length, without = [], [], Counter[str]()
    for group in groups:
        free, found = pick(group, 0), pick(group, match_length)
        any_length += free
        pairs += [(group, *two) for two in found]
        if not found:
            why = "fewer than two different answers" if len(group.answers) < 2 else "no two scores differ enough"
            without["no two answers of similar length" if free else why] += 1
    if all(group.held_out for group, *_ in pairs):
        why = (
            ", ".join(f"{counted(count, 'prompt')}: {reason}" for reason, count in without.items())
            or "all are held out"
        )
        raise RequestError(
            f"no pair could be made ({why}): sample more answers (--samples, --temperature), or take a rule that some of them "
            "keep and others do not, a smaller --margin, a wider --match-length"
        )

    def longer(found: list[Any]) -> float:
        """Return the share whose better answer is the longer one; equal lengths count half."""
        return float(np.mean([(len(a) > len(b)) + (len(a) == len(b)) / 2 for *_, a, b in found]))

    return pairs, {
        "prompts": len(groups),
        "answers": sum(len(group.answers) for group in groups),
        "left_out": dict(sum((group.left_out for group in groups), Counter())),
        "histogram": histogram([total for group in groups for total in group.totals]),
        "prompts_without_a_pair": dict(without),
        "longer_chosen": {"any length": longer(any_length), "written": longer(pairs)},
    }


def histogram(values: list[float]) -> list[tuple[float, float, int]]:
    """Count scores, each value where there are few of them, else in bins of equal width: (from, to, how many)."""
    if len(known := Counter(values)) <= BINS:
        return [(value, value, known[value]) for value in sorted(known)]
    counts, edges = np.histogram(values, BINS)
    return [(float(low), float(high), int(count)) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def shares(groups: list[Group], rules: list[Ranker]) -> dict[str, list[float]]:
    """Return what each rule, and all of them together, give on average to all answers and to those to held-out prompts."""
    parts = [[each for group in part for each in zip(*group.scores, strict=True)]
             for part in (groups, [group for group in groups if group.held_out])]  # fmt: skip
    found = {
        rule.name: [float(np.mean([each[n] for each in part])) for part in parts if part]
        for n, rule in enumerate(rules)
    }
    if len(rules) > 1:
        found["all rules"] = [float(np.mean([min(each[: len(rules)]) > 0 for each in part])) for part in parts if part]
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
    console.print(f"the longer answer is the chosen one in {after:.0%} of the pairs{unmatched}")
    if not unmatched and not 0.3 <= after <= 0.7:
        console.print("so length alone tells most pairs apart, and is learned first; --match-length 1.25 keeps it out")
    (train, count), (apart, held) = report["files"].items()
    made = f"{counted(count, 'pair')} in {train}, {held:,} of held-out prompts in {apart}"
    console.print(made, style="bold", soft_wrap=True, markup=False)


def check(side: Side, word: str, files: dict[str, int]) -> None:
    """Print what `orpo-lite data` finds in the pairs, and the command that trains on them from where the model stands."""
    from orpo_lite.data import load_pairs
    from orpo_lite.data.__main__ import print_report
    from orpo_lite.data.quality import inspect
    from orpo_lite.evaluate.judge import RemoteSide
    from orpo_lite.recipe import Recipe

    source, remote = side.source, isinstance(side, RemoteSide)
    data = {section: file for section, file in zip(("train", "eval"), files, strict=True) if files[file]}
    start = {"adapter": "adapter.init_from", "fine-tuned": "model.name_or_path"}.get(source.kind)
    words = [f"data.{section}={file}" for section, file in data.items()] + [f"{start}={source.path}"] * bool(start)
    if source.recipe:
        name = word if source.kind == "model" else source.path
        recipe, command = Recipe.load(name, words), ["train", "--recipe", name, *words]
    else:
        base = "MODEL" if remote else source.model.name_or_path
        content = {"name": "pairs", "model": source.model.model_dump(), "data": {"eval_fraction": 0} | data}
        recipe, command = Recipe.parse(content), ["new", data["train"], *words[1:], "--model", base]
    if not remote:
        pairs = load_pairs(recipe.data, side.tokenizer)
        print_report(pairs.report, pairs.shapes, pairs, [], False, False, inspect(pairs.sources, side.tokenizer), None)
    console.print(f"\nnext: {shlex.join(['orpo-lite', *command])}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command(command)
