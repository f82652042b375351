"""`python -m tests.benchmarks.launches`: kernels launched by a micro-batch, ours and TRL's, and what a card would take for them.

The real step of each side runs on meta tensors with one and with two layers of the real width, and is extended to all of
them: each further layer adds the same. An attention kernel counts as one operation each way. The roofline is an estimate:
each kernel takes the longer of its arithmetic and its bytes by the card's public figures, and the step no less than the
host needs to launch all kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orpo_lite.common.console import console, run_command
from orpo_lite.plan.allocations import Timeline
from orpo_lite.plan.gpus import Target
from orpo_lite.plan.kernels import EFFICIENT_BACKWARD, REPLACEMENTS, efficient_backward
from orpo_lite.plan.predict import Study
from orpo_lite.plan.step import Shape
from orpo_lite.recipe import Recipe
from tests.benchmarks.trl_memory import TrlPasses

aten = torch.ops.aten

MODELS = {"0.5B": "qwen2-0.5b-ultrafeedback", "4B": "qwen3-4b-qlora", "7B": "mistral-qlora"}
"""Recipes by the size of their model."""
PAIRS = (1, 2, 4, 8)
PROMPT, ANSWER = 256, 384
"""Tokens of each pair: prompt, and either answer."""
SYNCS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
         aten.is_nonzero.default}  # fmt: skip
"""Operations that make the host wait for the device."""
CASTS = {aten._to_copy.default}
NO_KERNELS = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
              aten.new_empty_strided.default, aten.detach.default, aten.lift_fresh.default}  # fmt: skip


class Card(NamedTuple):
    """Public figures of a card: dense 16-bit operations a second, summed in float32 as training does, and bytes of memory a second."""

    flops: float
    bandwidth: float
    target: Target


T4, AMPERE = Target("cuda", (7, 5)), Target("cuda", (8, 6))
CARDS = {
    "T4": Card(65e12, 320e9, T4),
    "RTX 3060": Card(25e12, 360e9, AMPERE),
    "RTX 4090": Card(165e12, 1008e9, AMPERE),
}
LAUNCH = 6e-6
"""ASSUMED. Seconds that the host needs for each operation of a training step in Python: 5 to 10 microseconds."""
REACHED = 0.6
"""ASSUMED. Share of the public figures that large kernels reach."""


class Launches(TorchDispatchMode):
    """Counts what runs on meta tensors in the passes of a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.kernels: Counter[tuple[int, int]] = Counter()
        """How many kernels do so many operations on so many bytes."""
        self.syncs: list[str] = []
        self.timeline: Timeline | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.timeline is None or self.timeline.segment[0] not in ("forward", "backward"):
            return output
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        on_device = [t for t in given + made if t.is_meta]
        if func in SYNCS and on_device or (on_device and any(t.device.type == "cpu" for t in made)):
            self.counts["syncs"] += 1
            self.syncs.append(str(func))
        storages = {t.untyped_storage()._cdata for t in given}
        is_view = not func._schema.is_mutable and made and all(t.untyped_storage()._cdata in storages for t in made)
        if not on_device or func in NO_KERNELS or is_view:
            return output
        if func in CASTS and given[0].dtype != made[0].dtype:
            self.counts["casts"] += 1
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output))
        self.add(str(func), on_device, flops)
        return output

    def add(self, name: str, tensors: list[Tensor], flops: int) -> None:
        """Count a kernel that reads or writes these tensors."""
        size = sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())
        self.counts.update({"kernels": 1, "bytes": size, "flops": flops})
        self.names[name] += 1
        self.kernels[flops, size] += 1

    def efficient_backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Any:
        """Count the backward pass of the kernel for all pairs, for which a plan has only a stand-in: 2.5 times the forward's."""
        pairs = query.shape[1] * key.shape[1] / (rest[2].shape[0] - 1)
        self.add(
            EFFICIENT_BACKWARD, [gradient, query, key, value, query, key, value], int(10 * pairs * query[0, 0].numel())
        )
        return efficient_backward(gradient, query, key, value, *rest, **options)


@functools.cache
def study_of(size: str, target: Target, trl: bool) -> Study:
    """Return a recipe's study in our layout, or padded as TRL's; nothing is held out."""
    recipe = Recipe.load(
        MODELS[size], ["data.eval_fraction=0", "data.eval=null", f"orpo.layout={'padded' if trl else 'auto'}"]
    )
    return Study(recipe, target, lambda *_: Shape((), ""))


