"""Plans on the screen, as JSON and as the recipes' table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.text import visible
from orpo_lite.plan.allocations import PARTS
from orpo_lite.plan.gpus import CARDS, FITS, NOT, SHOWN, TIGHT, Card, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.multi_gpu import SpreadPlan
from orpo_lite.plan.picture import gigabytes
from orpo_lite.plan.predict import PHASES, Plan
from orpo_lite.plan.remedies import Planner, Verdict
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import shipped_recipes

BEGIN, END = "<!-- plan: begin (python -m orpo_lite.plan --all-recipes) -->", "<!-- plan: end -->"


def plan(console: Console, made: Plan) -> None:
    """The plan by phase and part, with its assumptions named as such."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    trained, whole = made.facts["trained"], made.facts["parameters"]
    device = (
        "the CPU"
        if made.target.kind == "cpu"
        else "CUDA, kernels of compute capability {}.{} {}".format(
            *made.target.capability, "and later" if made.target.capability >= (8, 0) else "and before"
        )
    )
    for name, text in (
        ("recipe", made.recipe),
        ("model", f"{made.model}, {whole:,} parameters, {trained:,} trained"),
        ("on", f"{device}, {made.dtype}" + (f"; one of {made.spread}" if isinstance(made, SpreadPlan) else "")),
        ("micro-batch", made.shape.why),
        ("layout", f"{made.layout} ({made.layout_why})"),
        ("checkpointing", made.recomputed),
        ("optimizer", made.optimizer),
    ):
        facts.add_row(name, escape(visible(text)))
    console.print(facts)
    phases = [phase for phase in PHASES if phase in made.phases]
    table = Table("GB (10^9 bytes)", *phases, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        cells = [made.phases[phase][part] for phase in phases]
        if any(size >= 5e6 for size in cells):
            table.add_row(part, *(gigabytes(size) if size >= 5e6 else "" for size in cells))
    totals = [gigabytes(made.phases[phase].total()) for phase in phases]
    table.add_row(
        "[bold]in tensors[/]",
        *(f"[bold]{t}[/]" if p == made.fullest else t for p, t in zip(phases, totals, strict=True)),
    )
    console.print(table)
    console.print("layer recompute: what one layer holds while it is computed, the first time or again", style="dim")
    for name, size in made.assumed.items():
        console.print(f"{name}: {gigabytes(size)} GB (assumed)")
    console.print(
        f"[bold]peak {gigabytes(made.peak)} GB in tensors, in the {made.fullest} phase; {gigabytes(made.needed)} GB with what "
        "is assumed[/]"
    )
    host = f"host: {gigabytes(made.load_host)} GB while loading"
    paged = made.facts["optimizer on the host"]
    console.print(host + (f", {gigabytes(paged)} GB of paged optimizer states" if paged else ""))
    for sentence in made.assumptions:
        if sentence.startswith("CUDA context"):  # the lines above
            continue
        console.print(f"assumed: {sentence}", style="dim")


def cards(console: Console, verdicts: list[Verdict]) -> None:
    """Which cards it fits, and what would make it fit the others; cards that come to the same stand together."""
    table = Table("GB", "needs", "verdict", box=None)
    table.add_column("cards", overflow="fold")
    groups: dict[tuple[str, str, str], list[str]] = {}
    remedies: dict[str, list[str]] = {}
    for one in verdicts:
        row = (f"{one.card.gigabytes:g}", gigabytes(one.plan.needed), one.words)
        groups.setdefault(row, []).append(one.card.name)
        if one.remedy is not None:
            need = (
                f"it takes {gigabytes(one.remedied.needed)} GB with" if one.remedied else "nothing that was tried fits"
            )
            remedies.setdefault(f"{need} {one.remedy}".rstrip(), []).append(one.card.name)
    for (total, needs, words), names in groups.items():
        style = {FITS: "green", TIGHT: "yellow"}.get(words, "red")
        table.add_row(total, needs, f"[{style}]{words}[/]", ", ".join(names))
    console.print(table)
    for words, names in remedies.items():  # not in the table, where lines too long to copy would break
        console.print(f"on {', '.join(names)} {words}", soft_wrap=True, markup=False)
    if len({one.plan.target for one in verdicts}) > 1:
        console.print(
            "Cards of before compute capability 8.0 compute in float16 and by other kernels, so that the same recipe takes another "
            "amount on them.",
            style="dim",
        )


def traffic(console: Console, made: SpreadPlan, advice: list[str]) -> None:
    """What travels in an optimizer step, how long that may take, and what more GPUs are worth."""
    table = Table("an optimizer step of each GPU", "GB", "how it is counted", box=None)
    table.columns[1].justify = "right"
    for one in made.transfers:
        link = "" if one.link == "between the GPUs" else f" ({one.link})"
        table.add_row(one.what + link, f"{one.size / 1e9:.3f}", one.formula)
    table.add_row(
        "[bold]sent to other GPUs[/]", f"[bold]{made.traffic / 1e9:.3f}[/]", f"micro-batches: {made.micro_batches}"
    )
    console.print(table)
    work, moving = made.seconds
    console.print(
        f"computing {work:.2f} s, moving {moving:.2f} s a step by the assumed rates: {made.spread.gpus} GPUs do about "
        f"{made.speedup:.1f} times the pairs a second of one, where nothing overlaps",
        soft_wrap=True,
    )
    if made.host_training:
        console.print(f"host while training: {gigabytes(made.host_training)} GB of shards and optimizer states, pinned")
    for line in advice:
        console.print(line, style="bold", soft_wrap=True, markup=False)


def as_dict(one: Verdict) -> dict[str, Any]:
    """A verdict as plain numbers and words."""
    return {
        "card": one.card.name,
        "total_bytes": int(one.card.gigabytes * 1e9),
        "needed_bytes": one.plan.needed,
        "verdict": one.words,
        "fits_with": one.remedy,
        "fits_with_bytes": one.remedied.needed if one.remedied else None,
    }


def all_recipes() -> str:
    """The table of recipes/README.md, between its markers."""
    planner = Planner()
    lines = [
        BEGIN,
        "",
        "| recipe | longest pair | pairs a micro-batch | peak in tensors, GB | with margins, GB | smallest card | T4 | host, loading, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in shipped_recipes():
        recipe = Recipe.load(name)
        made = planner(recipe, Target("cuda"))
        fitting = [card for card in SHOWN[:-1] if verdict(made, card) == FITS]
        tight = [card for card in SHOWN[:-1] if verdict(made, card) != NOT]
        smallest = fitting[0].name if fitting else "none of 80 GB and less"
        if tight and tight[0] != (fitting or [None])[0]:
            smallest += f" ({tight[0].name}: tight)"
        t4 = CARDS["t4"]
        length = sum(made.shape.pairs[0])
        lines.append(
            f"| {name} | 2 x {length:,} | {len(made.shape.pairs)} | {made.peak / 1e9:.1f} | {made.needed / 1e9:.1f} | {smallest} | "
            f"{_verdict_on(recipe, t4, planner)} | {made.load_host / 1e9:.1f} |"
        )
    return "\n".join([*lines, "", END])


def _verdict_on(recipe: Recipe, card: Card, planner: Planner) -> str:
    made = planner(recipe, card.target)
    return f"{verdict(made, card)}, {made.needed / 1e9:.1f}"
