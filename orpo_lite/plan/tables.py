"""Plans on screen and as JSON, and fitted recipes as files."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.text import format_gb, visible
from orpo_lite.plan.allocations import PARTS
from orpo_lite.plan.gpus import FITS, NOT, TIGHT
from orpo_lite.plan.predict import PHASES, Plan
from orpo_lite.plan.search import Verdict

SMALL = 5e6
"""Bytes below which a part gets no row of its own."""


# ---- one plan --------------------------------------------------------------------------------------------------------


def show_plan(console: Console, made: Plan) -> None:
    """Print a plan by phase and part, and what it assumes."""
    console.print(facts_table(made))
    phases = [phase for phase in PHASES if phase in made.phases]
    table = numbers_table("GB (10^9 bytes)", phases)
    for part in PARTS:
        cells = [made.phases[phase][part] for phase in phases]
        if any(size >= SMALL for size in cells):
            table.add_row(part, *(gigabytes(size) if size >= SMALL else "" for size in cells))
    totals = [f"[bold]{gigabytes(made.phases[phase].total())}[/]" for phase in phases]
    table.add_row("[bold]in tensors[/]", *totals)
    console.print(table)
    console.print("layer recompute: what one layer holds while it is computed, the first time or again", style="dim")
    for name, size in made.assumed.items():
        console.print(f"{name}: {format_gb(size, 2)} (assumed)")
    console.print(
        f"[bold]peak {format_gb(made.peak, 2)} in tensors, in the {made.fullest} phase; {format_gb(made.needed, 2)} with "
        "everything assumed[/]"
    )
    paged = format_gb(made.facts["optimizer on the host"], 2)
    console.print(f"host: {format_gb(made.load_host, 2)} while loading; {paged} of paged optimizer states")
    for sentence in made.assumptions:
        console.print(f"assumed: {sentence}", style="dim")


def facts_table(made: Plan) -> Table:
    """List what was planned: model, device, micro-batch and settings."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    device = "the CPU"
    if made.target.kind != "cpu":
        device = "CUDA, with the kernels of compute capability {}.{}".format(*made.target.capability)
    for name, text in (
        ("recipe", made.recipe),
        ("model", f"{made.model}, {made.facts['parameters']:,} parameters, {made.facts['trained']:,} trained"),
        ("on", f"{device}, {made.dtype}"),
        ("micro-batch", made.shape.why),
        ("layout", f"{made.layout} ({made.layout_why})"),
        ("checkpointing", made.recomputed),
        ("optimizer", made.optimizer),
    ):
        table.add_row(name, escape(visible(text)))
    return table


def gigabytes(size: float) -> str:
    """Format bytes for a table's cell."""
    return format_gb(size, 2).removesuffix(" GB")


def numbers_table(first: str, columns: list[str]) -> Table:
    """Make a table whose columns but the first are aligned right."""
    table = Table(first, *columns, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


# ---- cards -----------------------------------------------------------------------------------------------------------


def show_cards(console: Console, verdicts: list[Verdict]) -> None:
    """Print which cards a recipe fits, and what would make it fit the others."""
    table = Table("GB", "needs", "verdict", "card", box=None)
    remedies: dict[str, list[str]] = {}
    for one in verdicts:
        style = {FITS: "green", TIGHT: "yellow"}.get(one.words, "red")
        verdict = f"[{style}]{one.words}[/]"
        table.add_row(f"{one.card.gigabytes:g}", gigabytes(one.plan.needed), verdict, one.card.name)
        if one.words == NOT:
            remedy = "nothing that was tried fits"
            if one.remedy:
                remedy = f"it needs {format_gb(one.remedy.plan.needed, 2)} with {' '.join(one.remedy.words)}"
            remedies.setdefault(remedy, []).append(one.card.name)
    console.print(table)
    for one in verdicts:
        if one.chosen:
            how = f"{one.chosen.pairs} of the longest pairs at once, {one.chosen.checkpointing} layers checkpointed"
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
