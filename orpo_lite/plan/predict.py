"""Predict the peak memory of one optimizer step of a recipe, by phase and purpose."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from orpo_lite.model.activation_offload import check_count
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.layout import choose_layout
from orpo_lite.plan.allocations import BASE, CONSTANTS, ENDS, FLOPS, LOADING, MOVED, OPTIMIZER, PARTS, Segment
from orpo_lite.plan.gpus import CONTEXT_BYTES, MARGIN
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.meta_model import build, compute_dtype, find_config, layer_signatures
from orpo_lite.plan.step import COPYING, Passes, Shape, Traced, micro_batch, scoring, trace
from orpo_lite.recipe import Recipe

CONTEXT, LIBRARIES = "CUDA context", "libraries' own memory"
LIBRARY_BYTES = 72_000_000
"""ASSUMED. Workspaces of cuBLAS and cuBLASLt, two or more of 8 MB each, and of 32 MB from Hopper on."""
FRAGMENTATION = 0.05
"""ASSUMED. Share of the activations and other short-lived memory that the allocator cannot use for lack of whole blocks."""
HOST_BYTES = 3_500_000_000
"""ASSUMED. Python, torch with CUDA, and the tokenized pairs in the host's memory."""
LOADERS = {True: 1, False: 4}
"""Matrices that pass through the host's memory at once: transformers reads in four threads, but in one where it quantizes
(True)."""

PHASES = ("load", "evaluation", "forward", "backward", "step")


@dataclass
class Plan:
    """Predicted bytes of one optimizer step of a recipe."""

    recipe: str
    model: str
    target: Target
    dtype: str
    layout: str
    layout_why: str
    shape: Shape
    optimizer: str
    phases: dict[str, Counter[str]]
    """Bytes by purpose at the fullest moment of each phase."""
    load_host: int
    """Bytes of the host's memory while the base is loaded, assumptions included."""
    facts: Counter[str]
    recomputed: str
    assumptions: list[str] = field(default_factory=list)

    @property
    def fullest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> int:
        """Bytes in tensors at the fullest moment, as torch.cuda.max_memory_allocated() would report them."""
        return self.phases[self.fullest].total()

    @property
    def needed(self) -> int:
        """Bytes of the card, with everything that is assumed."""
        return self.peak + sum(self.assumed.values())

    @property
    def assumed(self) -> dict[str, int]:
        """Bytes outside the tensors of the step: assumptions, not predictions."""
        if self.target.kind == "cpu":
            return {}
        lasting = (BASE, CONSTANTS, ENDS, OPTIMIZER)
        moving = sum(self.phases[self.fullest][part] for part in PARTS if part not in lasting)
        return {LIBRARIES: LIBRARY_BYTES, MARGIN: math.ceil(FRAGMENTATION * moving), CONTEXT: CONTEXT_BYTES}

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers (bytes) and words."""
        return {
            "recipe": self.recipe,
            "model": self.model,
            "device": self.target.kind,
            "compute_capability": list(self.target.capability) if self.target.kind == "cuda" else None,
            "dtype": self.dtype,
            "layout": self.layout,
            "micro_batch": self.shape.why,
            "checkpointing": self.recomputed,
            "optimizer": self.optimizer,
            "peak_bytes": self.peak,
            "needed_bytes": self.needed,
            "fullest_phase": self.fullest,
            "phases": {
                name: {"total": parts.total()} | {part: parts[part] for part in PARTS if parts[part]}
                for name, parts in self.phases.items()
            },
            "assumed": self.assumed,
            "host": {
                "load": self.load_host,
                "optimizer": self.facts["optimizer on the host"],
                "activations": self.facts[MOVED],
            },
            "micro_batch_flops": self.facts[FLOPS],
            "parameters": self.facts["parameters"],
            "trained": self.facts["trained"],
            "assumptions": self.assumptions,
        }


def plan(
    recipe: Recipe,
    target: Target | None = None,
    *,
    whole: bool = False,
    shape: Shape | Callable[[str], Shape] | None = None,
) -> Plan:
    """Predict the peak memory of one optimizer step of a recipe as it stands.

    Args:
        target: the device; default, a CUDA card of compute capability 8.6.
        whole: run every layer instead of extrapolating a deep model from a few.
        shape: the micro-batch, or a function of the layout's name; default, the largest that the recipe allows.

    Raises:
        RequestError: the model's configuration is not available, or the recipe cannot be planned.
    """
    target = target or Target("cuda")
    return Study(recipe, target, whole, shape).plan(checkpointed_layers(recipe, target))


class Study:
    """A recipe on a device, planned with any number of checkpointed layers; arguments as for `plan`.

    `passes` are what is traced, see `step.trace`.

    Raises:
        RequestError: as `plan`.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        whole: bool = False,
        shape: Shape | Callable[[str], Shape] | None = None,
        passes: Callable[..., Any] = Passes,
    ) -> None:
        self.recipe, self.target = recipe, target
        self.config = find_config(recipe.model)
        self.dtype = compute_dtype(recipe.model, target)
        self.model = _plain_model(recipe, self.config, self.dtype)
        base: Any = unwrap(self.model)
        self.layout = choose_layout(base, recipe.orpo.layout)
        if callable(shape):
            shape = shape(self.layout.name)
        self.shape = shape or micro_batch(recipe, self.layout.name, bool(self.config.is_encoder_decoder))
        self.layers = layer_signatures(base)
        """A text for each decoder layer, equal for equal layers; empty where they cannot be told from the rest."""
        self._trace = functools.partial(
            trace,
            recipe,
            self.config,
            target,
            self.dtype,
            self.layout.name,
            self.shape,
            scoring(self.model),
            passes=passes,
        )
        self._stacks = None
        if self.layers and not whole:
            lag = COPYING if recipe.memory.offload_activations else 0
            self._stacks = Stacks(self._trace, len(self.layers), period(self.layers), lag)

    @property
    def counts(self) -> list[int]:
        """Numbers of checkpointed layers that are quickly planned, besides none and all of them."""
        if not self._stacks:
            return []
        return list(range(self._stacks.edge, len(self.layers) - self._stacks.edge + 1, self._stacks.each))

    def plan(self, recomputed: int | None) -> Plan:
        """Plan with this many of the first layers checkpointed; None for all."""
        return self.assemble(self.traced(recomputed), recomputed)

    def traced(self, recomputed: int | None) -> Traced:
        """Trace the step with this many of the first layers checkpointed; None for all."""
        if not self._stacks:
            return self._trace(None, recomputed)
        check_count(recomputed, len(self.layers))
        return self._stacks(len(self.layers) if recomputed is None else recomputed)

    def assemble(self, traced: Traced, recomputed: int | None) -> Plan:
        """Make the plan of a traced step."""
        recipe, target = self.recipe, self.target
        largest = max(p.numel() for p in self.model.parameters() if p.ndim > 1)
        phases = {"load": load_phase(traced, recipe, self.model, self.dtype)} | fullest_by_phase(traced.peaks)
        return Plan(
            recipe=recipe.name,
            model=recipe.model.name_or_path,
            target=target,
            dtype=str(self.dtype).removeprefix("torch."),
            layout=self.layout.name,
            layout_why=self.layout.why,
            shape=self.shape,
            optimizer=traced.optimizer,
            phases=phases,
            load_host=HOST_BYTES + LOADERS[recipe.model.quantization != "none"] * largest * self.dtype.itemsize,
            facts=traced.facts,
            recomputed={None: "all layers", 0: "no layer"}.get(recomputed, f"{recomputed} layers"),
            assumptions=assumptions(recipe, target),
        )


