"""`python -m orpo_lite.bench --recipe NAME [--against trl]`; torch is imported once the arguments are checked."""

import importlib.util
import os
from typing import Annotated, Any

import typer
from rich.table import Table

from orpo_lite.common.console import console, errors, json_alone
from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION


def show(setting: dict[str, Any], races: list[dict[str, Any]]) -> None:
    """Print the setting and a table of the contestants at each batch size."""
    for key, value in setting.items():
        console.print(f"[bold]{key:<16}[/] {value:,.1f}" if isinstance(value, float) else f"[bold]{key:<16}[/] {value}")
    table = Table(
        "batch", "contestant", "pairs/s", "tokens/s", "MB over weights", "ours: times as fast", "memory", box=None
    )
    for race in races:
        for name, c in race["contestants"].items():
            ratio = c.get("ours_is_times_as_fast")
            table.add_row(str(race["batch_size"]), name, f"{c['pairs_per_second']:.2f}", f"{c['tokens_per_second']:,.0f}",
                          f"{c['peak_bytes_over_weights'] / 1e6:,.0f}",
                          f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
                          f"{c['ours_memory_share']:.2f}" if ratio else "")  # fmt: skip
    console.print(table)
    for race in races:
        # the best that TRL can do here
        rivals = [c["ours_is_times_as_fast"] for name, c in race["contestants"].items() if name.startswith("trl")]
        best = min(rivals, key=lambda ratio: ratio["median"], default=None)
        if best and best["min"] <= 1:
            console.print(
                f"batch {race['batch_size']}: no faster than TRL within the spread of the repeats ({best['min']:.2f} to {best['max']:.2f})"
            )


def command(
    recipe: Annotated[str, RECIPE_OPTION],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    against: Annotated[str, typer.Option(help="trl, and layouts of ours: trl,padded")] = "trl",
    batch: Annotated[str, typer.Option(help="batch sizes in pairs")] = "1,2,4,8",
    pairs: Annotated[int, typer.Option(help="pairs in each measurement")] = 16,
    repeats: Annotated[int, typer.Option(help="repeats of each measurement, the contestants in turn")] = 5,
    checkpointing: Annotated[bool, typer.Option(help="recompute all layers in the backward pass")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Time our trainer against TRL's on the recipe's own pairs, model and adapter."""
    names = [name for name in against.split(",") if name]
    unknown = set(names) - {"trl", "padded", "packed", "shared"}
    if unknown:
        raise RequestError(f"--against: found {', '.join(sorted(unknown))}, expected trl, padded, packed or shared")
    if "trl" in names and importlib.util.find_spec("trl") is None:
        raise RequestError('--against trl: trl is not installed: pip install "orpo_lite[trl]"')
    sizes = [int(size) if size.strip().isdigit() else 0 for size in batch.split(",")]
    if not all(0 < size <= pairs for size in sizes):
        raise RequestError(f"--batch: found {batch!r}, expected numbers from 1 to {pairs} (--pairs), such as 1,2,4")
    chosen = Recipe.load(recipe, overrides or [])
    # torch's profiler, which counts memory on the CPU, would log where it starts and stops, and what it cannot know
    os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")
    with json_alone(as_json) as print_json:
        from orpo_lite.train.bench import Contest

        contest = Contest(chosen, pairs, names, checkpointing)
        races = []
        for size in sizes:
            errors.print(f"measuring batches of {size}")
            races.append(contest.race(size, repeats))
        if as_json:
            print_json({"setting": contest.setting, "races": races})
        else:
            show(contest.setting, races)
