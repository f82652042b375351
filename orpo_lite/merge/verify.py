"""Does the merged model say what base and adapter say? Both run layer by layer from their files, in little memory.

Every linear layer multiplies while its weights are read, in blocks; everything else has its weights only while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from peft.tuners import lora
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from orpo_lite.merge.base import Base
from orpo_lite.merge.lora_edits import NAME, bare
from orpo_lite.merge.safetensors_blocks import Block, Source, blocks
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.workers import each_block
from orpo_lite.merge.write import first, part

T = TypeVar("T")


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
    kl, before, after = 0.0, 0.0, 0.0
    for one, two, row in zip(reference, other, tokens, strict=True):  # in float64, so a sequence at a time
        a, b = one[:-1].double().log_softmax(-1), two[:-1].double().log_softmax(-1)
        kl += (a.exp() * (a - b)).sum(-1).mean().item() / len(tokens)
        before -= a.gather(-1, row[1:, None]).mean().item() / len(tokens)
        after -= b.gather(-1, row[1:, None]).mean().item() / len(tokens)
    return Drift(
        kl=kl,
        top1=(reference.argmax(-1) == other.argmax(-1)).float().mean().item(),
        nll=(before, after),
        spread=((other - reference).abs().mean() / reference.std().clamp(min=1e-30)).item(),  # of a model of zeros too
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

    def whole(self, name: str, shape: torch.Size) -> Tensor:
        """The parameter in float32."""
        full = torch.zeros(shape)

        def place(view: Tensor, start: list[int]) -> None:
            full[tuple(slice(s, s + n) for s, n in zip(start, view.shape, strict=True))] = view.float()

        for source, link in self.homes[name]:
            for _ in views(source, link, place):
                pass
        return full

    def rows(self, name: str, ids: Tensor, size: int) -> Tensor:
        """Rows (..., size) of an embedding in float32; blocks without one of them are not read."""
        wanted, where = ids.unique(return_inverse=True)
        table = torch.zeros(len(wanted), size)
        for source, link in self.homes[name]:
            read = source.reader()
            for block in blocks(source.shape):
                shape = [p.stop - p.start for p in block] + list(source.shape[len(block) :])
                found = part(torch.empty(shape, device="meta"), first(block, len(shape)), link)
                if found is None:
                    continue
                (begin, column), (length, width) = found[1], found[0].shape
                here = (wanted >= begin) & (wanted < begin + length)
                if here.any():
                    view, _ = part(read(block), first(block, len(shape)), link)  # type: ignore[misc]  # as `found`
                    table[here, column : column + width] = view[wanted[here] - begin].float()
        return table[where]

    def product(self, name: str, x: Tensor, size: int, turned: bool = False) -> Tensor:
        """x (..., in) times a parameter (size, in), or (in, size) if turned, block by block."""
        out = x.new_zeros(*x.shape[:-1], size)

        def multiply(view: Tensor, start: list[int]) -> tuple[slice, Tensor]:
            rows, columns = (slice(s, s + n) for s, n in zip(start, view.shape, strict=True))
            if turned:
                return columns, x[..., rows] @ view.float()
            return rows, F.linear(x[..., columns], view.float())

        for source, link in self.homes[name]:
            for place, result in views(source, link, multiply):
                out[..., place] += result
        return out


def views(source: Source, link: Link, function: Callable[[Tensor, list[int]], T]) -> Iterator[T]:
    """Apply a function to the blocks of a stored tensor that are blocks of a parameter, and their first indices in it."""
    read = source.reader()

    def apply(block: Block) -> T | None:
        weights = read(block)
        found = part(weights, first(block, weights.dim()), link)
        return None if found is None else function(*found)

    for _, result in each_block(apply, source.shape):
        if result is not None:
            yield result


PLAIN = {"shape", "layout", "requires_grad", "grad", "ndim", "is_sparse", "names", "is_cuda", "grad_fn"}
"""Properties of a parameter that need none of its weights."""


class Fed(TorchFunctionMode):
    """Gives torch's functions a parameter's weights at the moment they are called with it.

    Wherever a model uses it: many reach for the weights of a layer without calling the layer. To the model, parameters
    look as if they were float32 on the CPU.
    """

    def __init__(self, model: nn.Module, weights: Weights):
        super().__init__()
        self.weights = weights
        self.names = {id(value): bare(name) for name, value in model.named_parameters(remove_duplicate=False)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            asked = func.__self__.__name__
            if asked in ("device", "dtype", "is_meta") and id(args[0]) in self.names:
                return {"device": torch.device("cpu"), "dtype": torch.float32, "is_meta": False}[asked]
            if asked in PLAIN:
                return func(*args, **kwargs)
        if func is F.linear and self.absent(args[1]):
            bias = self.real(args[2] if len(args) > 2 else kwargs.get("bias"))
            out = self.weights.product(self.name(args[1]), args[0], args[1].shape[0])
            return out if bias is None else out + bias
        if func is torch.addmm and len(args) == 3 and not kwargs and self.absent(args[2]):  # Conv1D
            return self.weights.product(self.name(args[2]), args[1], args[2].shape[1], turned=True) + self.real(args[0])
        if func is F.embedding and self.absent(args[1]):
            return self.weights.rows(self.name(args[1]), args[0], args[1].shape[1])
        return func(*tree_map(self.real, args), **tree_map(self.real, kwargs))

    def absent(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_meta

    def name(self, value: Tensor) -> str:
        name = self.names.get(id(value))
        if name not in self.weights.homes:
            raise RuntimeError(f"{name or 'a tensor'} has no weights in the checkpoint: the model makes them itself")
        return name

    def real(self, value: Any) -> Any:
        if self.absent(value):
            return self.weights.whole(self.name(value), value.shape)
        if id(value) in self.names and value.is_floating_point() and value.dtype != torch.float32:
            return value.float()
        return value


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
        with torch.autocast("cpu", enabled=False), Fed(named, weights):
            return model(input_ids=tokens, use_cache=False, **extra).logits.float()
    finally:
        for step in undo:
            step()


def feed(path: str, module: Any, weights: Weights) -> list[Callable[[], None]]:
    """Make a module compute from files in its own way, if it has one; what undoes it."""
    if isinstance(module, TrainableTokensWrapper):
        module.forward = partial(trained_tokens, module.token_adapter)
        return [partial(module.__dict__.pop, "forward")]
    # experts are used one by one, and would be read as often
    kept = {leaf: value for leaf, value in module.named_parameters(recurse=False) if value.is_meta and value.dim() > 2}
    if not kept or path.endswith(".base_layer"):  # adapted ones are made once a call
        return []

    def before(*_: object) -> None:
        for leaf, value in kept.items():
            found = weights.whole(f"{bare(path)}.{leaf}", value.shape)
            module._parameters[leaf] = nn.Parameter(found, requires_grad=False)

    def after(*_: object) -> None:
        module._parameters.update(kept)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    return [handle.remove for handle in handles]


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
    """Bytes of float32 weights that `run` holds at once at most, for the module of the model that takes most."""
    named: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    largest = 0
    for each in named.modules():
        module: Any = each
        if isinstance(module, lora.LoraLayer) and NAME in module.lora_variant:
            # PEFT's DoRA: weights, change, their sum, its square and a copy
            held = 5 * sum(math.prod(p.shape) for p in module.get_base_layer().parameters(recurse=False))
        elif isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        else:
            held = sum(math.prod(p.shape) for p in each.parameters(recurse=False) if p.is_meta)
        largest = max(largest, 4 * held)
    return largest
