"""Plans on screen and as JSON, and fitted recipes as files."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.text import counted, format_gb, visible
from orpo_lite.plan.allocations import PARTS
from orpo_lite.plan.gpus import FITS, NOT, TIGHT
from orpo_lite.plan.predict import PHASES, Plan
from orpo_lite.plan.search import Verdict

SMALL = 5e6
"""Bytes below which a part gets no row of its own."""


def show_plan(console: Console, made: Plan, verbose: bool = True) -> None:
    """Print the parts of a plan's fullest phase; if `verbose`, of every phase, with what it is of and what it assumes."""
    phases = [phase for phase in PHASES if phase in made.phases and (verbose or phase == made.fullest)]
    table = Table("GB (10^9 bytes)", *phases, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        cells = [made.phases[phase][part] for phase in phases]
        if any(size >= SMALL for size in cells):
            table.add_row(part, *(gigabytes(size) if size >= SMALL else "" for size in cells))
    table.add_row("in tensors", *(gigabytes(made.phases[phase].total()) for phase in phases), style="bold")
    console.print(table)
    if verbose:
        facts = {name: value for name, value in made.as_dict().items() if isinstance(value, str)}
        assumed = {f"{name} (assumed)": format_gb(size, 2) for name, size in made.assumed.items()}
        host = {"host while loading (partly assumed)": format_gb(made.load_host, 2)}
        for name, value in (facts | assumed | host).items():
            console.print(f"{name.replace('_', ' ')}: {visible(value)}", markup=False)
        console.print("\n".join(f"assumed: {sentence}" for sentence in made.assumptions), style="dim")


def gigabytes(size: float) -> str:
    """Format bytes for a table's cell."""
    return format_gb(size, 2).removesuffix(" GB")


def show_verdicts(console: Console, made: Plan, verdicts: list[Verdict]) -> None:
    """Print what a recipe needs, which cards it fits, and what would make it fit the others."""
    on, says = escape(visible(made.recipe)), "needs"
    styles = {FITS: "green", TIGHT: "yellow", NOT: "red"}
    if len(verdicts) == 1:
        one = verdicts[0]
        says = f"on {escape(one.card.title)}: [{styles[one.words]}]{one.words}[/], needs"
    console.print(f"{on} {says} [bold]{format_gb(made.needed, 2)}[/] ({format_gb(made.peak, 2)} in tensors)")
    table = Table("GB", "needs", "verdict", "card", box=None)
    remedies: dict[str, list[str]] = {}
    for one in verdicts:
        verdict = f"[{styles[one.words]}]{one.words}[/]"
        table.add_row(f"{one.card.gigabytes:g}", gigabytes(one.plan.needed), verdict, one.card.name)
        if one.words == NOT:
            remedy = "nothing that was tried fits"
            if one.remedy:
                remedy = f"it needs {format_gb(one.remedy.plan.needed, 2)} with {' '.join(one.remedy.words)}"
            remedies.setdefault(remedy, []).append(one.card.name)
    if len(verdicts) > 1:
        console.print(table)
    for one in verdicts:
        if one.chosen:
            how = f"{counted(one.chosen.pairs, 'pair')} of the longest at once, {one.chosen.layers}"
            console.print(
                f"on {one.card.name} auto is {how}: {' '.join(one.chosen.words)}", soft_wrap=True, markup=False
            )
    for words, names in remedies.items():  # below the table, whose wrapped lines could not be copied
        console.print(f"on {', '.join(names)} {words}", soft_wrap=True, markup=False)


def verdict_as_dict(one: Verdict) -> dict[str, Any]:
    """Return a verdict as plain numbers and words."""
    return {
        "card": one.card.name,
        "total_bytes": int(one.card.gigabytes * 1e9),
        "needed_bytes": one.plan.needed,
        "verdict": one.words,
        "chosen": " ".join(one.chosen.words) if one.chosen else None,
        "fits_with": " ".join(one.remedy.words) if one.remedy else None,
        "fits_with_bytes": one.remedy.plan.needed if one.remedy else None,
    }
