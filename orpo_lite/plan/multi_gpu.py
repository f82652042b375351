"""Plan the memory of one of several GPUs from the plan of a single one.

Each GPU computes the same as on one card, with micro-batches of its own, so only what it holds changes:

- ddp: everything on every GPU, plus buckets in which gradients are summed.
- fsdp2: weights, adapter, gradients and states are sharded. Each decoder layer is a unit that is gathered while it is
  computed, with the next one gathered beside it. The embeddings are a unit too, and so are the final norm and the head.
  The constants that bitsandbytes keeps beside a 4-bit weight are no parameters: every GPU holds them all.
- offload: the shards wait in the host's memory.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import unwrap
from orpo_lite.model.precision import BACKENDS, is_quantized_parameter
from orpo_lite.plan.allocations import ADAPTER, BASE, BUFFERS, ENDS, GATHERED, GRADIENTS, LOADING, OPTIMIZER, Segment
from orpo_lite.plan.gpus import Parallelism
from orpo_lite.plan.meta_model import build
from orpo_lite.plan.predict import Plan, Study, fullest_by_phase
from orpo_lite.plan.step import period

WEIGHTS = (BASE, ENDS, ADAPTER)


def parallel_plan(study: Study, recomputed: int | None, parallelism: Parallelism) -> Plan:
    """Plan one of the GPUs, from the same traced step that the plan of a single card is made of.

    Args:
        recomputed: how many layers checkpoint their activations; None for all.

    Raises:
        RequestError: int8 weights with a strategy that shards them.
    """
    backend = BACKENDS.get(study.recipe.model.quantization)
    if parallelism.sharded and study.recipe.adapter is not None and backend and not backend.shardable:
        raise RequestError(
            f"model.quantization: {study.recipe.model.quantization} weights cannot be sharded by {parallelism.strategy}: set "
            "model.quantization=nf4, or use --strategy ddp"
        )
    single, traced = study.plan(recomputed), study.traced(recomputed)
    trained, units = traced.facts["trained"], find_units(study)
    peaks = {place: held_by_one(parts, place, trained, units, parallelism) for place, parts in traced.peaks.items()}
    load = Counter(single.phases["load"])
    whole = sum(traced.peaks["static", ""][part] for part in WEIGHTS)
    assumptions = [*single.assumptions, "all GPUs are in one machine"]
    host, offloaded = single.load_host * parallelism.gpus, 0
    if parallelism.sharded:
        shard(load, parallelism)
        load[LOADING] = max(units.start, units.layer, units.end)  # FSDP2 moves unit by unit to the card
        assumptions.append("two units of FSDP2 at a time: the one at work, and the buffer of the next")
        # each process loads the base into the host's memory and passes its shards on; unchanged from the file, all
        # processes map the same pages of it
        mapped = study.recipe.model.quantization == "none" and getattr(study.config, "dtype", None) == study.dtype
        host += whole * (1 if mapped else parallelism.gpus)
    if parallelism.offload:
        states = traced.facts["optimizer on the host"] + traced.facts["optimizer on the device"]
        offloaded = whole + states + 4 * trained
    return replace(
        single,
        phases={"load": load} | fullest_by_phase(peaks),
        load_host=host,
        assumptions=assumptions,
        parallelism=parallelism,
        host_training=offloaded,
    )


def held_by_one(
    parts: Counter[str], place: Segment, trained: int, units: Units, parallelism: Parallelism
) -> Counter[str]:
    """Turn a moment of the step on a single GPU into the same moment on one of several.

    Args:
        parts: bytes by purpose.
        trained: trained weights.
    """
    found = Counter(parts)
    if not parallelism.sharded:
        found[BUFFERS] += 4 * trained
        return found
    found[GATHERED] += gathered_units(place, units, parallelism)
    found[GRADIENTS] = math.ceil(found[GRADIENTS] / parallelism.gpus)
    found[OPTIMIZER] = math.ceil(found[OPTIMIZER] / parallelism.gpus)
    shard(found, parallelism)
    if parallelism.offload:
        found[GRADIENTS] = found[OPTIMIZER] = 0
    return +found


def shard(parts: Counter[str], parallelism: Parallelism) -> None:
    """Leave one GPU its share of the weights."""
    for part in WEIGHTS:
        parts[part] = 0 if parallelism.offload else math.ceil(parts[part] / parallelism.gpus)


def gathered_units(place: Segment, units: Units, parallelism: Parallelism) -> int:
    """Count the bytes of FSDP2's units that are whole at a moment of the step.

    A unit is gathered into a buffer and copied out of it; in the backward pass the buffer of the next one fills while one
    is at work. The units before the layers and after them are met alone.
    """
    phase, where = place
    if phase == "step":
        return 0
    arriving = units.layer // parallelism.gpus if parallelism.offload else 0  # its shard, on its way from the host
    if where == "end":
        return max(2 * units.end, units.end + units.layer) + arriving
    always = units.end if units.tied else 0
    here = 2 * units.layer if isinstance(where, int) else max(2 * units.start, units.start + units.layer)
    return always + here + arriving


@dataclass(frozen=True)
class Units:
    """Bytes of the weights that are gathered together, in the compute dtype or packed in 4 bits."""

    start: int
    """The embeddings, unless they are the head's weight too."""
    layer: int
    """The largest decoder layer."""
    end: int
    """The head, the final norm, and whatever is in no layer."""
    tied: bool
    """Embeddings and head are one weight, which then stays gathered throughout."""


@functools.lru_cache(maxsize=4)
def find_units(study: Study) -> Units:
    """Measure the units of a study's model; of equal layers, one is built."""
    width = study.dtype.itemsize

    def size(weight: nn.Parameter) -> int:
        return weight.nbytes if is_quantized_parameter(weight) else weight.numel() * width

    def total(module: nn.Module) -> int:
        return sum(map(size, module.parameters()))

    count = period(study.layers) if study.layers else None
    model = build(study.recipe, study.config, study.dtype, count, False)
    base: Any = unwrap(model)
    names = set(base._no_split_modules or ())
    layers = [total(module) for module in model.modules() if type(module).__name__ in names]
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is None or embeddings.weight is head.weight
    start = 0 if tied else total(embeddings)
    end = total(model) - sum(layers) - start
    return Units(start, max(layers, default=end), end, tied)
