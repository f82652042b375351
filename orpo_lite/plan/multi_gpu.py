"""A plan spread over several GPUs: what each holds by strategy, what travels, and whether that is worth it.

What a GPU computes is the same as on one card, with its own micro-batches, so that only what is held changes:

- ddp: everything on every GPU, and buckets in which the gradients are summed.
- zero2: gradients and optimizer states are spread. zero3: the weights as well.
- fsdp2: weights, adapter, gradients and states are spread, by rows of each tensor, each decoder layer a unit of its own
  that is gathered while it is computed, and the next one beside it. Embeddings, and the final norm with the head, are
  units too. What bitsandbytes keeps beside a 4-bit weight is no parameter, and stays whole on every GPU.
- offload: the shards wait in the host's memory.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from orpo_lite.plan.allocations import (
    ADAPTER,
    BASE,
    BUFFERS,
    ENDS,
    FLOPS,
    GATHERED,
    GRADIENTS,
    LOADING,
    OPTIMIZER,
    Segment,
)
from orpo_lite.plan.predict import Plan, Study, fullest_by_phase
from orpo_lite.plan.units import SHARDED, Spread, Units, units_of
from orpo_lite.recipe import Recipe

BUCKET = 500_000_000
"""Numbers of DeepSpeed's gradient bucket (reduce_bucket_size), which it takes whole however few gradients there are."""
LIVE = 1_000_000_000
"""Numbers that ZeRO-3 keeps gathered, at most (stage3_max_live_parameters): it gives none back before there are so many."""
LINK, FLOPS_PER_SECOND = 10e9, 40e12
"""ASSUMED. Bytes a second and GPU between consumer cards (PCIe 4.0 x8, through the host), and what such a card computes
in 16 bits; NVLink moves 10 to 40 times as much."""


@dataclass(frozen=True)
class Transfer:
    """What one GPU sends (and receives as much of) in an optimizer step."""

    what: str
    formula: str
    size: int
    """Bytes."""
    link: str = "between the GPUs"


@dataclass
class SpreadPlan(Plan):
    """A plan of one of several GPUs."""

    spread: Spread = field(kw_only=True)
    transfers: list[Transfer] = field(kw_only=True)
    micro_batches: int = field(kw_only=True)
    host_training: int = field(kw_only=True)
    """Bytes of one machine's memory that hold what was offloaded, all of these GPUs being in it."""

    @property
    def traffic(self) -> int:
        """Bytes that a GPU sends to others in an optimizer step."""
        return sum(one.size for one in self.transfers if one.link == Transfer.link)

    @property
    def seconds(self) -> tuple[float, float]:
        """Computing and moving of a step, by the assumed rates."""
        work = self.micro_batches * self.facts[FLOPS] / FLOPS_PER_SECOND
        return work, sum(one.size for one in self.transfers) / LINK

    @property
    def speedup(self) -> float:
        """Pairs a second against one card, where nothing overlaps."""
        work, moving = self.seconds
        return self.spread.gpus * work / (work + moving)

    def as_dict(self) -> dict[str, Any]:
        work, moving = self.seconds
        told = super().as_dict()
        told["host"]["training"] = self.host_training
        return told | {
            "gpus": self.spread.gpus,
            "strategy": self.spread.strategy,
            "offload": self.spread.offload,
            "micro_batches_per_step": self.micro_batches,
            "traffic_per_step_bytes": self.traffic,
            "traffic": [
                {"what": t.what, "formula": t.formula, "bytes": t.size, "link": t.link} for t in self.transfers
            ],
            "assumed_seconds_per_step": {"computing": work, "moving": moving},
            "speedup_without_overlap": self.speedup,
        }


# ---- memory ----------------------------------------------------------------------------------------------------------


