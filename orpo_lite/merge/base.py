"""The base of a merge: its skeleton, its files, and its weights as stored or as quantized training saw them."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.safetensors_blocks import Computed, Read, Source, Stored, blocks, rounded, stored_tensors
from orpo_lite.merge.weight_map import KeyMap
from orpo_lite.model.base import read_config, shipped_quantization
from orpo_lite.model.locating import hub_errors_in_words, locate
from orpo_lite.model.precision import default_device, quantization_settings
from orpo_lite.recipe import ModelSection
from orpo_lite.trainer.run_folder import RunFolder

BLOCKSIZE = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats, by its default and transformers'."""
MARK = ".quant_state.bitsandbytes__"
QUANTIZED_NAME = re.compile(
    r"(?i)[-_.](unsloth-)?(bnb|gptq|awq|fp8|nvfp4|mxfp4|hqq|aqlm|quip|eetq|quantized|w\d+a\d+|int[48]|[48]-?bit)(?![a-z]).*"
)
"""End of the name of a repository that was made from another."""


class Base:
    """A base model on disk.

    Attributes:
        config: configuration without the quantization that the base may ship with.
        model: skeleton, parameters on the meta device and buffers real.
        sources: stored key -> weights to merge into.
        keys: where they belong in the model.
        files: stored key -> file that holds it.
        dtype: dtype of most of the stored weights.
        tied: parameter -> the one that it shares its tensor with.

    Args:
        onto: original, or quantized for the weights that training computed with.
        trained: dtype in which training read the weights before it quantized them.

    Raises:
        RequestError: the base cannot be found or lacks weights, ships quantized although `onto` is original, or its
            files and config.json belong to different models.
    """

    def __init__(self, spec: ModelSection, onto: str = "original", trained: torch.dtype = torch.float32):
        self.spec, self.config = spec, read_config(spec)
        shipped = shipped_quantization(self.config)
        if shipped:
            check_shipped(spec.name_or_path, shipped, onto)
        elif onto == "quantized" and spec.quantization == "none":
            raise RequestError(
                "--onto quantized: nothing says how the base was quantized (no recipe.yaml, or model.quantization=none): say it "
                "with --quantization nf4 or fp4 and, where it was done, --double-quant; or take --onto original"
            )
        if shipped:
            del self.config.quantization_config  # type: ignore[attr-defined]
        stored = stored_tensors(weight_files(spec))
        self.files = {key: one.file for key, one in stored.items()}
        self.dtype: torch.dtype = self.config.dtype or next(  # type: ignore[assignment]  # never a name
            one.dtype for one in stored.values() if one.dtype.is_floating_point
        )
        self.model = self.skeleton()
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.sources: dict[str, Source] = dict(dequantized(stored, self.dtype) if shipped else stored)
        try:
            self.keys = KeyMap(self.model, {key: one.shape for key, one in self.sources.items()})
        except ValueError as error:
            raise RequestError(f"{spec.name_or_path}: {error}") from error
        self.separate_untied()
        self.check_whole()
        if onto == "quantized" and not shipped:
            self.quantize(trained)
            for key, one in self.sources.items():
                if isinstance(one, Stored) and one.dtype in (torch.float32, torch.float64) and one.dtype != trained:
                    self.sources[key] = rounded(one, trained)

    def skeleton(self) -> PreTrainedModel:
        """Build the model without its weights, to compute in float32."""
        config = copy.deepcopy(self.config)
        with init_empty_weights(include_buffers=False), hub_errors_in_words(self.spec.name_or_path):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=self.spec.trust_remote_code
            )
        return model.eval()

    def separate_untied(self) -> None:
        """Separate tensors that the architecture ties but the checkpoint stores twice, with different values.

        transformers loads them separately too, whatever config.json says.
        """
        homes = {link.parameter: key for key, links in self.keys.links.items() for link in links}
        for one, other in list(self.tied.items()):
            if one in homes and other in homes and differ(self.sources[homes[one]], self.sources[homes[other]]):
                del self.tied[one]
                self.model.all_tied_weights_keys.pop(one, None)
                path, _, leaf = one.rpartition(".")
                tied = self.model.get_parameter(one)
                setattr(self.model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(tied), tied.requires_grad))

    def check_whole(self) -> None:
        """Raise RequestError unless every parameter is in the files exactly once."""
        together = {*self.tied, *self.tied.values()}
        for name, parameter in self.model.named_parameters():
            held, expected = self.keys.held.get(name, 0), parameter.numel()
            if name in self.keys.unclear or held == expected or (held == 0 and name in together):
                continue
            if held == 0 and any(
                re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_missing or ()
            ):
                continue  # positions that the model computes
            found = "lacks" if held < expected else "holds twice"
            raise RequestError(
                f"{self.spec.name_or_path} {found} {name} of {type(self.model).__name__}: is it complete?"
            )

    def quantize(self, trained: torch.dtype) -> None:
        """Replace each weight that training quantized by its round trip through 4 bits."""
        spec = self.spec
        settings = quantization_settings(spec, torch.float32)
        names = quantized_modules(self.skeleton(), settings)
        for key, links in self.keys.links.items():
            path, _, leaf = links[0].parameter.rpartition(".") if links else ("", "", "")
            if leaf != "weight" or path not in names:
                continue
            one = self.sources[key]
            if len(links) > 1 or tuple(one.shape) != tuple(self.keys.meta[links[0].parameter].shape):
                raise RequestError(f"--onto quantized: {key} is not a whole layer of {type(self.model).__name__}")
            assert isinstance(one, Stored)
            transposed = isinstance(self.model.get_submodule(path), Conv1D)
            self.sources[key] = round_trip(one, spec.quantization, spec.double_quant, trained, transposed)


