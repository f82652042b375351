"""One optimizer step of a recipe on meta tensors, by the trainer's own code, with every allocation logged."""

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
from orpo_lite.model.activation_offload import SMALLEST, check_count, checkpointing_layers, offload
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, head_transform
from orpo_lite.objective.layout import disable_dropout, small_model
from orpo_lite.plan.allocations import GRADIENTS, MOVED, OPTIMIZER, Segment, Timeline
from orpo_lite.plan.kernels import Kernels, Target, cuda_workspace, no_workspace
from orpo_lite.plan.meta_model import build, decoder_layers, hold_model
from orpo_lite.plan.optimizer_memory import States, states
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.trainer.objective import Objective, count_step
from orpo_lite.trainer.trainer import ORPOTrainer

META = torch.device("meta")
COPYING = 2
"""ASSUMED. Tensors still on the card while they are copied to the host, beside the work of their layer and the next."""


@dataclass(frozen=True)
class Shape:
    """Pairs of a micro-batch, each by its tokens: prompt in common, then the chosen and the rejected answer (one number
    where they are of one length)."""

    pairs: tuple[tuple[int, ...], ...]
    why: str
    held_out: tuple[tuple[int, ...], ...] = ()
    """Pairs of an evaluation's batch; left out, as many of the first as the recipe says."""

    @property
    def batch(self) -> list[dict[str, Any]]:
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
    """Prompt and answer of the pair that takes the most memory of those that the data section lets through.

    Both sequences fill max_length, and as little as the limits allow is common to them.
    """
    length = data.max_length or 512
    if encoder_decoder:
        return min(length, data.max_prompt_length or length), min(length, data.max_completion_length or 128)
    answer = min(length - 1, data.max_completion_length or length - 1)
    return min(length - answer, data.max_prompt_length or length), answer


def pair_tokens(pair: tuple[int, ...], layout: str) -> int:
    """Tokens of a pair of a Shape, as a layout counts them."""
    prompt, *answers = pair
    if layout == "padded":
        return 2 * (prompt + max(answers))
    return (1 if layout == "shared" else 2) * prompt + answers[0] + answers[-1]