def micro_batch(study: Study, pairs: int, layers: int, recomputed: bool, trl: bool) -> Launches:
    """Count the passes of a micro-batch of a model with so many layers, all checkpointed or none."""
    study.shape = Shape(((PROMPT, ANSWER),) * pairs, "")
    found, adapter, predict = Launches(), "orpo_lite.model.adapter", "orpo_lite.plan.predict"

    def timeline(target: Target) -> Timeline:
        found.timeline = Timeline(target)
        return found.timeline

    with contextlib.ExitStack() as stack:
        if trl:  # its preparation of a quantized model leaves the norms' results in float32
            patches = {f"{adapter}.cast_output": lambda dtype, module, args, output: output,
                       f"{adapter}.float32_input": lambda module, args: args,
                       f"{predict}.step.Passes": lambda *given: TrlPasses(*given, cuda=True)}  # fmt: skip
            for name, stand_in in patches.items():
                stack.enter_context(mock.patch(name, stand_in))
        stack.enter_context(mock.patch.dict(REPLACEMENTS, {EFFICIENT_BACKWARD: found.efficient_backward}))
        stack.enter_context(mock.patch(f"{predict}.Timeline", timeline))
        stack.enter_context(found)
        study._run_step(layers, None if recomputed else 0)
    return found


def whole(size: str, target: Target, pairs: int, trl: bool = False, recomputed: bool = True) -> Launches:
    """Count the passes of a whole model, extended from one and two layers."""
    study = study_of(size, target, trl)
    one, two = (micro_batch(study, pairs, layers, recomputed, trl) for layers in (1, 2))
    more = study.config.get_text_config(decoder=True).num_hidden_layers - 1
    for name in ("counts", "names", "kernels"):
        first, second = getattr(one, name), getattr(two, name)
        extended = {key: first[key] + more * (second[key] - first[key]) for key in first.keys() | second.keys()}
        setattr(one, name, Counter(extended))
    return one


def seconds(found: Launches, card: Card) -> float:
    """Estimate the time of a micro-batch: its kernels one after another, or the host launching them."""
    work = sum(n * max(f / card.flops, b / card.bandwidth) for (f, b), n in found.kernels.items()) / REACHED
    return max(work, LAUNCH * found.counts["kernels"])


def side_of(case: tuple[str, int, bool], recomputed: bool) -> dict[str, Any]:
    """Count one side, TRL's or ours; a T4 takes other kernels, so its step is counted apart."""
    size, pairs, trl = case
    by_target = {target: whole(size, target, pairs, trl, recomputed) for target in (AMPERE, T4)}
    side: dict[str, Any] = {
        key: by_target[AMPERE].counts[key] for key in ("kernels", "casts", "syncs", "bytes", "flops")
    }
    side["pairs_per_second"] = {name: pairs / seconds(by_target[card.target], card) for name, card in CARDS.items()}
    return side


def compare(sizes: list[str], recomputed: bool) -> list[dict[str, Any]]:
    """Count all sizes and numbers of pairs, ours and TRL's, on all cores."""
    cases = [(size, pairs, trl) for size, trl, pairs in itertools.product(sizes, (True, False), PAIRS)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        # a model is built once in each process: its pairs go there together
        sides = dict(
            zip(cases, pool.map(side_of, cases, itertools.repeat(recomputed), chunksize=len(PAIRS)), strict=True)
        )
    return [
        {"model": size, "pairs": pairs, "trl": sides[size, pairs, True], "ours": sides[size, pairs, False]}
        for size, pairs in itertools.product(sizes, PAIRS)
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Write the comparison as a table."""
    head = ["model", "pairs", "kernels, TRL", "kernels, ours", "casts, TRL", "casts, ours", "TFLOP, TRL", "TFLOP, ours"]
    head += [f"{name}: times TRL's pairs/s" for name in CARDS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        trl, ours = row["trl"], row["ours"]
        cells = [row["model"], str(row["pairs"])]
        cells += [f"{side[key]:,}" for key in ("kernels", "casts") for side in (trl, ours)]
        cells += [f"{side['flops'] / 1e12:.1f}" for side in (trl, ours)]
        cells += [f"{ours['pairs_per_second'][name] / trl['pairs_per_second'][name]:.2f}" for name in CARDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def command(
    models: Annotated[str, typer.Option(help="sizes, separated by commas")] = ",".join(MODELS),
    checkpointing: Annotated[bool, typer.Option(help="recompute all layers in the backward pass")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Count the kernels of a micro-batch, ours and TRL's, and estimate what cards make of them."""
    rows = compare(models.split(","), checkpointing)
    print(json.dumps(rows, indent=1) if as_json else markdown(rows))
    console.print(
        f"assumed: {LAUNCH * 1e6:.0f} microseconds a launch, {REACHED:.0%} of a card's public figures", style="dim"
    )


if __name__ == "__main__":
    run_command(command)
