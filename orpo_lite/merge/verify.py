"""Check that a merged model says what base and adapter say, before it gets its name.

Both models run layer by layer from their files, in little memory: each layer has its weights only while it runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.lora_edits import NAME
from orpo_lite.merge.plan import Plan, make_plan
from orpo_lite.merge.safetensors_blocks import Source, blocks
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.write import part
from orpo_lite.model.adapter import bare
from orpo_lite.recipe import ModelSection

PROBE_TOKENS = 16
"""Tokens per probe: few, since they run on the CPU."""
TEXTS = (
    "The capital of France is Paris, and the largest city of Germany is Berlin. Both lie on rivers, and both were",
    "To boil an egg, put it into boiling water for eight minutes, then cool it under cold water before you peel it.",
    "def mean(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total / len(numbers)\n",
)
"""Probes where a run kept no training rows."""
ROOM = 350 << 20
"""Bytes that one layer may take in float32 beyond twice the merge's largest tensor, unless the check is asked for: with what
the process takes before, this stays below what `merge` promises."""


def probe_tokens(source: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, str]:
    """Return token ids (B, T) to compare models on, and where they come from: training rows in run.json, else texts."""
    rows: list[list[int]] = []
    if (source / "run.json").is_file():
        rows = json.loads((source / "run.json").read_text("utf-8")).get("probe", [])
    origin = "training rows" if rows else "sentences"
    rows = rows or [tokenizer(text)["input_ids"] for text in TEXTS]  # type: ignore[misc]
    length = min(PROBE_TOKENS, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows]), f"{len(rows)} {origin} of {length} tokens"


def check_merged(
    plan: Plan,
    folder: Path,
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    trained: tuple[ModelSection, torch.dtype] | None,
    asked: bool | None,
) -> list[str]:
    """Run merged and unmerged model layer by layer; return the drift in sentences.

    Args:
        plan: what was merged.
        folder: the merged model.
        source: adapter folder.
        tokenizer: for the probes.
        trained: base and dtype of training, where those are other weights than the ones merged into.
        asked: None runs the check only where its largest layer fits into the merge's own memory.

    Raises:
        RuntimeError: the merged model is not the adapter model, or cannot be run although the check was asked for.
    """
    if asked is False:
        return ["outputs not compared with those of base and adapter (--no-verify)"]
    needed = memory_needed(plan.adapted)
    largest = max(job.nbytes for job in plan.jobs)
    if asked is None and needed > 2 * largest + ROOM:
        return [f"not verified: one layer takes {needed / 1e9:.1f} GB in float32; --verify runs it all the same"]
    tokens, origin = probe_tokens(source, tokenizer)
    # the tokenizer may know more tokens than the model
    tokens = tokens.clamp(max=plan.base.model.config.get_text_config().vocab_size - 1)
    merged = Base(ModelSection(name_or_path=str(folder), quantization="none"))
    try:
        expected = run(plan.base, plan.adapted, tokens)
        found = run(merged, merged.model, tokens)
    except Exception as error:  # a model may do anything with weights that are not there
        why = f"{type(plan.base.model).__name__} cannot be run from its files: {error}"
        if asked:
            raise RuntimeError(why) from error
        return [f"not verified: {why}"]
    notes = [f"against base and adapter unmerged, on {origin}: {drift(expected, found, tokens)}"]
    # of the logits' standard deviation; also of a model of zeros
    distance = (found - expected).abs().mean() / expected.std().clamp(min=1e-30)
    if not distance < (1e-3 if plan.dtype == torch.float32 else 0.1):
        raise RuntimeError(f"the merged model is not the adapter model ({notes[0]}); nothing was written")
    if trained is not None:
        notes.append(drift_from_training(source, tokenizer, tokens, found, trained))
    return notes


def drift_from_training(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tensor,
    merged_logits: Tensor,
    trained: tuple[ModelSection, torch.dtype],
) -> str:
    """Compare with the quantized base and the adapter of training; return a sentence."""
    try:
        base = Base(trained[0], "quantized", trained[1])
        as_trained = run(base, make_plan(source, base, tokenizer).adapted, tokens)
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
    """A base's parameters by name, read from its files."""

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

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """Read a parameter in float32.

        Raises:
            RuntimeError: the checkpoint does not hold it.
        """
        if name not in self.homes:
            raise RuntimeError(f"{name} has no weights in the checkpoint: the model computes them itself")
        whole = torch.zeros(shape)
        for source, link in self.homes[name]:
            read = source.reader()
            for block in blocks(source.shape):
                if found := part(read(block), block, link):
                    view, start = found
                    whole[tuple(slice(s, s + n) for s, n in zip(start, view.shape, strict=True))] = view.float()
        return whole


def units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each module that computes at once, and the modules whose weights it needs for that.

    These are decoder layers, PEFT's wrappers, and single modules outside of both.
    """
    layers = getattr(model, "_no_split_modules", None) or ()

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        if type(module).__name__ in layers or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module, list(module.modules())
            return
        if module._parameters:
            yield module, [module]
        for child in module.children():
            yield from walk(child)

    return walk(model)


def plain(model: nn.Module) -> Any:
    """Return the transformers model inside PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def run(base: Base, model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute logits (B, T, V) in float32 of a skeleton, with or without an adapter, from the base's files.

    Raises:
        RuntimeError: the model uses weights in a way that only works with all of them in memory.
    """
    weights, inside = Weights(base), plain(model)
    names = {id(value): bare(name) for name, value in inside.named_parameters(remove_duplicate=False)}
    for name, buffer in inside.named_buffers():
        if bare(name) in weights.homes:
            buffer.copy_(weights.read(bare(name), buffer.shape))
    extra = {"decoder_input_ids": tokens} if inside.config.is_encoder_decoder else {}
    with ExitStack() as undo:
        for module in inside.modules():
            if isinstance(module, TrainableTokensWrapper):
                module.forward = partial(trained_tokens, module.token_adapter)
                undo.callback(module.__dict__.pop, "forward")
        for unit, parts in units(inside):
            skeleton = [
                (one, leaf, value) for one in parts for leaf, value in one._parameters.items() if value is not None
            ]

            def load(*_: Any, skeleton: list[tuple[nn.Module, str, nn.Parameter]] = skeleton) -> None:
                for one, leaf, value in skeleton:
                    real = weights.read(names[id(value)], value.shape) if value.is_meta else value.float()
                    one._parameters[leaf] = nn.Parameter(real, requires_grad=False)

            def drop(*_: Any, skeleton: list[tuple[nn.Module, str, nn.Parameter]] = skeleton) -> None:
                for one, leaf, value in skeleton:
                    one._parameters[leaf] = value

            undo.callback(unit.register_forward_pre_hook(load).remove)
            undo.callback(unit.register_forward_hook(drop, always_call=True).remove)
        with torch.autocast("cpu", enabled=False):
            return model(input_ids=tokens, use_cache=False, **extra).logits.float()


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


def memory_needed(model: PeftModel) -> int:
    """Return the most bytes of float32 weights that `run` holds at once."""
    largest = 0
    for _, parts in units(plain(model)):
        held = [sum(math.prod(p.shape) for p in one.parameters(recurse=False) if p.is_meta) for one in parts]
        # PEFT's DoRA holds a layer's change, its sum with the weights, the sum's square and a copy beside the weights
        dora = any(isinstance(one, lora.LoraLayer) and NAME in one.lora_variant for one in parts)
        largest = max(largest, 4 * (sum(held) + 4 * dora * max(held)))
    return largest
