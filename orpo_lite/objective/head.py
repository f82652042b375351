"""Token log-probs straight from hidden states: never more than a chunk of rows of logits.

Logits of two 2,048-token sequences over 128,256 words are 2.1 GB in float32, and plain code keeps several copies.
With a frozen head, which LoRA has, one pass is enough: while a chunk's logits are there, form

    d logp(y | h) / d h  =  W[y] - softmax(W h) @ W

and keep that, the size of the hidden states. The backward pass is then one product with the incoming gradient,
whatever the loss, and nothing is recomputed. A trained head recomputes its chunks in the backward pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


class _FrozenHead(torch.autograd.Function):
    """One pass over the rows: log-probs, mean logits, and d logp / d hidden where a gradient will be needed."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, softcap, scale, chunk):
        n = len(hidden)
        means, totals = (torch.empty(n, 1, dtype=torch.float32, device=hidden.device) for _ in range(2))
        # a softcap bends logits once more than 16 bits bear; else every step fits in the one buffer, sums alone being wider
        wide = torch.float32 if softcap else weight.dtype
        tops, picked = (torch.empty(n, 1, dtype=wide, device=hidden.device) for _ in range(2))
        slope = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        minus_one = torch.full_like(picked, -1)
        # one buffer for all chunks: on a CPU fresh memory costs more than the arithmetic done in it
        buffer = torch.empty(min(chunk, n), len(weight), dtype=weight.dtype, device=hidden.device)
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            y = labels[rows, None]
            z = torch.mm(hidden[rows].to(weight.dtype), weight.t(), out=buffer[: len(y)])
            if bias is not None:
                z.add_(bias)
            z = z.to(wide)
            if scale != 1.0:
                z.mul_(scale)
            inner = None
            if softcap:
                z.div_(softcap).tanh_()
                inner = z.square().neg_().add_(1) if slope is not None else None  # d softcap(x) / d x, from its output
                z.mul_(softcap)
            torch.mean(z, -1, True, dtype=torch.float32, out=means[rows])
            torch.gather(z, 1, y, out=picked[rows])
            # the softmax replaces the logits in place, and the log of its sum is taken on the way
            z.sub_(torch.amax(z, -1, True, out=tops[rows])).exp_()
            torch.sum(z, -1, True, dtype=torch.float32, out=totals[rows])
            if slope is None:
                continue
            z.div_(totals[rows]).scatter_add_(1, y, minus_one[rows])
            if inner is not None:
                z.mul_(inner)
            torch.mm(z if wide == weight.dtype else buffer[: len(y)].copy_(z), weight, out=slope[rows])
        logps, means = (picked.float() - tops - totals.log_()).squeeze(1), means.squeeze(1)
        if slope is not None:
            slope.mul_(-scale)
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(means)
        return logps, means

    @staticmethod
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(ctx.dtype), None, None, None, None, None, None


