"""Does the merged model say what base and adapter say? Both run layer by layer from their files, in little memory.

Every linear layer multiplies while its weights are read, in blocks; everything else has its weights only while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from orpo_lite.merging.base import Base
from orpo_lite.merging.edits import NAME, bare
from orpo_lite.merging.mapping import Link
from orpo_lite.merging.stream import first, part
from orpo_lite.merging.tensors import Block, Source, blocks


@dataclass(frozen=True)
class Drift:
    """How far one model's next-token distributions are from another's, over the same tokens.

    Attributes:
        kl: mean Kullback-Leibler divergence from the reference, nats a token.
        top1: share of positions with the same most likely token.
        nll: of the reference and of the other, nats a token.
        spread: mean absolute difference of the logits, of the reference's standard deviation.
    """

    kl: float
    top1: float
    nll: tuple[float, float]
    spread: float

    def __str__(self) -> str:
        return f"KL {self.kl:.2g}, top-1 agreement {self.top1:.1%}, NLL {self.nll[0]:.4f} before and {self.nll[1]:.4f} after"


def compare(reference: Tensor, other: Tensor, tokens: Tensor) -> Drift:
    """Compare logits (B, T, V) of two models on tokens (B, T)."""
    a, b = (logits[:, :-1].log_softmax(-1) for logits in (reference, other))
    target = tokens[:, 1:, None]
    return Drift(
        kl=max(0.0, (a.exp() * (a - b)).sum(-1).mean().item()),  # rounding makes it negative where they are the same
        top1=(reference.argmax(-1) == other.argmax(-1)).float().mean().item(),
        nll=(-a.gather(-1, target).mean().item(), -b.gather(-1, target).mean().item()),
        spread=((other - reference).abs().mean() / reference.std()).item(),
    )


class Weights:
    """A base's parameters by name, read from its files: whole, or in blocks."""

    def __init__(self, base: Base):
        self.base = base
        self.homes: dict[str, list[tuple[Source, Link]]] = {}
        for key, links in base.keys.links.items():
            for link in links:
                self.homes.setdefault(link.parameter, []).append((base.sources[key], link))
        for one, other in base.tied.items():
            found = self.homes.get(one) or self.homes.get(other)
            if found:
                self.homes.setdefault(one, found)
                self.homes.setdefault(other, found)

    def whole(self, name: str, shape: torch.Size, ids: Tensor | None = None) -> Tensor:
        """The parameter in float32; of an embedding only the rows of these tokens, if given."""
        full = torch.zeros(shape)
        for source, link in self.homes[name]:
            read = source.reader()
            for block in blocks(source.shape):
                weights = read(block)
                found = part(weights, first(block, weights.dim()), link)
                if found is None:
                    continue
                view, start = found
                if ids is None:
                    full[tuple(slice(s, s + n) for s, n in zip(start, view.shape, strict=True))] = view.float()
                else:
                    here = ids[(ids >= start[0]) & (ids < start[0] + view.shape[0])].unique()
                    full[here] = view[here - start[0]].float()
        return full

    def rows(self, name: str) -> tuple[tuple[int, ...], Callable[[Block], Tensor]]:
        """Shape, and a reader of blocks, of a parameter that is one stored tensor."""
        ((source, _),) = self.homes[name]
        return source.shape, source.reader()

    def is_one(self, name: str) -> bool:
        homes = self.homes.get(name, [])
        return len(homes) == 1 and not homes[0][1].fixed and len(homes[0][1].shared) == len(homes[0][0].shape)


