"""Plan the memory of one of several GPUs from the plan of a single one.

Each GPU computes the same as on one card, with micro-batches of its own, so only what it holds changes:

- ddp: everything on every GPU, plus buckets in which gradients are summed.
- zero2: gradients and optimizer states are sharded. zero3: weights as well.
- fsdp2: weights, adapter, gradients and states are sharded by rows of each tensor. Each decoder layer is a unit that is
  gathered while it is computed, with the next one gathered beside it. The embeddings are a unit too, and so are the final
  norm and the head. The constants that bitsandbytes keeps beside a 4-bit weight are no parameters: every GPU holds them all.
- offload: the shards wait in the host's memory.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import unwrap
from orpo_lite.model.precision import BACKENDS
from orpo_lite.plan.allocations import ADAPTER, BASE, BUFFERS, ENDS, GATHERED, GRADIENTS, LOADING, OPTIMIZER, Segment
from orpo_lite.plan.meta_model import build, label_of
from orpo_lite.plan.predict import Plan, Study, fullest_by_phase, period

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")
"""Strategies that shard the weights, and so can offload them to the host."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket (reduce_bucket_size), allocated in full however few gradients there are."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (stage3_max_live_parameters); below that it releases none."""


@dataclass(frozen=True)
class Parallelism:
    """The number of GPUs that train a recipe, and how they share it.

    Raises:
        RequestError: an unknown strategy, fewer than two GPUs, or nothing to offload.
    """

    gpus: int
    strategy: str = "ddp"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RequestError(f"--strategy: found {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if self.gpus < 2:
            raise RequestError(f"--gpus: found {self.gpus}, expected 2 or more; leave it out to plan for one card")
        if self.offload and self.strategy not in SHARDED:
            raise RequestError(
                f"--offload: {self.strategy} keeps every weight on every card: use --strategy fsdp2 or zero3"
            )

    def __str__(self) -> str:
        return f"{self.gpus} GPUs with {self.strategy}{', offloaded' if self.offload else ''}"


@dataclass
class ParallelPlan(Plan):
    """A plan of one of several GPUs."""

    parallelism: Parallelism = field(kw_only=True)
    host_training: int = field(kw_only=True)
    """Bytes of offloaded shards and states in the host's memory, all GPUs being in one machine."""

    def as_dict(self) -> dict[str, Any]:
        content = super().as_dict()
        content["host"]["training"] = self.host_training
        return content | vars(self.parallelism)


def parallel_plan(study: Study, recomputed: int | None, parallelism: Parallelism) -> ParallelPlan:
    """Plan one of the GPUs, from the same traced step that the plan of a single card is made of.

    Args:
        recomputed: how many layers checkpoint their activations; None for all.

    Raises:
        RequestError: int8 weights with a strategy that shards them.
    """
    traced = study.traced(recomputed)
    single = study.assemble(traced, recomputed)
    units = find_units(study, parallelism)
    peaks = {place: held_by_one(parts, place, units, study, parallelism) for place, parts in traced.peaks.items()}
    phases = {"load": load_phase(single, units, parallelism)} | fullest_by_phase(peaks)
    whole, host, offloaded = held(units.every, 1), single.load_host * parallelism.gpus, 0
    if parallelism.strategy in SHARDED:  # each process loads the base into the host's memory and passes its shards on
        # unchanged from the file, all processes map the same pages of it
        mapped = study.recipe.model.quantization == "none" and getattr(study.config, "dtype", None) == study.dtype
        host += whole * (1 if mapped else parallelism.gpus)
    if parallelism.offload:
        states = traced.facts["optimizer on the host"] + traced.facts["optimizer on the device"]
        offloaded = whole + states + 4 * units.trained_elements
    more = {"phases": phases, "load_host": host, "assumptions": single.assumptions + assumptions(parallelism)}
    return ParallelPlan(**vars(single) | more, parallelism=parallelism, host_training=offloaded)


