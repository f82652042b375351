"""Run one optimizer step of a recipe on meta tensors, with the trainer's own objective and every allocation logged."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks

from orpo_lite.data.collate import collator_of
from orpo_lite.model.activation_offload import CheckpointedLayers, checkpointing_layers, offload
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, head_transform
from orpo_lite.objective.layout import small_model
from orpo_lite.objective.one_call import Attention
from orpo_lite.plan.allocations import GRADIENTS, Segment, Timeline
from orpo_lite.plan.meta_model import decoder_layers
from orpo_lite.recipe import DataSection, Recipe
from orpo_lite.trainer.objective import Objective, count_step

META = torch.device("meta")


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
            }
            for prompt, *answers in self.pairs
        ]


def longest_pair(data: DataSection) -> tuple[int, int]:
    """Return prompt and answer tokens of the pair that takes the most memory among those that the data section allows.

    Both sequences fill max_length, and share as short a prompt as the limits allow.
    """
    length = data.max_length or 512
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
    return recipe.pairs_at_once, recipe.training.get("gradient_accumulation_steps", 1)


def micro_batch(recipe: Recipe, layout: str) -> Shape:
    """Return the largest micro-batch that the recipe allows: all its pairs are the longest one."""
    prompt, answer = pair = longest_pair(recipe.data)
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


def scoring(model: Any) -> HeadTransform | None:
    """Find how training would score a base's head, on a small model of the same kind."""
    small = small_model(type(model), model.config, model.config._attn_implementation or "eager", torch.float32)
    return head_transform(small, torch.device("cpu"), 1e-3)


class Passes:
    """The collator and the two passes of training with the ORPO objective, over a model on the meta device."""

    def __init__(self, model: Any, recipe: Recipe, transform: HeadTransform | None, attention: Attention) -> None:
        chunk = None if recipe.memory.head_chunk == "auto" else recipe.memory.head_chunk
        settings = SimpleNamespace(**recipe.orpo.model_dump(), head_chunk=chunk)
        self.model, self.objective = model, Objective(settings, model.config, transform)
        self.objective.attention = attention

    def batch(self, shape: Shape, recipe: Recipe, layout: str) -> dict[str, Any]:
        """Collate the pairs of a shape."""
        return collator_of(layout, recipe.orpo.nll_scope)(shape.rows)

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


def to_meta(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(META) if isinstance(value, Tensor) else value for key, value in batch.items()}


def evaluation(timeline: Timeline, passes: Passes, batch: dict[str, Any]) -> None:
    """Run an evaluation batch between two steps: without gradients, and with nothing kept for a backward pass."""
    timeline.segment = ("evaluation", "start")
    passes.model.eval()
    with torch.no_grad():
        passes.evaluate(to_meta(batch))
    passes.model.train()


def training_step(
    timeline: Timeline, passes: Passes, trained: list[Tensor], batch: dict[str, Any], accumulated: bool
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


class HostOfPlan(saved_tensors_hooks):
    """The host's memory in a plan: offloaded tensors are gone until they return."""

    def __init__(self) -> None:
        self.bytes = 0

        def pack(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
            self.bytes += tensor.nbytes
            return tensor.shape, tensor.dtype

        super().__init__(pack, lambda kept: torch.empty(kept[0], dtype=kept[1], device=META))


def checkpoint(model: Any, recomputed: int | None, host: HostOfPlan | None) -> None:
    """Recompute activations of the first layers, and offload the rest of what they keep, as the trainer does."""
    if recomputed == 0:
        return
    base: Any = unwrap(model)
    # its name until transformers 5.22
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
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


# ---- whole models, extrapolated exactly from short ones ----------------------------------------------------------------
#
# A decoder is a stack of layers that checkpoint and a stack of layers that do not, either of which may be empty. Let p be
# the period of the layers. From a stack of n layers to one of n + p, every moment of the step gains the same bytes: those
# that one more period holds. So the peak of a segment is linear in the height of either stack. A layer's segment is found
# in the shorter model by its position from the first or from the last layer of its stack.


def period(signatures: list[str]) -> int:
    """Return the fewest layers after which the stack repeats itself; all of them where it does not."""
    count = len(signatures)
    return next(
        (p for p in range(1, count) if all(a == b for a, b in zip(signatures, signatures[p:], strict=False))), count
    )


Heights = tuple[int, int]
"""Layers of the stack that checkpoints, and of the stack that does not."""


@dataclass
class Stacks:
    """Steps of a model with any number of checkpointed layers.

    Args:
        trace: traces a step of a model with a number of layers, the first so many of them checkpointed; it is asked
            for the same shorter model again and again.
        layers: layers of the whole model.
        each: their period.
    """

    trace: Callable[[int, int], Traced]
    layers: int
    each: int

    @property
    def edge(self) -> int:
        """Height from which a stack can be extrapolated: the layers at its ends are like no others."""
        return 3 * self.each

    def __call__(self, recomputed: int) -> Traced:
        """Return the whole model's step with the first `recomputed` layers checkpointed."""
        whole = (recomputed, self.layers - recomputed)
        short = (self._short(whole[0]), self._short(whole[1]))
        start = self.trace(sum(short), short[0])
        grown: list[tuple[Heights, Traced, int]] = []
        for stack in (0, 1):
            times = (whole[stack] - short[stack]) // self.each
            if times:
                heights = (short[0] + self.each * (stack == 0), short[1] + self.each * (stack == 1))
                grown.append((heights, self.trace(sum(heights), heights[0]), times))

        def extend(numbers: Callable[[Heights, Traced], Counter[str]]) -> Counter[str]:
            """Add what the further periods of either stack add to some numbers of the shortest model."""
            first = numbers(short, start)
            found = Counter(first)
            for heights, taller, times in grown:
                more = numbers(heights, taller)
                for key in first.keys() | more.keys():
                    found[key] += times * (more[key] - first[key])
            return found

        peaks: dict[Segment, Counter[str]] = {}
        for phase, place in start.peaks:
            for find in self._ways_to_find(place, short, whole):
                peaks[phase, find(whole)] = extend(
                    lambda heights, traced, phase=phase, find=find: traced.peaks[phase, find(heights)]
                )
        return Traced(peaks, extend(lambda _, traced: traced.facts), start.optimizer)

    def _short(self, height: int) -> int:
        """Return a height from which this one can be extrapolated."""
        return min(height, self.edge + height % self.each)

    def _ways_to_find(self, place: int | str, short: Heights, whole: Heights) -> list[Callable[[Heights], int | str]]:
        """Return how a place is found at other heights: a layer by its position from the front of its stack, or the back."""
        if not isinstance(place, int):
            return [lambda _: place]
        stack = int(place >= short[0])
        within, grows = place - short[0] * stack, whole[stack] > short[stack]
        ways: list[Callable[[Heights], int | str]] = []
        if not grows or within < short[stack] - self.each:
            ways.append(lambda heights: heights[0] * stack + within)
        if grows and within >= self.each:
            ways.append(lambda heights: heights[0] * stack + within + heights[stack] - short[stack])
        return ways
