"""Run one optimizer step of a recipe on meta tensors, with the trainer's own objective and every allocation logged."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from orpo_lite.data.collate import PackedCollator, PaddedCollator
from orpo_lite.model.activation_offload import SMALLEST, CheckpointedLayers, checkpointing_layers, offload
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, head_transform
from orpo_lite.objective.layout import disable_dropout, small_model
from orpo_lite.plan.allocations import GRADIENTS, MOVED, OPTIMIZER, Segment, Timeline
from orpo_lite.plan.kernels import Kernels, Target, cuda_workspace, no_workspace
from orpo_lite.plan.meta_model import build, decoder_layers, hold_model, optimizer_name, optimizer_states
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.trainer.objective import Objective, count_step

META = torch.device("meta")
COPYING = 2
"""ASSUMED. Tensors that are still on the card while they are copied to the host."""


# ---- the micro-batch that is planned for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The pairs of a micro-batch, each as its tokens: shared prompt, chosen answer, rejected answer (one number where both
    answers have the same length)."""

    pairs: tuple[tuple[int, ...], ...]
    why: str
    held_out: tuple[tuple[int, ...], ...] = ()
    """Pairs of an evaluation batch; if empty, the first pair as often as the recipe's evaluation batch says."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Pairs as the collators take them; the answers differ from their first token on."""
        return [
            {
                "chosen_ids": [1] * prompt + [2] * answers[0],
                "rejected_ids": [1] * prompt + [3] * answers[-1],
                "chosen_start": prompt,
                "rejected_start": prompt,
                "prompt_ids": [1] * prompt,
            }
            for prompt, *answers in self.pairs
        ]


def longest_pair(data: DataSection, encoder_decoder: bool = False) -> tuple[int, int]:
    """Return prompt and answer tokens of the pair that takes the most memory among those that the data section allows.

    Both sequences fill max_length, and share as short a prompt as the limits allow.
    """
    length = data.max_length or 512
    if encoder_decoder:
        return min(length, data.max_prompt_length or length), min(length, data.max_completion_length or 128)
    answer = min(length - 1, data.max_completion_length or length - 1)
    return min(length - answer, data.max_prompt_length or length), answer


def pair_tokens(pair: tuple[int, ...], layout: str) -> int:
    """Count the tokens of a pair of a Shape in a layout."""
    prompt, *answers = pair
    if layout == "padded":
        return 2 * (prompt + max(answers))
    return (1 if layout == "shared" else 2) * prompt + answers[0] + answers[-1]


def batch_sizes(recipe: Recipe) -> tuple[int, int]:
    """Return pairs per micro-batch and micro-batches per optimizer step, before tokens_per_batch cuts them otherwise."""
    training = recipe.training
    return training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)