def spread_plan(study: Study, recomputed: int | None, spread: Spread) -> SpreadPlan:
    """The plan of one of the GPUs, from the same step that a plan of one card is made of.

    Raises:
        RequestError: as `units_of`.
    """
    traced = study.traced(recomputed)
    one = study.assemble(traced, recomputed)
    units = units_of(study, spread)
    micro = micro_batches(study.recipe, one)
    peaks = {place: on_each(parts, place, units, study, spread) for place, parts in traced.peaks.items()}
    phases = {"load": load(one, units, study, spread)} | fullest_by_phase(peaks)
    whole = units.total(1)
    host, moved = one.load_host * spread.gpus, 0
    if spread.strategy in SHARDED:  # each process has the base in the host's memory, and hands its shards on
        # as it lies in the file, all of them have the same pages of it
        shared = study.recipe.model.quantization == "none" and getattr(study.config, "dtype", None) == study.dtype
        host += whole * (1 if shared else spread.gpus)
    if spread.offload:
        states = traced.facts["optimizer on the host"] + traced.facts["optimizer on the device"]
        moved = whole + states + 4 * units.numbers(trained=True)
    return SpreadPlan(
        **vars(one)
        | {
            "phases": phases,
            "load_host": host,
            "assumptions": one.assumptions + assumptions(spread),
        },
        spread=spread,
        transfers=transfers(units, study, spread, micro),
        micro_batches=micro,
        host_training=moved,
    )


def on_each(parts: Counter[str], place: Segment, units: Units, study: Study, spread: Spread) -> Counter[str]:
    """A moment of the step as one of the GPUs sees it."""
    gpus, strategy, phase = spread.gpus, spread.strategy, place[0]
    found = Counter(parts)
    numbers, width = units.numbers(trained=True), study.dtype.itemsize
    whole = {label: units.total(1, label) for label in (BASE, ENDS, ADAPTER)}
    if strategy == "ddp":
        found[BUFFERS] += 4 * numbers
        return found
    share = units.total(gpus, trained=True) / max(1, units.total(1, trained=True))
    if strategy in SHARDED:
        for label, size in whole.items():
            at_rest = 0 if spread.offload else units.total(gpus, label)
            stored = size + (4 - width) * numbers * (label == ADAPTER and strategy == "zero3")
            found[label] = max(0, found[label] - stored) + at_rest
    else:
        found[ADAPTER] -= (4 - width) * numbers
    if strategy == "fsdp2":
        found[GRADIENTS] = math.ceil(found[GRADIENTS] * share)
        found[OPTIMIZER] = math.ceil(found[OPTIMIZER] * share)
        found[GATHERED] += gathered(place, units, spread)
    else:
        found[GRADIENTS] = math.ceil(found[GRADIENTS] * width / 4 / gpus)
        masters = 4 * numbers if width < 4 else 0
        found[OPTIMIZER] = math.ceil((found[OPTIMIZER] + masters) / gpus)
        if strategy == "zero3" or phase == "backward":
            found[BUFFERS] += BUCKET * width
        if strategy == "zero3":
            live = min(units.gathered(gpus), LIVE * width + units.largest.gathered(gpus))
            found[GATHERED] += 0 if phase == "step" else live
    if spread.offload:
        found[GRADIENTS] = found[OPTIMIZER] = 0
    return Counter({part: size for part, size in found.items() if size})


def gathered(place: Segment, units: Units, spread: Spread) -> int:
    """Bytes of FSDP2's units that are whole at a moment: the one at work, and the buffer of the next or of itself.

    A unit is gathered into a buffer and copied out of it; in the backward pass the next one's buffer fills while one is
    at work. The units in front of the layers and behind them are met alone.
    """
    phase, where = place
    gpus = spread.gpus
    start, layer, end = (unit.gathered(gpus) for unit in (units.start, units.largest, units.end))
    waiting = units.largest.held(gpus) if spread.offload else 0  # its shard, on its way from the host
    always = end if units.tied else 0
    if phase == "step":
        return 0
    if isinstance(where, int):
        return always + 2 * layer + waiting
    if where == "end":
        return max(2 * end, end + layer) + waiting
    return always + max(2 * start, start + layer) + waiting