def held_by_one(
    parts: Counter[str], place: Segment, units: Units, study: Study, parallelism: Parallelism
) -> Counter[str]:
    """Turn a moment of the step on a single GPU into the same moment on one of several; bytes by part."""
    gpus, strategy, phase = parallelism.gpus, parallelism.strategy, place[0]
    found = Counter(parts)
    elements, width = units.trained_elements, study.dtype.itemsize
    if strategy == "ddp":
        found[BUFFERS] += 4 * elements
        return found
    if strategy in SHARDED:
        for label in (BASE, ENDS, ADAPTER):
            at_rest = 0 if parallelism.offload else held(units.every, gpus, label)
            stored = held(units.every, 1, label) + (4 - width) * elements * (label == ADAPTER and strategy == "zero3")
            found[label] = max(0, found[label] - stored) + at_rest
    else:
        found[ADAPTER] -= (4 - width) * elements
    if strategy == "fsdp2":
        share = held(units.every, gpus, trained=True) / max(1, held(units.every, 1, trained=True))
        found[GRADIENTS] = math.ceil(found[GRADIENTS] * share)
        found[OPTIMIZER] = math.ceil(found[OPTIMIZER] * share)
        found[GATHERED] += gathered_units(place, units, parallelism)
    else:
        found[GRADIENTS] = math.ceil(found[GRADIENTS] * width / 4 / gpus)
        masters = 4 * elements if width < 4 else 0
        found[OPTIMIZER] = math.ceil((found[OPTIMIZER] + masters) / gpus)
        if strategy == "zero3" or phase == "backward":
            found[BUFFERS] += BUCKET * width
        if strategy == "zero3" and phase != "step":
            found[GATHERED] += min(gathered(units.every, gpus), LIVE * width + gathered(units.largest, gpus))
    if parallelism.offload:
        found[GRADIENTS] = found[OPTIMIZER] = 0
    return Counter({part: size for part, size in found.items() if size})


def gathered_units(place: Segment, units: Units, parallelism: Parallelism) -> int:
    """Count the bytes of FSDP2's units that are whole at a moment of the step.

    A unit is gathered into a buffer and copied out of it; in the backward pass the buffer of the next one fills while one
    is at work. The units before the layers and after them are met alone.
    """
    phase, where = place
    gpus = parallelism.gpus
    start, layer, end = (gathered(unit, gpus) for unit in (units.start, units.largest, units.end))
    arriving = held(units.largest, gpus) if parallelism.offload else 0  # its shard, on its way from the host
    always = end if units.tied else 0
    if phase == "step":
        return 0
    if isinstance(where, int):
        return always + 2 * layer + arriving
    if where == "end":
        return max(2 * end, end + layer) + arriving
    return always + max(2 * start, start + layer) + arriving


def load_phase(single: Plan, units: Units, parallelism: Parallelism) -> Counter[str]:
    """Count one GPU's bytes while it receives its shards: FSDP2 moves unit by unit, ZeRO-3 weight by weight."""
    found = Counter(single.phases["load"])
    if parallelism.strategy in SHARDED:
        for label in (BASE, ENDS):
            at_rest = 0 if parallelism.offload else held(units.every, parallelism.gpus, label)
            found[label] += at_rest - held(units.every, 1, label)
        by_unit = parallelism.strategy == "fsdp2"
        moved = (units.start, units.largest, units.end) if by_unit else [(parameter,) for parameter in units.every]
        found[LOADING] = max(held(part, 1) for part in moved)
    return Counter({part: max(0, size) for part, size in found.items()})


def assumptions(parallelism: Parallelism) -> list[str]:
    """List the assumptions of a plan for several GPUs, in sentences."""
    found = ["all GPUs are in one machine, as far as the host's memory is concerned"]
    if parallelism.strategy == "fsdp2":
        found.append("two units of FSDP2 at a time: the one at work, and the buffer of the next")
    if parallelism.strategy.startswith("zero"):
        found.append(
            f"DeepSpeed's defaults: a gradient bucket of {BUCKET:,} elements, float32 copies of trained weights"
        )
    if parallelism.strategy == "zero3":
        found.append(f"ZeRO-3 gathers up to {LIVE:,} elements before it releases any")
    return found