def micro_batch(recipe: Recipe, layout: str, encoder_decoder: bool) -> Shape:
    """Return the largest micro-batch that the recipe allows: all its pairs are the longest one."""
    prompt, answer = pair = longest_pair(recipe.data, encoder_decoder)
    count, why = batch_sizes(recipe)[0], "training.per_device_train_batch_size"
    budget = recipe.orpo.tokens_per_batch
    if budget:
        count, why = max(1, budget // pair_tokens(pair, layout)), f"orpo.tokens_per_batch of {budget:,}"
    words = f"{prompt:,} prompt and 2 x {answer:,} answer tokens, the split that takes the most memory"
    return Shape((pair,) * count, f"{count} x the longest pair that data allows ({words}); {why}")


def evaluation_pairs(recipe: Recipe) -> int:
    """Return the pairs of an evaluation batch; 0 where nothing is held out."""
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        return 0
    return recipe.training.get("per_device_eval_batch_size", 8)


def accumulates(recipe: Recipe) -> bool:
    """Check whether gradients of earlier micro-batches exist when another begins."""
    pairs, steps = batch_sizes(recipe)
    return steps > 1 or (recipe.orpo.tokens_per_batch is not None and pairs > 1)


# ---- the step --------------------------------------------------------------------------------------------------------


def scoring(model: Any) -> HeadTransform | None:
    """Find how training would score the model's head, on a small model of the same kind."""
    base: Any = unwrap(model)
    small = small_model(type(base), base.config, base.config._attn_implementation or "eager", torch.float32)
    return head_transform(small, torch.device("cpu"), 1e-3)


class Passes:
    """The collator and the two passes of training with the ORPO objective, over a model on the meta device."""

    def __init__(self, model: Any, recipe: Recipe, transform: HeadTransform | None) -> None:
        chunk = None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk
        settings = SimpleNamespace(**recipe.orpo.model_dump(), head_chunk=chunk)
        self.model, self.objective = model, Objective(settings, model.config, transform)

    def batch(self, shape: Shape, recipe: Recipe, layout: str) -> dict[str, Any]:
        """Collate the pairs of a shape."""
        encoder_decoder = self.model.config.is_encoder_decoder
        collator: Any = PaddedCollator(0, recipe.orpo.nll_scope, 0 if encoder_decoder else None)
        if layout != "padded":
            collator = PackedCollator(recipe.orpo.nll_scope, share=layout == "shared")
        rows = shape.rows
        if encoder_decoder:  # only the encoder sees the prompt
            for row in rows:
                row |= {side: row[side][row["chosen_start"] :] for side in ("chosen_ids", "rejected_ids")}
        return collator(rows)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of a micro-batch that makes up its optimizer step."""
        return self.objective.loss(self.model, [batch], count_step([batch]))[0]

    def evaluate(self, batch: dict[str, Any]) -> None:
        """Run an evaluation's forward pass."""
        self.objective.statistics(self.model, batch)


@dataclass
class Traced:
    """The memory and work of a step of a model with some of its layers."""

    peaks: dict[Segment, Counter[str]]
    """Bytes by purpose at the fullest moment of each segment."""
    facts: Counter[str]
    """Numbers that grow with the layers: parameters, trained ones, bytes of the optimizer by place, and the work of the
    micro-batch's forward and backward pass."""
    optimizer: str


def trace(
    recipe: Recipe,
    config: Any,
    target: Target,
    dtype: torch.dtype,
    layout: str,
    shape: Shape,
    transform: HeadTransform | None,
    layers: int | None = None,
    recomputed: int | None = None,
    passes: Callable[..., Any] = Passes,
) -> Traced:
    """Run one step with `layers` of the decoder's layers (None: all), the first `recomputed` of them checkpointed.

    `passes` makes the collator and passes to trace, from model, recipe and transform.
    """
    model = build(recipe, config, dtype, layers, recomputed != 0)
    if recipe.orpo.disable_dropout:
        disable_dropout(model)
    cuda = target.kind == "cuda"
    host = HostOfPlan() if recipe.memory.offload_activations and cuda else None
    checkpoint(model, recomputed, host)
    timeline = Timeline(target.block, cuda_workspace if cuda else no_workspace)
    hold_model(timeline, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = optimizer_states(optimizer_name(recipe), trained, cuda)
    timeline.take(states.device, OPTIMIZER)
    made = passes(model, recipe, transform)
    mark_layers(timeline, unwrap(model))
    with timeline, Kernels(target).emulate():
        if dtype != torch.float32:  # as accelerate wraps a prepared model
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(model.forward))
        held_out = evaluation_pairs(recipe)
        if held_out:
            longest = Shape(shape.held_out or shape.pairs[:1] * held_out, shape.why)
            evaluation(timeline, made, made.batch(longest, recipe, layout))
        training_step(timeline, made, trained, made.batch(shape, recipe, layout), accumulates(recipe))
        timeline.take(states.step, OPTIMIZER)
    facts = timeline.work | Counter({
        "parameters": sum(map(weights, model.parameters())), "trained": sum(p.numel() for p in trained),
        "optimizer on the host": states.host, "optimizer on the device": states.device, MOVED: host.bytes if host else 0,
    })  # fmt: skip
    return Traced(timeline.peaks(), facts, states.why)


def to_meta(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(META) if isinstance(value, Tensor) else value for key, value in batch.items()}


def evaluation(timeline: Timeline, passes: Any, batch: dict[str, Any]) -> None:
    """Run an evaluation batch between two steps: without gradients, and with nothing kept for a backward pass."""
    timeline.segment = ("evaluation", "start")
    passes.model.eval()
    with torch.no_grad():
        passes.evaluate(to_meta(batch))
    passes.model.train()


def training_step(
    timeline: Timeline, passes: Any, trained: list[Tensor], batch: dict[str, Any], accumulated: bool
) -> None:
    """Run forward and backward pass of a micro-batch, the last of its step, and gradient clipping."""
    timeline.segment = ("forward", "start")
    if accumulated:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    hold_gradients(timeline, trained)
    loss = passes.loss(to_meta(batch))
    timeline.segment = ("backward", "end" if decoder_layers(unwrap(passes.model)) is not None else "start")
    # loss.backward() would leave the function mode, and recompute layers without autocast
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    hold_gradients(timeline, trained)
    timeline.segment = ("step", "")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)


def hold_gradients(timeline: Timeline, trained: list[Tensor]) -> None:
    for parameter in trained:
        if parameter.grad is not None:
            timeline.hold(parameter.grad, GRADIENTS)


def weights(parameter: Tensor) -> int:
    """Count the weights that a parameter stands for: 4-bit ones are packed."""
    state: Any = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


class HostOfPlan:
    """The host's memory in a plan: offloaded tensors are gone until they return, except the last ones sent."""

    def __init__(self) -> None:
        self.bytes = 0
        self._copying: deque[Tensor] = deque(maxlen=COPYING)

    def pack(self, tensor: Tensor) -> Any:
        if tensor.nbytes < SMALLEST or isinstance(tensor, nn.Parameter):
            return tensor
        self.bytes += tensor.nbytes
        self._copying.append(tensor)
        return tensor.shape, tensor.dtype

    def unpack(self, kept: Any) -> Tensor:
        self._copying.clear()
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1], device=META)


def checkpoint(model: Any, recomputed: int | None, host: HostOfPlan | None) -> None:
    """Recompute activations of the first layers, and offload the rest of what they keep, as the trainer does."""
    if recomputed == 0:
        return
    base: Any = unwrap(model)
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if recomputed is not None:
        CheckpointedLayers(recomputed).on_train_begin(None, None, None, base)
    if host:
        offload(checkpointing_layers(base)[:recomputed], host)


def mark_layers(timeline: Timeline, base: Any) -> None:
    """Make the timeline's segment follow the step from layer to layer, forward and backward."""
    layers = decoder_layers(base)
    if layers is None:
        return

    def enters(segment: Segment) -> Any:
        def hook(_: Tensor) -> None:
            timeline.segment = segment

        return hook

    def before(number: int, module: nn.Module, args: tuple) -> None:
        phase = timeline.segment[0]
        if phase in ("forward", "evaluation"):
            timeline.segment = (phase, number)
            if number == 0 and args and args[0].requires_grad:
                args[0].register_hook(enters(("backward", "start")))

    def after(number: int, module: nn.Module, args: tuple, output: Any) -> None:
        phase = timeline.segment[0]
        if phase in ("forward", "evaluation"):
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(enters(("backward", number)))
            if number == len(layers) - 1:
                timeline.segment = (phase, "end")

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(before, i))
        layer.register_forward_hook(functools.partial(after, i))
