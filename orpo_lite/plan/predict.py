"""The plan of a recipe: the peak of one optimizer step, by phase and by what it is for."""

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
from orpo_lite.plan.extrapolate import Stacks, period
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.meta_model import build, compute_dtype, find_config, signatures
from orpo_lite.plan.step import COPYING, PlannedTrainer, Shape, Traced, micro_batch, scoring, trace
from orpo_lite.recipe import Recipe

CONTEXT, MARGIN, LIBRARIES = "CUDA context", "fragmentation margin", "libraries' own memory"
CONTEXT_BYTES = {"cuda": 500_000_000, "cpu": 0}
"""ASSUMED. What the driver and CUDA's modules hold outside the allocator: 0.3 to 0.6 GB on cards of the last years."""
LIBRARY_BYTES = {"cuda": 72_000_000, "cpu": 0}
"""ASSUMED. cuBLAS's and cuBLASLt's workspaces; theirs is 32 MB a handle from Hopper on and 8 MB before, twice or more."""
FRAGMENTATION = 0.05
"""ASSUMED. Share of the activations and other short-lived memory that the allocator cannot use for lack of whole blocks."""
HOST_BYTES = 3_500_000_000
"""ASSUMED. Python, torch with CUDA, and the tokenised pairs in the host's memory."""
LOADERS = {True: 1, False: 4}
"""Matrices on their way through the host's memory at once: transformers reads in as many threads, but in one where it
quantises (True)."""

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
    """Bytes by part at the fullest moment of each phase."""
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
        """Bytes in tensors at the fullest moment: what torch.cuda.max_memory_allocated() would say."""
        return self.phases[self.fullest].total()

    @property
    def needed(self) -> int:
        """Bytes of the card, with all that is assumed."""
        return self.peak + sum(self.assumed.values())

    @property
    def assumed(self) -> dict[str, int]:
        """What is no tensor of the step, in bytes: assumptions, not predictions."""
        if self.target.kind == "cpu":
            return {}
        moving = sum(
            self.phases[self.fullest][part] for part in PARTS if part not in (BASE, CONSTANTS, ENDS, OPTIMIZER)
        )
        return {
            LIBRARIES: LIBRARY_BYTES[self.target.kind],
            MARGIN: math.ceil(FRAGMENTATION * moving),
            CONTEXT: CONTEXT_BYTES[self.target.kind],
        }

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain numbers (bytes) and words."""
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
        whole: run every layer instead of working a deep model out from a few.
        shape: the micro-batch, or what makes it of the layout's name; default, the largest that the recipe can meet.

    Raises:
        RequestError: the model's configuration is not here, or the recipe cannot be planned.
    """
    target = target or Target("cuda")
    return Study(recipe, target, whole, shape).plan(checkpointed_layers(recipe, target))


class Study:
    """A recipe on a device, planned with any number of its layers checkpointed; arguments as `plan`'s.

    `kind` is the trainer, as `step.trace` takes it.

    Raises:
        RequestError: as `plan`.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        whole: bool = False,
        shape: Shape | Callable[[str], Shape] | None = None,
        kind: Callable[..., Any] = PlannedTrainer,
    ) -> None:
        self.recipe, self.target = recipe, target
        self.config = find_config(recipe.model)
        self.dtype = compute_dtype(recipe.model, target)
        self.model = _skeleton(recipe, self.config, self.dtype)
        base = unwrap(self.model)
        self.layout = choose_layout(base, recipe.orpo.layout)
        if callable(shape):
            shape = shape(self.layout.name)
        self.shape = shape or micro_batch(recipe, self.layout.name, bool(self.config.is_encoder_decoder))
        self.layers = signatures(base)
        """What each of the decoder's layers is like; empty where they cannot be told apart from the rest."""
        self._trace = functools.partial(
            trace, recipe, self.config, target, self.dtype, self.layout.name, self.shape, scoring(self.model), kind=kind
        )
        self._stacks = None
        if self.layers and not whole:
            lag = COPYING if recipe.memory.offload_activations else 0
            self._stacks = Stacks(self._trace, len(self.layers), period(self.layers), lag)

    @property
    def counts(self) -> list[int]:
        """Numbers of checkpointed layers that are quickly planned, beside none and all of them."""
        if not self._stacks:
            return []
        return list(range(self._stacks.edge, len(self.layers) - self._stacks.edge + 1, self._stacks.each))

    def plan(self, recomputed: int | None) -> Plan:
        """The plan with the first so many layers checkpointed; None for all."""
        return self.assemble(self.traced(recomputed), recomputed)

    def traced(self, recomputed: int | None) -> Traced:
        """The step with the first so many layers checkpointed; None for all."""
        if not self._stacks:
            return self._trace(None, recomputed)
        check_count(recomputed, len(self.layers))
        return self._stacks(len(self.layers) if recomputed is None else recomputed)

    def assemble(self, traced: Traced, recomputed: int | None) -> Plan:
        """The plan of a step that was run."""
        recipe, target = self.recipe, self.target
        largest = max(p.numel() for p in self.model.parameters() if p.ndim > 1)
        phases = {"load": load_phase(traced, recipe, self.model, self.dtype)} | fullest_by_phase(traced.peaks)
        host = HOST_BYTES + LOADERS[recipe.model.quantization != "none"] * largest * self.dtype.itemsize
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
            load_host=host,
            facts=traced.facts,
            recomputed={None: "all layers", 0: "no layer"}.get(recomputed, f"{recomputed} layers"),
            assumptions=assumptions(recipe, target),
        )


