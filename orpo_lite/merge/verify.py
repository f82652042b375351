"""Check that a merged model says what base and adapter say, before it gets its name.

Both models run layer by layer from their files, in little memory: every linear layer multiplies while its weights are
read in blocks, and everything else has its weights only while it runs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.lora_edits import NAME
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.merge.safetensors_blocks import Block, Read, Source, blocks
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.write import map_blocks, part
from orpo_lite.model.adapter import bare
from orpo_lite.recipe import ModelSection
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import read_record

T = TypeVar("T")
PROBE_TOKENS = 16
"""Tokens per probe: few, since they run on the CPU."""
TEXTS = (
    "The capital of France is Paris, and the largest city of Germany is Berlin. Both lie on rivers, and both were",
    "To boil an egg, put it into boiling water for eight minutes, then cool it under cold water before you peel it.",
    "def mean(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total / len(numbers)\n",
)
"""Probes where a run kept no training rows."""


def probe_tokens(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """Return token ids (B, T) to compare models on, and where they come from: training rows in run.json, else texts."""
    source, rowless = plan.adapters[0][0], set(plan.rowless.values())
    rows: list[list[int]] = []
    if (source / "run.json").is_file():
        rows = read_record(RunFolder(source)).probe
    origin = "training rows" if rows else "sentences"
    rows = rows or [tokenizer(text)["input_ids"] for text in TEXTS]  # type: ignore[misc]
    rows = [[i for i in row if i not in rowless] for row in rows]
    length = min(PROBE_TOKENS, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows]), f"{len(rows)} {origin} of {length} tokens"


@progress("comparing outputs with those of base and adapter")
def check_merged(
    plan: Plan,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    trained: tuple[ModelSection, torch.dtype] | None,
) -> list[str]:
    """Run merged and unmerged model layer by layer; return the drift in sentences.

    Args:
        trained: base and dtype of training, where those are other weights than the ones merged into.

    Raises:
        RuntimeError: the merged model is not the adapter model.
    """
    tokens, origin = probe_tokens(plan, tokenizer)
    probes, length = tokens, tokens.shape[1]
    if plan.new_tokens:  # no text may hold them, so they make a probe of their own
        probes = torch.cat([tokens, torch.tensor([(plan.new_tokens * length)[-length:]])])
    merged = Base(ModelSection(name_or_path=str(folder), quantization="none"))
    rows = len(merged.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if probes.max() >= rows:
        raise RuntimeError(
            f"the tokenizer writes token {probes.max()}, and the merged model has {rows} rows of embeddings"
        )
    try:
        expected = run(plan.base, plan.adapted, probes)
        found = run(merged, merged.model, probes)
    except Exception as error:  # a model may do anything with weights that are not there
        return [f"not verified: {type(plan.base.model).__name__} cannot be run from its files: {error}"]
    notes = [
        f"against base and adapter unmerged, on {origin}: {drift(expected[: len(tokens)], found[: len(tokens)], tokens)}"
    ]
    # of the logits' standard deviation; also of a model of zeros
    distance = (found - expected).abs().mean() / expected.std().clamp(min=1e-30)
    if not distance < (1e-3 if plan.dtype == torch.float32 else 0.1):
        raise RuntimeError(f"the merged model is not the adapter model ({notes[0]}); nothing was written")
    if trained is not None:
        notes.append(drift_from_training(plan, tokenizer, tokens, found[: len(tokens)], trained))
    return notes


def drift_from_training(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    merged_logits: Tensor,
    trained: tuple[ModelSection, torch.dtype],
) -> str:
    """Compare with the quantized base and the adapter of training; return a sentence."""
    try:
        base = Base(trained[0], "quantized", trained[1])
        as_trained = run(base, make_plan(plan.adapters, base, tokenizer).adapted, tokens)
    except (RequestError, RuntimeError) as error:
        return f"not compared with the quantized base of training: {error}"
    return f"against the quantized base and adapter of training: {drift(as_trained, merged_logits, tokens)}"


def drift(reference: Tensor, other: Tensor, tokens: Tensor) -> str:
    """Compare next-token distributions of two models by their logits (B, T, V) on tokens (B, T).

    KL divergence from the reference and negative log-likelihood are in nats per token.
    """
    kl, before, after = 0.0, 0.0, 0.0
    for one, two, row in zip(reference, other, tokens, strict=True):  # in float64, so a sequence at a time
        a, b = one[:-1].double().log_softmax(-1), two[:-1].double().log_softmax(-1)
        kl += (a.exp() * (a - b)).sum(-1).mean().item() / len(tokens)
        before -= a.gather(-1, row[1:, None]).mean().item() / len(tokens)
        after -= b.gather(-1, row[1:, None]).mean().item() / len(tokens)
    top1 = (reference.argmax(-1) == other.argmax(-1)).float().mean().item()
    return f"KL {kl:.2g}, top-1 agreement {top1:.1%}, NLL {before:.4f} before and {after:.4f} after"


class Weights:
    """A base's parameters by name, read from its files as a whole or in blocks."""

    def __init__(self, base: Base):
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
        """Read a parameter in float32."""
        full = torch.zeros(shape)
        for _ in self.map(name, lambda view, *place: full[place].copy_(view)):
            pass
        return full

    def rows(self, name: str, ids: Tensor, size: int) -> Tensor:
        """Read rows (..., size) of an embedding in float32, for ids (...)."""
        wanted, where = ids.unique(return_inverse=True)
        table = torch.zeros(len(wanted), size)

        def copy(view: Tensor, rows: slice, columns: slice) -> None:
            here = (wanted >= rows.start) & (wanted < rows.stop)
            table[here, columns] = view[wanted[here] - rows.start].float()

        for _ in self.map(name, copy):
            pass
        return table[where]

    def product(self, name: str, x: Tensor, size: int, transposed: bool = False) -> Tensor:
        """Multiply x (..., in) by a parameter (size, in), or (in, size) if transposed, block by block."""
        out = x.new_zeros(*x.shape[:-1], size)

        def multiply(view: Tensor, rows: slice, columns: slice) -> tuple[slice, Tensor]:
            if transposed:
                return columns, x[..., rows] @ view.float()
            return rows, F.linear(x[..., columns], view.float())

        for place, result in self.map(name, multiply):
            out[..., place] += result
        return out

    def map(self, name: str, function: Callable[..., T]) -> Iterator[T]:
        """Call a function with each block of a parameter and the slices of its dimensions that the block is."""
        for source, link in self.homes[name]:
            read = source.reader()

            def apply(block: Block, read: Read = read, link: Link = link) -> T | None:
                found = part(read(block), block, link)
                if found is None:
                    return None
                view, start = found
                return function(view, *(slice(s, s + n) for s, n in zip(start, view.shape, strict=True)))

            for result in map_blocks(apply, blocks(source.shape)):
                if result is not None:
                    yield result