# ---- units: parameters that are sharded and gathered together --------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A parameter as it is sharded, by rows of its first dimension."""

    rows: int
    row_bytes: int
    """Of a row at rest."""
    gathered_row_bytes: int
    """Of a row once gathered: in the compute dtype, 4-bit weights packed as they are."""
    row_elements: int
    """As DeepSpeed counts them: packed weights by their storage."""
    label: str
    trained: bool


Unit = tuple[Parameter, ...]
"""Parameters that are gathered together: a decoder layer, the embeddings, or the final norm and the head."""


def held(unit: Unit, gpus: int, label: str | None = None, trained: bool | None = None) -> int:
    """Count the bytes of the largest shard of some parameters, of a label, and of what is trained or frozen."""
    return sum(
        -(-p.rows // gpus) * p.row_bytes for p in unit if label in (None, p.label) and trained in (None, p.trained)
    )


def gathered(unit: Unit, gpus: int) -> int:
    """Count the bytes of some parameters once they are gathered; smaller shards are padded to the largest."""
    return sum(-(-p.rows // gpus) * gpus * p.gathered_row_bytes for p in unit)


@dataclass(frozen=True)
class Units:
    """A model's units, by their place in a step."""

    start: Unit
    layers: tuple[Unit, ...]
    end: Unit
    tied: bool
    """Embeddings and head are one parameter, which then stays gathered throughout."""

    @functools.cached_property
    def every(self) -> Unit:
        """All parameters of the model."""
        return (*self.start, *itertools.chain.from_iterable(self.layers), *self.end)

    @property
    def trained_elements(self) -> int:
        return sum(p.rows * p.row_elements for p in self.every if p.trained)

    @property
    def largest(self) -> Unit:
        """The layer that takes the most memory."""
        return max(self.layers, key=lambda layer: gathered(layer, 1), default=self.end)


def find_units(study: Study, parallelism: Parallelism) -> Units:
    """Find the units of a study's model; equal layers are counted, not built.

    Raises:
        RequestError: int8 weights, which no strategy can shard.
    """
    recipe = study.recipe
    backend = BACKENDS.get(recipe.model.quantization)
    if parallelism.strategy in SHARDED and recipe.adapter is not None and backend and not backend.shardable:
        raise RequestError(
            f"model.quantization: {recipe.model.quantization} weights cannot be sharded by {parallelism.strategy}: set "
            "model.quantization=nf4, or use --strategy ddp"
        )
    model = build(recipe, study.config, study.dtype, period(study.layers) if study.layers else None, False)
    base: Any = unwrap(model)
    names = set(base._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = [module for module in (embeddings, head) if module is not None]
    deepspeed = parallelism.strategy.startswith("zero")
    taken: set[int] = set()

    def unit(*modules: nn.Module) -> Unit:
        found = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if id(parameter) not in taken:
                    taken.add(id(parameter))
                    label = label_of(model, name, parameter, module in ends)
                    found.append(sharded(parameter, label, study.dtype, deepspeed))
        return tuple(found)

    tied = head is None or embeddings.weight is head.weight
    kinds = [unit(layer) for layer in layers]
    middle = tuple(kinds[i % len(kinds)] for i in range(len(study.layers) or len(kinds)))
    start = () if tied else unit(embeddings)
    return Units(start, middle, unit(*ends) + unit(model), tied)


def sharded(parameter: Any, label: str, dtype: Any, deepspeed: bool) -> Parameter:
    """Describe how a parameter is cut into rows; DeepSpeed cuts it flat."""
    size = parameter.element_size()
    if getattr(parameter, "quant_state", None) is not None:
        # sharding requires bnb_4bit_quant_storage to be the compute dtype
        size = dtype.itemsize
        return Parameter(-(-parameter.nbytes // size), size, size, 1, label, False)
    if deepspeed and parameter.requires_grad:
        size = dtype.itemsize  # the engine's weights; its float32 ones count as optimizer states
    rows = parameter.shape[0] if parameter.ndim and not deepspeed else parameter.numel()
    width = parameter.numel() // rows
    gathered = dtype.itemsize if parameter.is_floating_point() else size
    return Parameter(rows, width * size, width * gathered, width, label, parameter.requires_grad)