def fullest_by_phase(peaks: dict[Segment, Counter[str]]) -> dict[str, Counter[str]]:
    """Return the fullest moment of each phase of the step; a recipe that holds out nothing has no evaluation."""
    found = {}
    for phase in PHASES[1:]:
        moments = [parts for (name, _), parts in peaks.items() if name == phase]
        if moments:
            found[phase] = max(moments, key=Counter.total)
    return found


def _plain_model(recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
    """Build the whole base without quantization and adapter, which is enough to see its layers."""
    plain = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"quantization": "none", "new_tokens": []}), "adapter": None}
    )
    return build(plain, config, dtype, None, False)


def checkpointed_layers(recipe: Recipe, target: Target) -> int | None:
    """Return how many layers recompute their activations: None for all, 0 for none."""
    wish = recipe.memory.checkpointing
    if wish == "auto":
        wish = "all" if target.kind == "cuda" else "none"
    return {"all": None, "none": 0}.get(wish, wish)  # type: ignore[arg-type]


def load_phase(traced: Traced, recipe: Recipe, model: Any, dtype: torch.dtype) -> Counter[str]:
    """Count the card's bytes while the base is loaded: all of it, and the one matrix that is being converted.

    transformers quantizes one matrix at a time, so no more than one is there in full; the fused experts of a layer are
    stacked from the checkpoint's separate ones.
    """
    static = traced.peaks[("static", "")]
    parts = Counter({part: static[part] for part in (BASE, CONSTANTS, ENDS)})
    fused = [p.numel() for p in model.parameters() if p.ndim > 2]
    if recipe.model.quantization != "none" or fused:
        parts[LOADING] = dtype.itemsize * max(fused or [p.numel() for p in model.parameters() if p.ndim > 1])
    return parts