def fullest_by_phase(peaks: dict[Segment, Counter[str]]) -> dict[str, Counter[str]]:
    """The fullest moment of each phase of the step; a recipe may hold nothing out, and so lack one."""
    found = {}
    for phase in PHASES[1:]:
        moments = [parts for (name, _), parts in peaks.items() if name == phase]
        if moments:
            found[phase] = max(moments, key=Counter.total)
    return found


def _skeleton(recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
    """The whole base without quantisation and adapter: enough to see what its layers are."""
    plain = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"quantization": "none", "new_tokens": []}), "adapter": None}
    )
    return build(plain, config, dtype, None, False)


def checkpointed_layers(recipe: Recipe, target: Target) -> int | None:
    """How many layers recompute their activations: None for all, 0 for none."""
    wish = recipe.memory.checkpointing
    if wish == "auto":
        wish = "all" if target.kind == "cuda" else "none"
    return {"all": None, "none": 0}.get(wish, wish)  # type: ignore[arg-type]


def load_phase(traced: Traced, recipe: Recipe, model: Any, dtype: torch.dtype) -> Counter[str]:
    """The card while the base comes in: all of it, and beside it the one matrix that is being made something else.

    transformers quantises one matrix at a time, so that no more than one is there in full; the fused experts of a layer
    are stacked out of the checkpoint's single ones.
    """
    static = traced.peaks[("static", "")]
    parts = Counter({part: static[part] for part in (BASE, CONSTANTS, ENDS)})
    fused = [p.numel() for p in model.parameters() if p.ndim > 2]
    if recipe.model.quantization != "none" or fused:
        parts[LOADING] = dtype.itemsize * max(fused or [p.numel() for p in model.parameters() if p.ndim > 1])
    return parts


def assumptions(recipe: Recipe, target: Target) -> list[str]:
    """What in the figures is assumed and was not worked out, in sentences."""
    if target.kind == "cpu":
        return ["what operations take for themselves while they run is left out"]
    found = [
        f"CUDA context {CONTEXT_BYTES['cuda'] / 1e9:.1f} GB, libraries' own memory {LIBRARY_BYTES['cuda'] / 1e9:.2f} GB",
        f"fragmentation: {FRAGMENTATION:.0%} of all that comes and goes in a step",
        "scratch memory of the attention kernels' backward passes, by the layout of their sources",
        f"host: {HOST_BYTES / 1e9:.1f} GB of Python, CUDA and data; the checkpoint's pages can be given back at any time",
    ]
    if recipe.model.quantization == "int8":
        found.append("int8: no outlier columns, which are kept in 16 bits")
    if recipe.memory.offload_activations:
        found.append("offloading: two layers' copies are under way at a time, at most")
    if recipe.adapter and recipe.adapter.init_lora_weights == "eva":
        found.append("ranks as the recipe names them: EVA deals them out anew")
    return found
