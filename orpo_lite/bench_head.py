"""The output head alone, against full logits and the kernels of TRL and Liger, on the model's own head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_lite.head import HeadTransform, token_logps
from orpo_lite.ledger import peak_over
from orpo_lite.loss import orpo_loss

ROWS, PAIRS, CHUNK = 2048, 4, 256
"""Label rows as 4 pairs of 2 x 256 tokens."""


def race_heads(model: Any, repeats: int) -> dict[str, Any]:
    """Forward and backward of the ORPO loss of 2,048 label rows through a frozen head, from the hidden states on."""
    from orpo_lite.bench import interleaved, ratios

    weight: Tensor = model.get_output_embeddings().weight.detach()
    if not weight.is_floating_point():
        return {
            "shape": "quantised head",
            "chunk": CHUNK,
            "contestants": {},
            "absent": {"all": "the head is quantised"},
        }
    transform = HeadTransform.of(model.config)
    g = torch.Generator(weight.device).manual_seed(0)
    hidden = torch.randn(ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype, generator=g) * 0.5
    labels = torch.randint(len(weight), (ROWS,), device=weight.device, generator=g)
    losses = {
        "ours": lambda h: loss_of(token_logps(h, weight, labels, None, transform.softcap, transform.scale, CHUNK)),  # type: ignore[arg-type]
        "full logits": lambda h: loss_of(full_logits(h, weight, labels, transform)),
    }
    absent: dict[str, str] = {}
    try:
        from trl.kernels import ChunkedLogProbFunction

        chunk = 32768  # columns of the vocabulary, as TRL sets it
        losses["trl"] = lambda h: loss_of(
            ChunkedLogProbFunction.apply(h, weight, None, labels, 1.0, chunk, transform.softcap, transform.scale, ())[0]
        )
    except ImportError as error:
        absent["trl"] = str(error)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss  # pyright: ignore[reportMissingImports]

        if transform.softcap or transform.scale != 1.0:
            raise ImportError("its loss knows no softcap and no scale")
        liger = LigerFusedLinearORPOLoss(compiled=weight.is_cuda)
        shape = (2 * PAIRS, ROWS // (2 * PAIRS))
        losses["liger"] = lambda h: liger(weight, h.view(*shape, -1), labels.view(shape))[0]
    except ImportError as error:
        absent["liger"] = str(error)

    works, got = {}, {}
    for name, loss in losses.items():

        def work(name: str = name, loss: Any = loss) -> None:
            h = hidden.clone().requires_grad_()
            value = loss(h)
            value.backward()
            got[name] = value.item(), h.grad

        works[name] = work
    peaks = {name: peak_over(work, weight.device) for name, work in works.items()}
    expected, gradient = got["full logits"]
    for name, (value, grad) in got.items():
        distance = ((grad.float() - gradient.float()).norm() / gradient.float().norm()).item()
        if abs(value - expected) > 1e-2 or distance > (1e-4 if weight.dtype is torch.float32 else 5e-2):
            raise RuntimeError(
                f"head: {name} gives {value}, full logits {expected}; gradients differ by {distance:.2g}"
            )
    seconds = interleaved(works, repeats)
    contestants: dict[str, Any] = {}
    for name in works:
        contestants[name] = {"seconds": seconds[name], "peak_bytes": peaks[name]}
        if name != "ours":
            contestants[name]["ours_time_share"] = ratios(seconds["ours"], seconds[name])
            contestants[name]["ours_memory_share"] = peaks["ours"] / peaks[name]
    shape_said = f"N={ROWS}, H={weight.shape[1]}, V={len(weight)}, {str(weight.dtype).removeprefix('torch.')}"
    return {"shape": shape_said, "chunk": CHUNK, "contestants": contestants, "absent": absent}


def loss_of(logps: Tensor) -> Tensor:
    """ORPO loss of the rows as pairs: the first half of the sequences chosen, each row a label of the answer."""
    chosen, rejected = logps.view(2, PAIRS, -1).mean(-1)
    return orpo_loss(chosen, rejected, -chosen.mean())


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, transform: HeadTransform) -> Tensor:
    """What a plain implementation does: all logits in float32, then a log-softmax."""
    z = F.linear(hidden, weight).float() * transform.scale
    if transform.softcap:
        z = torch.tanh(z / transform.softcap) * transform.softcap
    return z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