def assumptions(recipe: Recipe, target: Target) -> list[str]:
    """List what a plan assumes rather than works out, in sentences."""
    if target.kind == "cpu":
        return ["workspaces that operations allocate while they run are left out"]
    found = [
        f"CUDA context {CONTEXT_BYTES / 1e9:.1f} GB, libraries' own memory {LIBRARY_BYTES / 1e9:.2f} GB",
        f"fragmentation: {FRAGMENTATION:.0%} of the short-lived memory of a step",
        "workspaces of the attention kernels' backward passes, derived from their sources",
        f"host: {HOST_BYTES / 1e9:.1f} GB for Python, CUDA and data; the checkpoint's pages can be evicted at any time",
    ]
    if recipe.model.quantization == "int8":
        found.append("int8: no outlier columns, which are kept in 16 bits")
    if recipe.memory.offload_activations:
        found.append("offloading: the copies of at most two layers are under way at a time")
    if recipe.adapter and recipe.adapter.init_lora_weights == "eva":
        found.append("ranks as in the recipe: EVA redistributes them")
    return found


# ---- whole models, extrapolated exactly from short ones ----------------------------------------------------------------
#
# A decoder is a stack of layers that checkpoint and a stack of layers that do not, either of which may be empty. Let p be
# the period of the layers. From a stack of n layers to one of n + p, every moment of the step gains the same bytes: those
# that one more period holds. So the peak of a segment is linear in the height of either stack. A layer's segment is found
# in the shorter model by its position from the first or from the last layer of its stack.

Run = Callable[[int, int], Traced]
"""A step of a model with a number of layers, and a number of them, the first, checkpointed."""


def period(signatures: list[str]) -> int:
    """Return the fewest layers after which the stack repeats itself; all of them where it does not."""
    count = len(signatures)
    return next(
        (p for p in range(1, count) if all(a == b for a, b in zip(signatures, signatures[p:], strict=False))), count
    )


@dataclass
class Stacks:
    """Steps of a model with any number of checkpointed layers, each short model run once.

    Args:
        run: traces a step of a shorter model.
        layers: layers of the whole model.
        each: their period.
        lag: periods that a layer's memory reaches back, in addition to the one before it.
    """

    run: Run
    layers: int
    each: int
    lag: int = 0
    _made: dict[tuple[int, int], Traced] = field(default_factory=dict)

    @property
    def edge(self) -> int:
        """Height from which a stack can be extrapolated: the layers at its ends are like no others."""
        return (3 + self.lag) * self.each

    def __call__(self, recomputed: int) -> Traced:
        """Return the whole model's step with the first `recomputed` layers checkpointed."""
        whole = (recomputed, self.layers - recomputed)
        short = tuple(map(self._short, whole))
        start = self._of(short)
        grown: list[tuple[int, Traced, int]] = []
        for stack in (0, 1):
            times = (whole[stack] - short[stack]) // self.each
            if times:
                taller = tuple(n + self.each * (i == stack) for i, n in enumerate(short))
                grown.append((stack, self._of(taller), times))
        facts = Counter(start.facts)
        for _, taller, times in grown:
            facts = _extended(facts, start.facts, taller.facts, times)

        def moved(segment: Segment, shifts: tuple[int, int]) -> Counter[str]:
            """Extend a segment's peak; `shifts` are periods by which its layer moves as either stack grows."""
            phase, place = segment
            found = Counter(start.peaks[segment])
            for stack, taller, times in grown:
                there = place + self.each * shifts[stack] if isinstance(place, int) else place
                found = _extended(found, start.peaks[segment], taller.peaks[phase, there], times)
            return found

        peaks: dict[Segment, Counter[str]] = {}
        for segment in start.peaks:
            phase, place = segment
            if not isinstance(place, int):
                peaks[segment] = moved(segment, (0, 0))
                continue
            stack = int(place >= short[0])
            within, added = place - short[0] * stack, whole[stack] - short[stack]
            below = (whole[0] - short[0]) * stack
            # the same layer, counted from the front of its stack and from the back
            if not added or within < short[stack] - self.each:
                peaks[phase, place + below] = moved(segment, (stack, 0))
            if added and within >= (1 + self.lag) * self.each:
                peaks[phase, place + below + added] = moved(segment, (1, stack))
        return Traced(peaks, facts, start.optimizer)

    def _short(self, height: int) -> int:
        """Return a height from which this one can be extrapolated."""
        return min(height, self.edge + height % self.each)

    def _of(self, heights: tuple[int, ...]) -> Traced:
        first, second = heights
        if (first, second) not in self._made:
            self._made[first, second] = self.run(first + second, first)
        return self._made[first, second]


def _extended(start: Counter[str], less: Counter[str], more: Counter[str], times: int) -> Counter[str]:
    return Counter({key: start[key] + times * (more[key] - less[key]) for key in less.keys() | more.keys()})
