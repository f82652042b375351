"""Predict the peak memory of one optimizer step of a recipe, by phase and purpose."""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from transformers import TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from orpo_lite.model.activation_offload import check_count
from orpo_lite.model.inspection import trainable_share, unwrap
from orpo_lite.model.precision import Place, chosen_dtype
from orpo_lite.objective.kernels import patch
from orpo_lite.objective.layout import choose_layout, disable_dropout
from orpo_lite.plan import meta_model, step
from orpo_lite.plan.allocations import BASE, CONSTANTS, ENDS, FLOPS, LOADING, MOVED, OPTIMIZER, PARTS, Timeline
from orpo_lite.plan.gpus import CONTEXT_BYTES, MARGIN, Target
from orpo_lite.plan.kernels import Kernels
from orpo_lite.plan.step import Shape, Stacks, Traced
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
    assumptions: list[str]

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


class Study:
    """A recipe on a device, planned with any number of checkpointed layers.

    Args:
        shape: returns the micro-batch of a recipe in a layout; default, the largest that the recipe allows.

    Raises:
        RequestError: the model's configuration is not available, or the recipe cannot be planned.
    """

    def __init__(self, recipe: Recipe, target: Target, shape: Callable[[Recipe, str], Shape] | None = None) -> None:
        self.recipe, self.target = recipe, target
        self.config = meta_model.find_config(recipe.model)
        self.dtype: torch.dtype = getattr(torch, chosen_dtype(recipe.model.dtype, target.kind, target.capability)[0])
        # the whole base without quantization and adapter is enough to see its layers
        plain = recipe.model.model_copy(update={"quantization": "none", "new_tokens": []})
        plain = recipe.model_copy(update={"model": plain, "adapter": None})
        self.model = meta_model.build(plain, self.config, self.dtype, None, False)
        self.layout = choose_layout(self.model, recipe.orpo.layout, Place(target.kind, target.capability, self.dtype))
        self.shape = (shape or step.micro_batch)(recipe, self.layout.name)
        self.layers = meta_model.layer_signatures(self.model)
        """A text for each decoder layer, equal for equal layers; empty where they cannot be told from the rest."""
        # with auto only where they will run, so that plans without a card agree
        wanted = recipe.memory.kernels in (("auto", "liger") if torch.cuda.is_available() else ("liger",))
        self.fused = wanted and target.kind == "cuda" and is_liger_kernel_available()
        self._head = step.scoring(self.model)
        self._trace = functools.cache(self._run_step)
        self._stacks = None
        if self.layers:
            self._stacks = Stacks(self._trace, len(self.layers), step.period(self.layers))

    @property
    def counts(self) -> list[int]:
        """Numbers of checkpointed layers that are quickly planned, besides none and all of them."""
        if not self._stacks:
            return []
        return list(range(self._stacks.edge, len(self.layers) - self._stacks.edge + 1, self._stacks.each))

    def _run_step(self, layers: int | None, recomputed: int | None) -> Traced:
        """Trace the step of a model with so many layers (None: all), the first `recomputed` of them checkpointed."""
        recipe, cuda = self.recipe, self.target.kind == "cuda"
        model = meta_model.build(recipe, self.config, self.dtype, layers, recomputed != 0)
        if self.fused:
            with contextlib.suppress(Exception):  # the run's own check will say what liger raises
                patch(unwrap(model))
        if recipe.orpo.disable_dropout:
            disable_dropout(model)
        host = step.HostOfPlan() if recipe.memory.offload_activations and cuda else None
        step.checkpoint(model, recomputed, host)
        timeline = Timeline(self.target)
        meta_model.hold_model(timeline, model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optim = recipe.training.get("optim") or TrainingArguments.default_optim
        states = meta_model.optimizer_states(optim, trained, cuda)
        timeline.take(states.device, OPTIMIZER)
        passes = step.Passes(model, recipe, self._head, self.layout.attention)
        step.mark_layers(timeline, unwrap(model))
        with timeline, Kernels(self.target).emulate():
            if self.dtype != torch.float32:  # as accelerate wraps a prepared model
                model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=self.dtype)(model.forward))
            held_out = step.evaluation_pairs(recipe)
            if held_out:
                longest = Shape(self.shape.held_out or self.shape.pairs[:1] * held_out, self.shape.why)
                step.evaluation(timeline, passes, passes.batch(longest, recipe, self.layout.name))
            batch = passes.batch(self.shape, recipe, self.layout.name)
            step.training_step(timeline, passes, trained, batch, step.accumulates(recipe))
            timeline.take(states.step, OPTIMIZER)
        facts = timeline.work | Counter({
            "parameters": trainable_share(model)[1], "trained": sum(p.numel() for p in trained),
            "optimizer on the host": states.host, MOVED: host.bytes if host else 0,
        })  # fmt: skip
        return Traced(timeline.peaks(), facts, states.why)

    def plan(self, recomputed: int | None) -> Plan:
        """Plan with this many of the first layers checkpointed; None for all."""
        recipe, target = self.recipe, self.target
        if self._stacks:
            check_count(recomputed, len(self.layers))
            traced = self._stacks(len(self.layers) if recomputed is None else recomputed)
        else:
            traced = self._trace(None, recomputed)
        largest = max(p.numel() for p in self.model.parameters() if p.ndim > 1)
        phases = {"load": load_phase(traced, recipe, self.model, self.dtype)}
        for phase in PHASES[1:]:
            moments = [parts for (name, _), parts in traced.peaks.items() if name == phase]
            if moments:  # a recipe that holds out nothing has no evaluation
                phases[phase] = max(moments, key=Counter.total)
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
            assumptions=assumptions(recipe, target, self.fused),
        )


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


def assumptions(recipe: Recipe, target: Target, fused: bool) -> list[str]:
    """List what a plan assumes rather than works out, in sentences."""
    if target.kind == "cpu":
        return ["workspaces that operations allocate while they run are left out"]
    found = [
        f"fragmentation: {FRAGMENTATION:.0%} of the short-lived memory of a step",
        "workspaces of the attention kernels' backward passes, derived from their sources",
        f"host: {HOST_BYTES / 1e9:.1f} GB for Python, CUDA and data; the checkpoint's pages can be evicted at any time",
    ]
    if recipe.memory.kernels != "none":
        ours = "liger's" if fused else "PyTorch's own, which hold more than liger's where those will run"
        found.append(f"kernels of norms, rotations and activations: {ours}")
    return found