def check_shipped(name: str, shipped: dict[str, Any], onto: str) -> None:
    """Raise RequestError unless a repository that is quantized can be merged into."""
    method = "int8" if shipped.get("load_in_8bit") else shipped.get("quant_method", "bitsandbytes")
    if (method, onto) == ("bitsandbytes", "quantized"):
        return
    owner, slash, model = name.rpartition("/")
    stem = QUANTIZED_NAME.sub("", model)
    guess = f" (a guess from its name: {owner}{slash}{stem}; check that it exists)" if stem != model else ""
    other = (
        "or merge with --onto quantized" if method == "bitsandbytes" else "since --onto quantized reads 4 bits alone"
    )
    raise RequestError(
        f"{name} ships quantized ({method}), so it has no 16-bit weights to merge into: name the 16-bit model that it was "
        f"made from with --base{guess}, {other}"
    )


def differ(one: Source, other: Source) -> bool:
    """Return True if two tensors differ anywhere, read a block at a time."""
    if tuple(one.shape) != tuple(other.shape):
        return True
    readers = one.reader(), other.reader()
    return any(not torch.equal(*(read(block) for read in readers)) for block in blocks(tuple(one.shape)))


def weight_files(spec: ModelSection) -> list[Path]:
    """Return the base's safetensors files, downloaded where it is a hub id.

    Raises:
        RequestError: there are none.
    """
    name = locate(spec)
    options = {"revision": spec.revision, "_raise_exceptions_for_missing_entries": False}
    with hub_errors_in_words(spec.name_or_path):
        index = cached_file(name, "model.safetensors.index.json", **options)
        if index:
            shards, _ = get_checkpoint_shard_files(name, index, revision=spec.revision)
            return [Path(shard) for shard in shards or []]
        single = cached_file(name, "model.safetensors", **options)
    if not single:
        raise RequestError(f"{spec.name_or_path} has no model.safetensors (pickled weights are never loaded)")
    return [Path(single)]


def trained_dtype(adapter: Path, spec: ModelSection) -> torch.dtype:
    """Return the dtype in which training read the base: from run.json or the recipe, else float32."""
    known = spec.dtype
    if (adapter / "run.json").is_file():
        known = RunFolder(adapter).read().get("base_model", {}).get("dtype", known)
    # float16 cannot be asked for on the CPU; it rounds stored weights far less than 4 bits do
    return torch.bfloat16 if known == "bfloat16" else torch.float32


def quantized_modules(model: PreTrainedModel, settings: Any) -> set[str]:
    """Name the linear layers that transformers would load in 4 bits; `model` is a skeleton, changed in place."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=torch.float32)
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def round_trip(source: Stored, method: str, double_quant: bool, trained: torch.dtype, transposed: bool) -> Computed:
    """Return a stored weight, quantized as training did and dequantized again.

    Args:
        method: nf4 or fp4.
        trained: dtype in which training read the weight before it quantized it.
        transposed: True for GPT-2's Conv1D, which is quantized transposed.
    """
    from bitsandbytes import functional

    def reader() -> Read:
        # a card does in seconds what takes a processor minutes
        weight = source.read().to(default_device(), trained)
        weight = weight.T.contiguous() if transposed else weight
        packed, state = functional.quantize_4bit(
            weight, blocksize=BLOCKSIZE, quant_type=method, compress_statistics=double_quant
        )
        whole = functional.dequantize_4bit(packed, state).cpu()
        whole = whole.T.contiguous() if transposed else whole
        return lambda block: whole[block].clone()

    return Computed(source.key, source.shape, source.dtype, reader)


def dequantized(tensors: dict[str, Stored], target: torch.dtype) -> dict[str, Source]:
    """Turn the tensors of a repository in bitsandbytes' format into dequantized weights."""
    from bitsandbytes import functional

    def from_4_bits(source: Stored, parts: dict[str, Stored]) -> Computed:
        def state() -> Any:
            held = {name: part.read() for name, part in parts.items()}
            return functional.QuantState.from_dict(held, device=torch.device("cpu"))

        def reader() -> Read:
            whole = functional.dequantize_4bit(source.read(), state())
            return lambda block: whole[block].clone()

        return Computed(source.key, tuple(state().shape), target, reader)

    found: dict[str, Source] = {}
    four = {key.partition(MARK)[0] for key in tensors if MARK in key}
    for key, stored in tensors.items():
        if key in four:
            begin = f"{key}."
            parts = {other.removeprefix(begin): part for other, part in tensors.items() if other.startswith(begin)}
            found[key] = from_4_bits(stored, parts)
        elif key.rpartition(".")[0] not in four and MARK not in key:
            found[key] = stored
    return found