PLAIN = {"shape", "layout", "requires_grad", "grad", "ndim", "is_sparse", "names", "is_cuda", "grad_fn"}
"""Properties of a parameter that do not need its weights."""


class WeightsOnDemand(TorchFunctionMode):
    """A mode in which torch's functions get a parameter's weights at the moment they are called with it.

    That covers models that use the weights of a layer without calling the layer. To the model, parameters look as if
    they were float32 on the CPU.
    """

    def __init__(self, model: nn.Module, weights: Weights):
        super().__init__()
        self.weights = weights
        self.names = {id(value): bare(name) for name, value in model.named_parameters(remove_duplicate=False)}
        self.stacks: dict[str, Tensor] = {}
        """Experts of the layer that was computed last: they are used one by one, and read as a whole."""

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
            out = self.weights.product(self.name(args[2]), args[1], args[2].shape[1], transposed=True)
            return out + self.real(args[0])
        if func is F.embedding and self.absent(args[1]):
            return self.weights.rows(self.name(args[1]), args[0], args[1].shape[1])
        return func(*tree_map(self.real, args), **tree_map(self.real, kwargs))

    def absent(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_meta

    def name(self, value: Tensor) -> str:
        name = self.names.get(id(value))
        if name not in self.weights.homes:
            raise RuntimeError(f"{name or 'a tensor'} has no weights in the checkpoint: the model computes them itself")
        return name

    def real(self, value: Any) -> Any:
        if self.absent(value) and value.dim() > 2:
            return self.stack(self.name(value), value.shape)
        if self.absent(value):
            return self.weights.whole(self.name(value), value.shape)
        if id(value) in self.names and value.is_floating_point() and value.dtype != torch.float32:
            return value.float()
        return value

    def stack(self, name: str, shape: torch.Size) -> Tensor:
        layer = name.rpartition(".")[0]
        if not all(other.startswith(f"{layer}.") for other in self.stacks):
            self.stacks.clear()
        if name not in self.stacks:
            self.stacks[name] = self.weights.whole(name, shape)
        return self.stacks[name]


@torch.no_grad()
def run(base: Base, model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute logits (B, T, V) in float32 of a skeleton, with or without an adapter, from the base's files.

    Raises:
        RuntimeError: the model uses weights in a way that only works with all of them in memory.
    """
    weights = Weights(base)
    named: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for name, buffer in named.named_buffers():
        if bare(name) in weights.homes:
            buffer.copy_(weights.whole(bare(name), buffer.shape))
    with ExitStack() as undo:
        for module in named.modules():
            if isinstance(module, TrainableTokensWrapper):
                module.forward = partial(trained_tokens, module.token_adapter)
                undo.callback(module.__dict__.pop, "forward")
        with torch.autocast("cpu", enabled=False), WeightsOnDemand(named, weights):
            return model(input_ids=tokens, use_cache=False).logits.float()


def trained_tokens(adapter: Any, x: Tensor) -> Tensor:
    """Compute an embedding or tied head with some trained rows, without a copy of the whole matrix."""
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