@torch.no_grad()
def run(base: Base, model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) in float32 of a skeleton, bare or with an adapter on it, fed from the base's files.

    Raises:
        RuntimeError: the model reaches for weights in a way that only works with all of them in memory.
    """
    weights = Weights(base)
    named: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for name, buffer in named.named_buffers():
        if bare(name) in weights.homes:
            buffer.copy_(weights.whole(bare(name), buffer.shape))
    undo: list[Callable[[], None]] = []
    try:
        for path, module in named.named_modules():
            undo += feed(path, module, weights)
        extra = {"decoder_input_ids": tokens} if named.config.is_encoder_decoder else {}
        with torch.autocast("cpu", enabled=False):
            return model(input_ids=tokens, use_cache=False, **extra).logits.float()
    except NotImplementedError as error:  # torch's word for an operation on the meta device
        raise RuntimeError(f"{type(named).__name__} uses weights of a layer outside of it") from error
    finally:
        for step in undo:
            step()


def feed(path: str, module: Any, weights: Weights) -> list[Callable[[], None]]:
    """Make a module compute from files; what undoes it."""
    name = bare(path)
    if isinstance(module, TrainableTokensWrapper):
        module.forward = partial(trained_tokens, module.token_adapter)
        return [partial(module.__dict__.pop, "forward")]
    if isinstance(module, lora.ParamWrapper) or (isinstance(module, lora.LoraLayer) and NAME in module.lora_variant):
        # of nested wrappers the outermost sees to the parameters of all
        return [] if path.endswith(".base_layer") else lend(module, module.get_base_layer(), name, weights)
    if isinstance(module, BaseTunerLayer) or any(word in path for word in ("lora_", "modules_to_save.")):
        return []
    if type(module) in COMPUTE and weights.is_one(f"{name}.weight"):
        module.forward = partial(COMPUTE[type(module)], module, name, weights)
        return [partial(module.__dict__.pop, "forward")]
    return lend(module, module, name, weights)


def lend(at: nn.Module, owner: nn.Module, name: str, weights: Weights) -> list[Callable[[], None]]:
    """Give `owner` its parameters while `at` runs."""
    kept = {leaf: value for leaf, value in owner.named_parameters(recurse=False) if value.is_meta}
    if not kept:
        return []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # an embedding needs the rows of its tokens only; memory that is never touched costs nothing
        ids = inputs[0] if isinstance(owner, nn.Embedding) and inputs else None
        for leaf, value in kept.items():
            found = weights.whole(f"{name}.{leaf}", value.shape, ids)
            owner._parameters[leaf] = nn.Parameter(found, requires_grad=False)

    def after(*_: object) -> None:
        owner._parameters.update(kept)

    handles = [at.register_forward_pre_hook(before), at.register_forward_hook(after, always_call=True)]
    return [handle.remove for handle in handles]


def bias_of(module: Any, name: str, weights: Weights) -> Tensor | None:
    bias = module.bias
    return weights.whole(f"{name}.bias", bias.shape) if bias is not None and bias.is_meta else bias


def linear(module: nn.Linear, name: str, weights: Weights, x: Tensor) -> Tensor:
    shape, read = weights.rows(f"{name}.weight")
    out = x.new_zeros(*x.shape[:-1], module.weight.shape[0])
    for block in blocks(shape):
        out[..., block[0]] = F.linear(x, read(block).float())
    bias = bias_of(module, name, weights)
    return out if bias is None else out + bias


def conv1d(module: Conv1D, name: str, weights: Weights, x: Tensor) -> Tensor:
    shape, read = weights.rows(f"{name}.weight")
    out = x.new_zeros(*x.shape[:-1], shape[1])
    for block in blocks(shape):
        out += x[..., block[0]] @ read(block).float()
    bias = bias_of(module, name, weights)
    return out if bias is None else out + bias


def embedding(module: nn.Embedding, name: str, weights: Weights, ids: Tensor) -> Tensor:
    shape, read = weights.rows(f"{name}.weight")
    out = torch.zeros(*ids.shape, shape[1])
    for block in blocks(shape):
        here = (ids >= block[0].start) & (ids < block[0].stop)
        if here.any():
            out[here] = read(block)[ids[here] - block[0].start].float()
    return out


COMPUTE = {nn.Linear: linear, Conv1D: conv1d, nn.Embedding: embedding}


def trained_tokens(adapter: Any, x: Tensor) -> Tensor:
    """An embedding or tied head of which some rows were trained, without a copy of the whole of it."""
    own = adapter.tied_adapter or adapter
    index, rows = torch.tensor(own.token_indices[NAME]), own.trainable_tokens_delta[NAME].float()
    out = adapter.base_layer(x)
    if not isinstance(adapter.base_layer, nn.Embedding):
        out[..., index] = F.linear(x, rows)
        return out
    scale = adapter._get_embed_scale()
    for place, row in zip(index, rows, strict=True):
        out[x == place] = row if scale is None else row * scale.float()
    return out


def need(model: nn.Module) -> int:
    """Bytes of float32 weights that `run` holds at once at most: the largest module that cannot be streamed."""
    named: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    largest = 0
    for module in named.modules():
        streamed = type(module) in COMPUTE or isinstance(module, nn.Embedding)
        if isinstance(module, lora.LoraLayer) and NAME in module.lora_variant:
            module, streamed = module.get_base_layer(), False
        if not streamed:
            held = [math.prod(p.shape) * 4 for p in module.parameters(recurse=False) if p.is_meta]
            largest = max(largest, sum(held))
    return largest
