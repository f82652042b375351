"""`orpo-lite data`: show counts, drops, lengths and decoded examples of the data that a recipe trains on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from orpo_lite.common.console import console, load, run_command
from orpo_lite.common.text import counted, next_command, visible
from orpo_lite.data import DropReport, Pairs, Shapes, TooManyDropped, load_pairs, pair_lengths
from orpo_lite.data.lengths import answer_tokens
from orpo_lite.data.quality import Finding, inspect
from orpo_lite.data.repair import check_target, write_fixed
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")


def command(
    recipe: Annotated[str, RECIPE_OPTION],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    examples: Annotated[int, typer.Option(min=0, help="decoded training pairs to show")] = 2,
    list_drops: Annotated[bool, typer.Option("--list-drops", help="list every dropped row and why")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    fix: Annotated[Path | None, typer.Option(metavar="FILE", help="write the rows without those that repeat, contradict "
                   "others or cannot be used to a new .jsonl file, and a list of these")] = None,
) -> None:  # fmt: skip
    """Show what a recipe will be trained on: counts, drops, quality, token lengths, decoded examples."""
    resolved = Recipe.load(recipe, overrides or [])
    if fix:
        check_target(resolved.data, fix)
    load("orpo_lite.model")
    from orpo_lite.model import load_tokenizer
    from orpo_lite.model.tokenizer import check_variables

    tokenizer = load_tokenizer(resolved.model, resolved.adapter and resolved.adapter.init_from)
    check_variables(tokenizer, resolved.data.template_kwargs, "data.template_kwargs")
    try:
        pairs = load_pairs(resolved.data, tokenizer)
    except TooManyDropped as error:
        # show the counts before the error, which sets the exit status
        fixed = write_fixed(resolved.data, error.sources[0], fix) if fix and error.sources[0].report.kept else None
        print_report(error.report, error.shapes, None, [], list_drops, as_json, [], fixed)
        if fixed:
            return
        raise
    shown = [example(pairs.train[n], tokenizer) for n in range(min(examples, len(pairs.train)))]
    fixed = write_fixed(resolved.data, pairs.sources[0], fix) if fix else None
    findings = inspect(pairs.sources, tokenizer)
    print_report(pairs.report, pairs.shapes, pairs, shown, list_drops, as_json, findings, fixed)
    words, name = overrides or [], "train"
    if fixed:
        words, name = [*(word for word in words if not word.startswith("data.train=")), f"data.train={fix}"], "data"
    if not as_json:
        console.print(f"\nnext: {next_command(name, '--recipe', recipe, *words)}", soft_wrap=True, markup=False)


def print_report(
    report: DropReport,
    shapes: Shapes,
    pairs: Pairs | None,
    shown: list[dict[str, Any]],
    list_drops: bool,
    as_json: bool,
    findings: list[Finding],
    fixed: dict[str, Any] | None,
) -> None:
    """Print what was read, as tables or as JSON: `report` and `shapes` of `pairs`, which are None if they cannot be used."""
    if as_json:
        checked = {"quality": [one._asdict() for one in findings if one.pairs], "fixed": fixed}
        print(json.dumps(as_content(report, shapes, pairs, list_drops) | {"examples": shown} | checked, indent=1))
        return
    console.print(sources_table(report, shapes), "")
    if report.drops:
        console.print(drops_table(report), "")
    for drop in report.drops if list_drops else ():
        line = f"{drop.source}, row {drop.row}: {drop.reason}: {drop.detail}"
        console.print(Text(visible(line).replace("\n", " ")), soft_wrap=True)
    remarks = [line for line in report.remarks() if not (fixed and "--fix FILE" in line)]
    for line in remarks + [str(one) for one in findings if one.pairs]:
        console.print(Text(visible(line)))
    if clean := [one.name for one in findings if not one.pairs]:
        console.print(f"checked, nothing found: {', '.join(clean)}", style="dim")
    if fixed:
        why = ", ".join(f"{count:,} {reason}" for reason, count in fixed["left_out"].items()) or "none"
        line = f"wrote {counted(fixed['written'], 'row')} to {fixed['path']}, and to {fixed['changes']} those left out: {why}"
        console.print(Text(visible(line)), soft_wrap=True)
    if not pairs:
        return
    held = f", {len(pairs.eval):,} held out" if pairs.eval is not None else ", none held out"
    console.print(f"{counted(len(pairs.train), 'pair')} to train on{held}\n", style="bold")
    table = Table("tokens", "median", "p95", "max", box=None)
    for part, tokens in pair_lengths(pairs.train).items():
        table.add_row(part, *(f"{summary(tokens)[name]:,.0f}" for name in ("median", "p95", "max")))
    console.print(table)
    if shown:
        marks = (". prompt, no label   ", "dim"), ("+ chosen label   ", "green"), ("- rejected label   ", "red")
        console.print(Text.assemble("\n", *marks, "⏎ line break"))
    for number, pair in enumerate(shown, 1):
        console.print("", example_text(number, pair), soft_wrap=True)


def as_content(report: DropReport, shapes: Shapes, pairs: Pairs | None, list_drops: bool) -> dict[str, Any]:
    """Return what was read as plain values."""
    splits = {"train": pairs.train, "eval": pairs.eval} if pairs else {}
    splits = {name: rows for name, rows in splits.items() if rows is not None}
    return {
        "sources": shapes,
        "report": report.as_dict(rows=list_drops),
        "pairs": {name: len(rows) for name, rows in splits.items()},
        "lengths": {name: {k: summary(v) for k, v in pair_lengths(rows).items()} for name, rows in splits.items()},
        "fingerprint": pairs.fingerprint if pairs else None,
    }


def sources_table(report: DropReport, shapes: Shapes) -> Table:
    """Return pairs kept and rows dropped of each source."""
    table = Table(box=None)
    for name in ("source", "for", "shape of its rows"):
        table.add_column(name, overflow="fold")
    for name in ("pairs", "dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in shapes.items():
        words = map(Text, (visible(name), one["section"], one["shape"]))
        table.add_row(*words, f"{one['kept']:,}", f"{one['rows'] - one['kept']:,}")
    if len(shapes) > 1:
        table.add_row("all", "", "", f"{report.kept:,}", f"{len(report.drops):,}")
    return table


def drops_table(report: DropReport) -> Table:
    """Return dropped rows by reason, with the first rows of each."""
    table = Table("dropped", "rows", "share", "first rows, from 0", box=None)
    for reason, count in report.dropped.items():
        rows = [str(drop.row) for drop in report.drops if drop.reason == reason]
        places = ", ".join(rows[:8]) + ", ..." * (count > 8)
        table.add_row(reason, f"{count:,}", f"{count / report.rows:.1%}", places)
    return table


def summary(tokens: np.ndarray) -> dict[str, float]:
    """Return median, 95th percentile, maximum and sum of token counts."""
    if not len(tokens):
        return {"median": 0, "p95": 0, "max": 0, "sum": 0}
    middle, high = (float(value) for value in np.percentile(tokens, [50, 95]))
    return {"median": middle, "p95": high, "max": int(tokens.max()), "sum": int(tokens.sum())}


def example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return one pair decoded: the prompt, as it precedes the chosen answer, and both completions in runs of [is label, text]."""
    prompt, decoded, tokens = row["chosen_ids"][: row["chosen_start"]], {}, {}
    for side in SIDES:
        ids, answers = row[f"{side}_ids"], answer_tokens(row, side)
        runs = itertools.groupby(range(row[f"{side}_start"], len(ids)), answers.__contains__)
        decoded[side] = [(labeled, tokenizer.decode([ids[place] for place in run])) for labeled, run in runs]
        tokens[side] = len(answers)
    about = {"source": row["source"], "row": row["row"], "tokens": {"prompt": len(prompt), **tokens}}
    return about | {"prompt": tokenizer.decode(prompt)} | decoded


def example_text(number: int, pair: dict[str, Any]) -> Group:
    """Return the pair with a mark before each line: . prompt (no label), + chosen label, - rejected label."""
    tokens = pair["tokens"]
    title = (
        f"example {number}: row {pair['row']} of source {pair['source']}: {tokens['prompt']} prompt, "
        f"{tokens['chosen']} chosen and {tokens['rejected']} rejected tokens"
    )
    parts = [Text(title, style="bold"), marked("prompt   .", pair["prompt"], "dim")]
    for side, mark, style in (("chosen", "chosen   +", "green"), ("rejected", "rejected -", "red")):
        for labeled, text in pair[side]:
            parts.append(marked(mark, text, style) if labeled else marked("context  .", text, "dim"))
    return Group(*parts)


def marked(mark: str, text: str, style: str) -> Text:
    """Return the text with the mark before each line."""
    lines = visible(text).replace("\n", "⏎\n").split("\n")
    return Text("\n").join(Text.assemble((f"{mark} ", "bold"), (line, style)) for line in lines)


if __name__ == "__main__":
    run_command(command)