def _bent(z: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Scale and cap a head's output (N, V), in float32."""
    z = z.float() * scale if scale != 1.0 else z.float()
    return torch.tanh(z / softcap) * softcap if softcap else z


def _score(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log-probs of the labels and mean logits of rows of float32 logits."""
    return z.gather(1, labels[:, None]).squeeze(1) - torch.logsumexp(z, -1), z.detach().mean(-1)


def auto_chunk(vocabulary: int, dtype: torch.dtype = torch.float32) -> int:
    """Choose the rows of logits held at a time: about 64 MB, at least 64 rows, at most 1,024."""
    return max(64, min(1024, (1 << 26) // dtype.itemsize // vocabulary // 8 * 8))


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    with_means: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log softmax(softcap(scale * (hidden @ weight.T + bias)))[label] of every row.

    Equal to `F.log_softmax(logits.float(), -1).gather(1, labels[:, None])` without ever holding more than `chunk`
    rows of the logits. The gradient reaches `hidden`, and `weight` and `bias` where they require one.

    Args:
        hidden: (N, H), float16, bfloat16 or float32.
        weight: output head, (V, H).
        labels: (N,) int64, each in [0, V).
        bias: (V,) or None.
        softcap: cap * tanh(logits / cap) as in Gemma 2.
        scale: factor on the logits as in Cohere and Granite.
        chunk: rows of logits at a time; None takes `auto_chunk`.
        with_means: also return the mean logit of each row, (N,) float32, detached.

    Returns:
        (N,) float32 log-probs.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"expected hidden (N, H), weight (V, H) and labels (N,); got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    chunk = chunk or auto_chunk(len(weight), torch.float32 if trained or softcap else weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if trained:
            logps, means = _recomputed(
                lambda h: _bent(nn.functional.linear(h.to(weight.dtype), weight, bias), softcap, scale),
                hidden,
                labels,
                chunk,
            )
        else:
            bias = None if bias is None else bias.to(weight.dtype)
            logps, means = _FrozenHead.apply(hidden, weight, labels, bias, softcap, scale, chunk)  # type: ignore[misc]
    return (logps, means) if with_means else logps


def _recomputed(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Score chunks with any differentiable head, each recomputed in the backward pass."""
    parts = [
        checkpoint(lambda h, y: _score(logits(h), y), h, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    logps, means = zip(*parts, strict=True) if parts else ((hidden.new_empty(0).float(),),) * 2
    return torch.cat(logps), torch.cat(means)


@dataclass
class HeadTransform:
    """Transformation that a model applies to its head's output to get logits."""

    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, config: Any) -> HeadTransform:
        """Read it from a config: final_logit_softcapping (Gemma), logit_scale (Cohere), logits_scaling (Granite)."""
        config = config.get_text_config(decoder=True)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        return cls(getattr(config, "final_logit_softcapping", None), scale)


@dataclass
class LabelRows:
    """Rows of the last hidden states that carry a label; the forward pass fills in their log-probs."""

    rows: Tensor
    """Flat index into batch x length, (N,) int64."""
    labels: Tensor
    """(N,) int64."""
    logps: Tensor | None = field(default=None, init=False)
    means: Tensor | None = field(default=None, init=False)


@contextlib.contextmanager
def score_labels(model: nn.Module, target: LabelRows, transform: HeadTransform, chunk: int | None) -> Iterator[None]:
    """Make forward passes of `model` (an unwrapped transformers or PEFT model) score `target` instead of making logits.

    A pre-hook on the output head takes the final hidden states, scores the label rows and lets one row through; a
    hook on the model puts the log-probs in place of the logits, so that outer wrappers (DDP) see them as the
    output that the loss depends on. Both hooks are removed when the block ends.
    """
    head: nn.Module = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def take_hidden(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else next(iter(kwargs.values()))
        rows = hidden.flatten(0, -2).index_select(0, target.rows.to(hidden.device))
        target.logps, target.means = score_rows(module, rows, target.labels.to(hidden.device), transform, chunk)
        narrow = hidden[..., :1, :]
        return ((narrow, *args[1:]), kwargs) if args else ((), {key: narrow for key in kwargs})

    def put_logps(module: nn.Module, args: tuple, output: Any) -> Any:
        output.logits = target.logps
        return output

    hooks = (
        head.register_forward_pre_hook(take_hidden, with_kwargs=True),
        model.register_forward_hook(put_logps, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def score_rows(
    head: nn.Module, hidden: Tensor, labels: Tensor, transform: HeadTransform, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Compute log-probs and mean logits of label rows (N, H) under a head module of any kind.

    A plain linear layer goes through `token_logps`. Anything else (LoRA on the head, modules_to_save, a quantized
    head) is called as a module, chunk by chunk, so that nothing it does is lost.
    """
    if type(head) is nn.Linear:
        return token_logps(hidden, head.weight, labels, head.bias, transform.softcap, transform.scale, chunk, True)  # type: ignore[return-value]

    # forward, not __call__: the hook that called this function must not run again
    return _recomputed(
        lambda h: _bent(head.forward(h), transform.softcap, transform.scale), hidden, labels, chunk or 256
    )


def head_transform(model: Any, device: torch.device, tolerance: float) -> HeadTransform | None:
    """Find how a model's head is scored without its logits; None where only the whole logits will do.

    The model's own log-probs over one short sequence are compared with those of `score_labels`, which reveals families
    whose logits are not a linear head with a softcap or a scale, whatever their config says.

    Args:
        tolerance: largest difference of a log-prob that counts as rounding.
    """
    if model.get_output_embeddings() is None:
        return None
    transform = HeadTransform.of(model.config)
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
            target = LabelRows(torch.arange(len(expected), device=expected.device), expected.argmin(-1))
            with score_labels(model, target, transform, None):
                model(**inputs, use_cache=False)
    finally:
        model.train(was_training)
    assert target.logps is not None
    difference = (target.logps - expected.gather(1, target.labels[:, None]).squeeze(1)).abs().max().item()
    if difference <= tolerance:
        return transform
    words = "%s computes its logits by more than a head, a softcap and a scale (log-probs differ by %.2g)"
    logger.warning(f"{words}: whole logits are kept", type(model).__name__, difference)
    return None


def score_logits(logits: Tensor, target: LabelRows) -> tuple[Tensor, Tensor]:
    """Compute log-probs and mean logits of the label rows of whole logits (batch, length, V)."""
    flat = logits.flatten(0, -2)
    parts = [
        _score(flat.index_select(0, r).float(), y)
        for r, y in zip(target.rows.split(256), target.labels.split(256), strict=True)
    ]
    logps, means = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(means)
