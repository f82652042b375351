"""Changes that an adapter makes to the parameters of its base: factors from PEFT's modules, arithmetic in float32."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_lite.common.errors import RequestError
from orpo_lite.model.adapter import NAME, bare, check_complete, idle, loadable_config, put_on, read_tensors

UNMERGED = ": use base and adapter unmerged, as chat and evaluate do"


@dataclass
class LowRank:
    """W + scale * left @ right; in a stack of matrices, each has its own factors."""

    left: Tensor
    """(..., rows, rank)"""
    right: Tensor
    """(..., rank, columns)"""
    scale: float

    def apply(self, block: Tensor, start: list[int]) -> None:
        """Change a float32 block of the parameter in place; `start` is its first index in every dimension."""
        if block.dim() == 3:
            for i in range(block.shape[0]):
                own = LowRank(self.left[start[0] + i], self.right[start[0] + i], self.scale)
                own.apply(block[i], start[1:])
            return
        block.add_(self.delta(start, block.shape))

    def delta(self, start: list[int], shape: Iterable[int]) -> Tensor:
        """Compute scale * left @ right for a block of a matrix."""
        rows, columns = (slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))
        return torch.mm(self.left[rows].float(), self.right[:, columns].float()).mul_(self.scale)


@dataclass
class Dora(LowRank):
    """magnitude * (W + delta) / |W + delta|, with the norm over the inputs (arXiv 2402.09353, equation 5)."""

    magnitude: Tensor
    along_rows: bool
    """True where a row of the stored matrix holds all inputs of one output; a block is the whole matrix elsewhere."""

    def apply(self, block: Tensor, start: list[int]) -> None:
        super().apply(block, start)
        if self.along_rows:
            own = self.magnitude[start[0] : start[0] + block.shape[0]].float()
            block.mul_((own / torch.linalg.norm(block, dim=1))[:, None])
        else:
            block.mul_(self.magnitude.float() / torch.linalg.norm(block, dim=0))


@dataclass
class Added:
    """b + scale * bias of lora_B."""

    value: Tensor
    scale: float

    def apply(self, block: Tensor, start: list[int]) -> None:
        block.add_(self.value[start[0] : start[0] + block.shape[0]].float() * self.scale)


@dataclass
class Replaced:
    """A parameter that was trained as a whole."""

    value: Tensor

    def apply(self, block: Tensor, start: list[int]) -> None:
        part = self.value
        for dim, begin in enumerate(start):
            part = part.narrow(dim, begin, block.shape[dim])
        block.copy_(part)


@dataclass
class Rows:
    """Trained rows of an embedding, usually those of new tokens."""

    index: Tensor
    value: Tensor

    def apply(self, block: Tensor, start: list[int]) -> None:
        here = (self.index >= start[0]) & (self.index < start[0] + block.shape[0])
        columns = slice(start[1], start[1] + block.shape[1])
        block[self.index[here] - start[0]] = self.value[here][:, columns].float()


Edit = LowRank | Added | Replaced | Rows
"""A change of one parameter: `apply(block, start)` makes it in a float32 block."""


def read_adapter(source: str | Path, model: PreTrainedModel) -> tuple[PeftModel, dict[str, list[Edit]]]:
    """Attach an adapter to a skeleton, its tensors mapped from their file; return it and its changes by parameter name.

    Args:
        source: adapter folder.
        model: skeleton on the meta device, with the vocabulary that it had in training.

    Raises:
        RequestError: the adapter is not LoRA or does not fit, a tensor has no place or shares it with another, or the
            base's weights cannot express its kind of change.
    """
    config = loadable_config(str(source), fixed_base=True)
    if config.layer_replication:
        raise RequestError(
            f"adapter: {source} repeats layers of its base (layer_replication), which cannot be merged{UNMERGED}"
        )
    config.inference_mode = True
    config.lora_dropout = 0.0  # PEFT refuses dropout on experts, and would apply it in a new model
    config.base_model_name_or_path = None
    tensors = read_tensors(source)
    if why := idle(source, config, tensors):
        raise RequestError(why)
    keys = {bare(key.removeprefix("base_model.model.")): key for key in sorted(tensors)}
    for one, other in model.all_tied_weights_keys.items():
        # PEFT saves resized embeddings at both of their tied ends
        if one in keys and other in keys and torch.equal(tensors[keys[one]], tensors[keys[other]]):
            tensors[keys[one]] = tensors[keys[other]]
    peft_model, missing = put_on(model, source, config, tensors, low_cpu_mem_usage=True)
    check_complete(source, missing)
    return peft_model, collect(source, peft_model)


def collect(source: str | Path, model: PeftModel) -> dict[str, list[Edit]]:
    """Collect every change by the parameter's name in the bare model."""
    edits: dict[str, list[Edit]] = {}
    inside: nn.Module = model.get_base_model().requires_grad_(False)
    tie_saved(inside)
    for path, parameter in inside.named_parameters(remove_duplicate=False):
        added = any(word in path for word in ("lora_", "modules_to_save.", "token_adapter.trainable"))
        # biases are trained in place, and PEFT saves a resized embedding as a whole: LoRA is added on top of them
        if not added and not parameter.is_meta:
            edits[bare(path)] = [Replaced(parameter)]
    for path, module in inside.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper):
            for leaf, edit in edits_of(source, path, module):
                edits.setdefault(f"{bare(path)}.{leaf}", []).append(edit)
    for found in edits.values():
        # edits before the last replacement have no effect
        del found[: max((place for place, edit in enumerate(found) if isinstance(edit, Replaced)), default=0)]
    return edits