def micro_batch(recipe: Recipe, layout: str, encoder_decoder: bool) -> Shape:
    """The largest micro-batch that the recipe can meet: all its pairs are the longest one."""
    prompt, answer = pair = longest_pair(recipe.data, encoder_decoder)
    count, why = recipe.training.get("per_device_train_batch_size", 8), "training.per_device_train_batch_size"
    budget = recipe.orpo.tokens_per_batch
    if budget:
        count, why = max(1, budget // pair_tokens(pair, layout)), f"orpo.tokens_per_batch of {budget:,}"
    words = f"{answer:,} tokens of answer a side after {prompt:,} of prompt, the split that takes the most"
    return Shape((pair,) * count, f"{count} x the longest pair that data lets through ({words}); {why}")


def evaluation_pairs(recipe: Recipe) -> int:
    """Pairs of an evaluation's batch; 0 where nothing is held out."""
    if recipe.data.eval is None and not recipe.data.eval_fraction:
        return 0
    return recipe.training.get("per_device_eval_batch_size", 8)


def accumulates(recipe: Recipe) -> bool:
    """Whether gradients of earlier micro-batches are there when one begins."""
    return recipe.training.get("gradient_accumulation_steps", 1) > 1 or (
        recipe.orpo.tokens_per_batch is not None and recipe.training.get("per_device_train_batch_size", 8) > 1
    )


def scoring(model: Any) -> HeadTransform | None:
    """How the trainer will score the model's head, found as it finds it, on a small model of the kind."""
    base = unwrap(model)
    small = small_model(type(base), base.config, base.config._attn_implementation or "eager", torch.float32)
    return head_transform(small, torch.device("cpu"), 1e-3)


class PlannedTrainer(ORPOTrainer):
    """The trainer's loss over a model that weighs nothing; only what the loss asks for is there."""

    def __init__(self, model: Any, recipe: Recipe, transform: HeadTransform | None) -> None:
        self.model = model
        self.args = SimpleNamespace(  # type: ignore[assignment]
            nll_mean=recipe.orpo.nll_mean,
            beta=recipe.orpo.beta,
            head_chunk=None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk,
            device=META,
        )
        self.accelerator = SimpleNamespace(num_processes=1, unwrap_model=lambda wrapped: wrapped)  # type: ignore[assignment]
        self.objective = Objective(self.args, model.config, transform)
        self._sums = {}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    def batch(self, shape: Shape, recipe: Recipe, layout: str) -> dict[str, Any]:
        """The shape's pairs as the collator makes them a batch."""
        collator: Any = PaddedCollator(0, recipe.orpo.nll_scope, 0 if self.model.config.is_encoder_decoder else None)
        if layout != "padded":
            collator = PackedCollator(recipe.orpo.nll_scope, share=layout == "shared")
        pairs = shape.batch
        if self.model.config.is_encoder_decoder:  # the prompt is the encoder's alone
            for pair in pairs:
                pair |= {side: pair[side][pair["chosen_start"] :] for side in ("chosen_ids", "rejected_ids")}
        return collator(pairs)

    def micro_batch_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss of a micro-batch, the only one of its optimizer step."""
        return self.compute_loss(self.model, batch, num_items_in_batch=count_step([batch]))

    def score(self, batch: dict[str, Any]) -> None:
        """What an evaluation makes of a batch."""
        self.pair_statistics(self.model, batch)


@dataclass
class Traced:
    """What a step of a model with some of its layers holds."""

    peaks: dict[Segment, Counter[str]]
    """Bytes by part at the fullest moment of each segment."""
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
    kind: Callable[..., Any] = PlannedTrainer,
) -> Traced:
    """Run one step with `layers` of the decoder's layers (None: all), `recomputed` of them checkpointed (None: all).

    `kind` makes the trainer of model, recipe and transform; it has what PlannedTrainer adds to the real one.
    """
    model = build(recipe, config, dtype, layers, recomputed != 0)
    if recipe.orpo.disable_dropout:
        disable_dropout(model)
    host = HostOfPlan() if recipe.memory.offload_activations and target.kind == "cuda" else None
    checkpoint(model, recomputed, host)
    cuda = target.kind == "cuda"
    timeline = Timeline(target.block, cuda_workspace if cuda else no_workspace)
    hold_model(timeline, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = states(optimizer_name(recipe), trained, cuda)
    timeline.take(held.device, OPTIMIZER)
    kernels = Kernels(target)
    trainer = kind(model, recipe, transform)
    mark_layers(timeline, unwrap(model))
    with timeline, kernels.standing_in():
        if dtype != torch.float32:  # as accelerate wraps a prepared model
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=dtype)(model.forward))
        held_out = evaluation_pairs(recipe)
        if held_out:
            longest = Shape(shape.held_out or shape.pairs[:1] * held_out, shape.why)
            evaluate(timeline, trainer, trainer.batch(longest, recipe, layout))
        run(timeline, trainer, trained, trainer.batch(shape, recipe, layout), accumulates(recipe), held)
    weights = sum(unpacked(p) for p in model.parameters())
    facts = Counter({"parameters": weights, "trained": sum(p.numel() for p in trained),
                     "optimizer on the host": held.host, "optimizer on the device": held.device})  # fmt: skip
    facts |= timeline.work | Counter({MOVED: host.bytes if host else 0})
    return Traced(timeline.peaks(), facts, held.why)


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(META) if isinstance(value, Tensor) else value for key, value in batch.items()}


def evaluate(timeline: Timeline, trainer: PlannedTrainer, batch: dict[str, Any]) -> None:
    """A batch of an evaluation between two steps: no gradients, nothing kept for a backward pass."""
    timeline.segment = ("evaluation", "start")
    trainer.model.eval()
    with torch.no_grad():
        trainer.score(moved(batch))
    trainer.model.train()


def run(
    timeline: Timeline,
    trainer: PlannedTrainer,
    trained: list[Tensor],
    batch: dict[str, Any],
    accumulated: bool,
    held: States,
) -> None:
    """Forward, backward, step: what transformers' Trainer does with a micro-batch, the last of its window."""
    timeline.segment = ("forward", "start")
    if accumulated:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            timeline.hold(parameter.grad, GRADIENTS)
    on_device, model = moved(batch), trainer.model
    loss = trainer.micro_batch_loss(on_device)
    timeline.segment = ("backward", "end" if decoder_layers(unwrap(model)) is not None else "start")
    # loss.backward() would run outside of the function mode, and recompute layers without autocast
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    for parameter in trained:
        if parameter.grad is not None:
            timeline.hold(parameter.grad, GRADIENTS)
    timeline.segment = ("step", "")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    timeline.take(held.step, OPTIMIZER)


def optimizer_name(recipe: Recipe) -> str:
    """training.optim, or transformers' default."""
    from transformers import TrainingArguments

    default = TrainingArguments.__dataclass_fields__["optim"].default
    return str(recipe.training.get("optim") or default or TrainingArguments.default_optim)


def unpacked(parameter: Tensor) -> int:
    """Number of weights a parameter stands for: 4-bit ones are packed."""
    state: Any = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


class HostOfPlan:
    """The host's memory, as a plan sees it: tensors are gone until they come back, but for the last that were sent."""

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
    """Recompute activations of the first so many layers, and offload what they keep, as the trainer does."""
    if recomputed == 0:
        return
    base = unwrap(model)
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if recomputed is None and host is None:
        return
    layers = checkpointing_layers(base)
    check_count(recomputed, len(layers))
    count = len(layers) if recomputed is None else recomputed
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count  # type: ignore[assignment]
    if host:
        offload(layers[:count], host)


def mark_layers(timeline: Timeline, base: Any) -> None:
    """Let the timeline's segment follow the step from layer to layer, forward and back."""
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