def load(one: Plan, units: Units, study: Study, spread: Spread) -> Counter[str]:
    """A GPU while the base comes in from the host, to keep its shards: FSDP2 moves unit after unit, ZeRO-3 one weight."""
    found = Counter(one.phases["load"])
    if spread.strategy in SHARDED:
        for label in (BASE, ENDS):
            found[label] += (0 if spread.offload else units.total(spread.gpus, label)) - units.total(1, label)
        moved = (units.start, units.largest, units.end) if spread.strategy == "fsdp2" else (p for p, _ in units.each())
        found[LOADING] = max(part.held(1) for part in moved)
    return Counter({part: max(0, size) for part, size in found.items()})


def micro_batches(recipe: Recipe, made: Plan) -> int:
    """Micro-batches of a GPU's optimizer step; by a budget of tokens as many as the planned one needs for its pairs."""
    pairs = recipe.training.get("per_device_train_batch_size", 8)
    steps = recipe.training.get("gradient_accumulation_steps", 1)
    return -(-pairs * steps // len(made.shape.pairs)) if recipe.orpo.tokens_per_batch else steps


# ---- traffic ---------------------------------------------------------------------------------------------------------


def transfers(units: Units, study: Study, spread: Spread, micro: int) -> list[Transfer]:
    """What a GPU sends in an optimizer step, by rings: (N - 1) / N of what is gathered or scattered, twice for a sum."""
    gpus, width, numbers = spread.gpus, study.dtype.itemsize, units.numbers(trained=True)
    ring, n = (gpus - 1) / gpus, f"{gpus - 1}/{gpus}"

    def sent(what: str, formula: str, size: float, **link: str) -> Transfer:
        return Transfer(what, formula, round(size), **link)

    if spread.strategy == "ddp":
        return [sent("gradients, all-reduce, once a step", f"2 x {n} x 4 bytes x {numbers:,}", 2 * ring * 4 * numbers)]
    rounds = micro if spread.strategy.startswith("zero") else 1  # DeepSpeed sums them in every backward pass
    scattered = sent(
        "gradients, reduce-scatter, " + ("backward passes" if rounds > 1 else "once a step"),
        f"{f'{rounds} x ' if rounds > 1 else ''}{n} x {width} bytes x {numbers:,}",
        rounds * ring * width * numbers,
    )
    if spread.strategy == "zero2":
        back = sent("adapter, all-gather, once a step", f"{n} x {width} bytes x {numbers:,}", ring * width * numbers)
        return [scattered, back]
    whole = units.gathered(gpus)
    # norm and head are not given back between the passes
    again = whole - (units.end.gathered(gpus) if spread.strategy == "fsdp2" else 0)
    found = [
        sent("weights, all-gather, forward passes", f"{micro} x {n} x {whole:,} bytes", micro * ring * whole),
        sent("weights, all-gather, backward passes", f"{micro} x {n} x {again:,} bytes", micro * ring * again),
        scattered,
    ]
    if spread.offload:
        shards = whole / gpus + again / gpus
        found.append(
            sent(
                "shards, host to card", f"{micro} x ({whole:,} + {again:,}) / {gpus} bytes", micro * shards, link="PCIe"
            )
        )
    return found


def assumptions(spread: Spread) -> list[str]:
    """What of a spread plan is assumed."""
    found = [
        f"traffic by rings, one link of {LINK / 1e9:g} GB/s and {FLOPS_PER_SECOND / 1e12:g} TFLOP/s a card, nothing overlapping",
        "all GPUs in one machine, where the host's memory is meant",
    ]
    if spread.strategy == "fsdp2":
        found.append("two units of FSDP2 at a time: the one at work, and the next one's buffer")
    if spread.strategy.startswith("zero"):
        found.append(
            f"DeepSpeed's defaults: a gradient bucket of {BUCKET:,} numbers, float32 copies of what is trained"
        )
    if spread.strategy == "zero3":
        found.append(f"ZeRO-3 gathers up to {LIVE:,} numbers before it gives any back")
    return found