def tie_saved(inside: Any) -> None:
    """Give both ends of tied embeddings the whole tensor that an adapter has for one of them, as loading it does."""
    homes = {bare(f"{path}.{leaf}"): (module, leaf) for path, module in inside.named_modules()
             for leaf in module._parameters if "modules_to_save" not in path}  # fmt: skip
    for pair in inside.all_tied_weights_keys.items():
        found = [homes[name] for name in pair if name in homes]
        saved = [getattr(module, leaf) for module, leaf in found if not getattr(module, leaf).is_meta]
        if len(found) == 2 and len(saved) == 1:
            for module, leaf in found:
                setattr(module, leaf, saved[0])


def edits_of(source: str | Path, path: str, module: Any) -> list[tuple[str, Edit]]:
    """List what one of PEFT's wrappers does: (name of a parameter of its base layer, change).

    Raises:
        RequestError: it is of a kind that cannot be merged, or adds a bias to a layer that has none.
    """
    if isinstance(module, ModulesToSaveWrapper):
        return [(leaf, Replaced(value)) for leaf, value in module.modules_to_save[NAME].named_parameters()]
    if isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter.tied_adapter or module.token_adapter
        return [("weight", Rows(torch.tensor(tokens.token_indices[NAME]), tokens.trainable_tokens_delta[NAME]))]
    if type(module).__module__.startswith("peft.tuners.trainable_tokens"):
        return []  # inside the wrapper above
    variant = module.lora_variant.get(NAME) if isinstance(module, lora.LoraLayer) else None
    plain = type(module) in (lora.Linear, lora.Embedding, lora.ParamWrapper)
    if not plain or not isinstance(variant, None | variants.DoraLinearVariant | variants.DoraEmbeddingVariant):
        kind = type(variant).__name__ if variant is not None else f"{type(module).__module__}.{type(module).__name__}"
        raise RequestError(
            f"adapter: {source} changes {bare(path)} by {kind}, which cannot be merged here; LoRA and DoRA on linear "
            f"layers, Conv1D, embeddings and experts can{UNMERGED}"
        )
    layer: Any = module
    scale = layer.scaling[NAME]
    if type(layer) is lora.Embedding:
        a, b = layer.lora_embedding_A[NAME], layer.lora_embedding_B[NAME]  # (rank, tokens), (width, rank)
        left, right, transposed = a.T, b.T, True
    else:
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        if type(layer) is lora.ParamWrapper:
            return [(layer.parameter_name, experts(layer, a, b, scale))]
        transposed = layer.fan_in_fan_out
        left, right = (a.T, b.T) if transposed else (b, a)
    if variant is None:
        found: list[tuple[str, Edit]] = [("weight", LowRank(left, right, scale))]
    else:
        magnitude = layer.lora_magnitude_vector[NAME].weight.flatten()  # type: ignore[operator]
        found = [("weight", Dora(left, right, scale, magnitude, along_rows=not transposed))]
    if layer.lora_bias.get(NAME):
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise RequestError(
                f"adapter: {source} trains a bias (lora_bias) for {bare(path)}, which has none to add it to{UNMERGED}"
            )
        found.append(("bias", Added(layer.lora_B[NAME].bias, scale)))  # type: ignore[arg-type]
    return found


def experts(module: Any, a: Tensor, b: Tensor, scale: float) -> LowRank:
    """Return LoRA on a parameter of stacked experts, as PEFT's ParamWrapper.get_delta_weight lays it out."""
    count = module.num_experts
    if count == 1 and module.get_param().dim() == 2:
        return LowRank(b, a, scale)
    a = a.reshape(count, -1, a.shape[-1])  # (experts, rank, in)
    b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)  # (experts, out, rank)
    if module._did_swap_in_out_features:
        return LowRank(b, a, scale)
    return LowRank(a.transpose(1, 2), b.transpose(1, 2), scale)
