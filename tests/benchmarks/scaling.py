"""`python -m tests.benchmarks.scaling`: what a second process gains, beside what it gains in plain matrix products.

Two processes under torchrun train the same pairs of an optimizer step together (DDP), and one of them alone while the
other waits; in between both, and one, multiply matrices, which is all that the machine can give. All are timed in turn,
so that other programs hinder all of them alike. TRL's ORPOTrainer runs under the same launcher on the same pairs.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from orpo_lite.common.console import console, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.data.step_batches import deal
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.recipe import Recipe
from orpo_lite.train.bench import Contest, interleaved, ratios
from orpo_lite.trainer.trl_names import trl_columns
from tests.benchmarks.random_model import random_model


class Scaling:
    """The contest's model on this process, wrapped for all of them, and the work that is timed."""

    def __init__(self, recipe: Recipe, pairs: int, trl: bool) -> None:
        self.contest = Contest(recipe, pairs, ["trl"] if trl else [], False)
        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        ours = self.contest.trainers["ours"]
        self.together = ours.accelerator.prepare(ours._wrap_model(self.contest.model))
        costs = torch.tensor([len(set_of(row)) for row in self.contest.rows]).numpy()
        self.mine = [self.contest.rows[i] for i in deal(costs, self.processes)[self.rank]]
        each = pairs // self.processes
        self.plain = [trl_columns(row) for row in self.contest.rows[self.rank * each : (self.rank + 1) * each]]

    def step(self, name: str, model: Any, rows: list[dict[str, Any]], counted: bool) -> Callable[[], None]:
        """An optimizer step over rows, as one micro-batch; counted over all processes as the trainer does it."""
        trainer: Any = self.contest.trainers[name]
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work every time

        def work() -> None:
            if name == "trl":
                plain_attention(unwrap(self.contest.model))
            batch, total = trainer.data_collator(rows), ()
            trainer.current_gradient_accumulation_steps = 1
            if counted:
                (batch,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
                total = (count,)
            trainer.training_step(model, batch, *total)
            optimizer.step()
            optimizer.zero_grad()

        return work

    def works(self) -> dict[str, Callable[[], None]]:
        """What is timed: each begins and ends with all processes."""
        device = self.contest.model.device
        a, b = (torch.randn(768, 768, device=device) for _ in range(2))

        def products() -> None:
            for _ in range(40):
                torch.mm(a, b)

        found = {
            "products alone": self.alone(products),
            "products": self.all(products),
            "ours alone": self.alone(self.step("ours", self.contest.model, self.contest.rows, False)),
            "ours": self.all(self.step("ours", self.together, self.mine, True)),
        }
        if "trl" in self.contest.trainers:
            found["trl"] = self.all(self.step("trl", self.together, self.plain, False))
        return found

    def all(self, work: Callable[[], None]) -> Callable[[], None]:
        def together() -> None:
            dist.barrier()
            work()
            dist.barrier()

        return together

    def alone(self, work: Callable[[], None]) -> Callable[[], None]:
        return self.all(work if self.rank == 0 else lambda: None)


def set_of(row: dict[str, Any]) -> list[int]:
    """Tokens of a pair, the prompt once."""
    return row["chosen_ids"] + row["rejected_ids"][row["rejected_start"] :]


def results(seconds: dict[str, list[float]], processes: int, pairs: int) -> dict[str, Any]:
    """Gains and pairs a second; each ratio is of the same round."""
    gain = ratios(seconds["ours alone"], seconds["ours"])
    possible = ratios([processes * one for one in seconds["products alone"]], seconds["products"])
    each = zip(seconds["ours alone"], seconds["ours"], seconds["products alone"], seconds["products"], strict=True)
    share = [(alone / ours) / (processes * one / both) for alone, ours, one, both in each]
    found: dict[str, Any] = {
        "seconds": seconds,
        "pairs_per_second": pairs / statistics.median(seconds["ours"]),
        "gain": gain,
        "gain_of_products": possible,
        "share_of_what_is_possible": {"median": statistics.median(share), "min": min(share), "max": max(share)},
    }
    if "trl" in seconds:
        found["times_as_fast_as_trl"] = ratios(seconds["trl"], seconds["ours"])
    return found


def command(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, path of a YAML file, or run folder")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    processes: Annotated[int, typer.Option(help="processes, one thread or one GPU each")] = 2,
    pairs: Annotated[int, typer.Option(help="pairs of an optimizer step, of all processes together")] = 8,
    repeats: Annotated[int, typer.Option(help="repeats of each measurement, in turn")] = 5,
    layers: Annotated[
        int | None, typer.Option(help="a random model of the base's shape with so many layers, instead of its weights")
    ] = None,
    trl: Annotated[bool, typer.Option(help="time TRL's ORPOTrainer as well")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Time two processes against one, on the recipe's own pairs, model and adapter."""
    if processes < 2 or pairs % processes or repeats < 1:
        raise RequestError(
            f"--processes, --pairs, --repeats: found {processes}, {pairs} and {repeats}, expected 2 or more processes, as many "
            "pairs for each, and 1 repeat or more"
        )
    chosen = Recipe.load(recipe, overrides or [])
    if "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        if not torch.cuda.is_available():
            settings["ACCELERATE_USE_CPU"] = "1"
        done = subprocess.run([*launcher, "-m", "tests.benchmarks.scaling", *sys.argv[1:]], env=settings)
        raise typer.Exit(done.returncode)
    with random_model(chosen, layers) if layers else contextlib.nullcontext(chosen) as spec:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        scaling = Scaling(spec, pairs, trl)
        found = results(interleaved(scaling.works(), repeats), processes, pairs)
    dist.barrier()
    if scaling.rank == 0:
        show({"setting": scaling.contest.setting, "processes": processes, "pairs": pairs} | found, as_json)
    dist.destroy_process_group()


def show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return

    def told(name: str) -> str:
        return "{median:.2f} ({min:.2f} to {max:.2f})".format(**found[name])

    for key, value in found["setting"].items():
        console.print(f"[bold]{key:<16}[/] {value:,.1f}" if isinstance(value, float) else f"[bold]{key:<16}[/] {value}")
    console.print(
        f"{found['processes']} processes, {found['pairs']} pairs a step: {found['pairs_per_second']:.2f} pairs/s"
    )
    console.print(f"times as fast as one process alone: {told('gain')}; matrix products: {told('gain_of_products')}")
    console.print(f"share of what products gain: {told('share_of_what_is_possible')}")
    if "times_as_fast_as_trl" in found:
        console.print(f"times as fast as TRL under the same launcher: {told('times_as_fast_as_trl')}")


if __name__ == "__main__":
    run_command(command)
