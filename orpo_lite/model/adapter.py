"""LoRA and its relatives on a base: attach, continue, save."""

import functools
import logging
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.errors import RequestError
from orpo_lite.model import adapter_targets
from orpo_lite.model.base import grow_vocabulary, resize_embeddings, rows_for_new_tokens
from orpo_lite.model.inspection import base_name, base_revision, is_quantized, outside_text, routers
from orpo_lite.model.locating import adapter_folder, check_no_adapter_is_lost, hub_errors_in_words, renaming_field
from orpo_lite.model.tokenizer import new_tokens
from orpo_lite.model.untrusted_files import ADAPTER_WEIGHTS, check_adapter
from orpo_lite.recipe import AdapterSection
from orpo_lite.recipe.loading import resolve_path

logger = logging.getLogger(__name__)

SAME_IN_PEFT = {"r", "target_parameters", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights"}
"""Fields of the adapter section that PEFT calls the same."""
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
CHANGES_BASE = ("pissa", "olora")
"""Initializations of foreign adapters that took the starting product out of their base weights."""
CANNOT_REPEAT = ("corda", "loftq", "lora_ga")
"""Initializations of foreign adapters that changed their base in a way that the adapter alone does not record."""

NAME = "default"
"""PEFT's name of the one adapter on a model."""
INNER = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPERS = re.compile(rf"(^|(?<=^base_model\.model\.))((module|{INNER})\.)+|(?<=\.)({INNER})\.")
"""What torch.compile, FSDP and DDP put into the names of weights."""
NOT_SAVED = re.compile(rf"(?<=lora_[AB])\.{NAME}\b|\.modules_to_save(\.{NAME})?\b")
"""What PEFT leaves out of the names of the tensors that it saves."""
SHAPES = re.compile(r"size mismatch for (\S+): copying .*?Size\((\[.*?\])\) from checkpoint, .*?Size\((\[.*?\])\)")
"""(name, shape in the file, shape in the model) in torch's words."""


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checkpointing: bool = False,
) -> PeftModel | PreTrainedModel:
    """Make a base trainable: a new LoRA adapter, an existing one to continue, or (None) all of its weights.

    Trainable parameters are float32 whatever the base computes in: 16-bit ones round small updates away, and loss
    scaling refuses float16 gradients.

    Args:
        tokenizer: from load_tokenizer; its new tokens get trained embeddings.
        checkpointing: activations will be recomputed, so gradients must start at the embeddings.

    Raises:
        RequestError: modules that do not exist, full fine-tuning on a quantized base, an existing adapter that does not
            fit.
    """
    if tokenizer is not None:
        grow_vocabulary(model, tokenizer)
    if adapter is None:
        if is_quantized(model):
            raise RequestError(
                "adapter: null asks for full fine-tuning, but the base is quantized and quantized weights cannot be "
                "trained: set model.quantization=none on an unquantized model, or give an adapter"
            )
        return model.float().requires_grad_(True)
    if adapter.init_from:
        peft_model = load_adapter(model, adapter.init_from, trainable=True)
        kept: LoraConfig = peft_model.peft_config["default"]  # type: ignore[assignment]  # load_adapter takes no other
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in new_tokens(tokenizer)}  # type: ignore[union-attr]
        lost = [token for token, row in ids.items() if row not in trained_rows(kept)]
        if lost and not kept.modules_to_save:
            raise RequestError(
                f"model.new_tokens: adapter.init_from keeps the shape of {adapter.init_from}, which trains no embedding of "
                f"{', '.join(lost)}: leave them out, or train a new adapter (adapter.init_from=null)"
            )
        logger.info(f"adapter: continuing {adapter.init_from} with its own shape, r={kept.r} alpha={kept.lora_alpha}")
    else:
        peft_model = new_adapter(model, adapter, tokenizer)
    prepare_frozen(peft_model)
    if checkpointing:
        model.enable_input_require_grads()
    return peft_model


def new_adapter(
    model: PreTrainedModel, adapter: AdapterSection, tokenizer: PreTrainedTokenizerBase | None
) -> PeftModel:
    """Attach a new adapter as the recipe's section says."""
    named = re.findall(r"\w+", f"{adapter.target_modules} {adapter.target_parameters}")
    avoid = {name for name in routers(model) if name.rpartition(".")[2] not in named} | outside_text(model)
    targets = adapter.target_modules
    if targets in ("all-linear", ["all-linear"]):
        targets = adapter_targets.all_linear(model, avoid)
    adapter_targets.check_named(model, adapter, targets)
    aside = [name for name, module in model.named_modules() if name in avoid and isinstance(module, nn.Linear)]
    config = LoraConfig(
        **adapter.model_dump(include=SAME_IN_PEFT),
        task_type="CAUSAL_LM",
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=aside or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=adapter_targets.token_rows(model, adapter, tokenizer),
        revision=base_revision(model),
    )
    return wrap(model, config)


def wrap(model: PreTrainedModel, config: PeftConfig, **options: Any) -> PeftModel:
    """Call get_peft_model, and raise what PEFT refuses as a RequestError."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # a merge says which tensors come apart
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True. and a tied layer.*")
        try:
            return get_peft_model(model, config, **options)  # type: ignore[return-value]  # never the mixed kind here
        except (ValueError, TypeError, NotImplementedError, AttributeError, re.error) as error:
            raise RequestError(f"adapter: {' '.join(str(error).split())}") from error


def prepare_frozen(model: PeftModel) -> None:
    """Turn trained parameters into float32, and the norms of a quantized base too.

    PEFT's prepare_model_for_kbit_training also turns embeddings and output head to float32, 2 GB more for Llama-3-8B
    on a 16 GB card; QLoRA's own code keeps those in the compute dtype, as here.

    Norms compute in float32 and return the compute dtype, which every matrix product after them takes: else each product casts
    its input down and its output up again. What the layers add to stays float32, as it was.
    """
    norms_too = is_quantized(model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in model.modules():
        norm = norms_too and "norm" in type(module).__name__.lower()
        own = list(module.parameters(recurse=False))
        if norm and layers and own and own[0].dtype in SIXTEEN_BITS:
            module.register_forward_hook(functools.partial(cast_output, own[0].dtype))
            if module in layers[0].modules():
                layers[0].register_forward_pre_hook(float32_input)
        for parameter in own:
            if (parameter.requires_grad or norm) and parameter.dtype in SIXTEEN_BITS:
                parameter.data = parameter.data.float()


def cast_output(dtype: torch.dtype, module: nn.Module, args: tuple, output: Any) -> Any:
    """Cast what a norm returns."""
    return output.to(dtype) if isinstance(output, torch.Tensor) else output


def float32_input(module: nn.Module, args: tuple) -> tuple:
    """Cast the hidden states that the first layer takes; those of the others follow."""
    return (args[0].float(), *args[1:])


def load_adapter(model: PreTrainedModel, source: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put an existing LoRA adapter (folder or hub id) on a base, with every one of its tensors.

    Unlike PeftModel.from_pretrained, tensors that the adapter lacks or the base has no place for are errors, the base's
    vocabulary becomes the adapter's, and the adapter is never rounded to the base's 16 bits on the way.

    Raises:
        RequestError: no such adapter, not LoRA, or shapes and names that do not fit this base.
    """
    source = str(adapter_folder(resolve_path(str(source))))
    config = loadable_config(source, fixed_base=is_quantized(model))
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
    here, package = base_name(model), "/orpo_lite/data/"  # whose models lie elsewhere in another installation
    if trained_on and here and trained_on.rpartition(package)[2] != here.rpartition(package)[2]:
        check_no_adapter_is_lost(trained_on, here, source, config.revision)
        logger.warning(f"adapter: {source} was trained on {trained_on}; here its base is {here}")
    config.inference_mode = not trainable
    resize_embeddings(model, vocabulary_rows(model, source, config))
    tensors = read_tensors(source)
    if why := idle(source, config, tensors):
        logger.warning(why)
    modules, whole = (model.get_input_embeddings(), model.get_output_embeddings()), config.modules_to_save or ()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in modules)}
    ends = tuple(f".{name}.weight" for name in names if name not in whole)
    peft_model, missing = put_on(model, source, config, tensors)
    check_complete(source, missing)
    peft_model.holds_embeddings = any(bare(key).endswith(ends) for key in tensors)  # type: ignore[assignment]
    return peft_model if trainable else peft_model.eval()  # type: ignore[return-value]  # eval returns the model itself


# ---- the folder of an adapter, as any tool left it ---------------------------------------------------------------------


def lora_config(source: str) -> LoraConfig:
    """Read the configuration of an existing adapter.

    Raises:
        RequestError: no adapter there, or not LoRA.
    """
    check_adapter(Path(source))
    with renaming_field("adapter"), hub_errors_in_words(source):
        config: LoraConfig = PeftConfig.from_pretrained(source)  # type: ignore[assignment]  # the check takes no other
    # both name libraries to import, which an adapter has no say in; layers of Megatron are in no transformers model
    config.auto_mapping = config.megatron_config = None
    config.megatron_core = "megatron.core"
    return config


def loadable_config(source: str, *, fixed_base: bool) -> LoraConfig:
    """Read the configuration of an adapter to be loaded.

    Args:
        fixed_base: the base cannot be changed in the way in which some initializations changed it.

    Raises:
        RequestError: see `lora_config`; or the adapter belongs to a changed base that nobody can make again.
    """
    config = lora_config(source)
    init = str(config.init_lora_weights).lower()
    if init.startswith(CANNOT_REPEAT) or (init.startswith(CHANGES_BASE) and fixed_base):
        raise RequestError(
            f"adapter: {source} was initialized with {init}, which changed its base weights, and this base does not have "
            "that change: save it as a plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    if not init.startswith(CHANGES_BASE):
        config.init_lora_weights = True  # the weights come from the file; EVA and others would warn or compute
    return config


def plain_key(key: str) -> str:
    """Return the name by which PEFT saves a tensor, without what wrappers of the model in training left in it."""
    return NOT_SAVED.sub("", WRAPPERS.sub("", key))


def read_tensors(source: str | Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors by PEFT's own names, each once: PEFT writes trained and resized embeddings twice.

    Raises:
        RequestError: two different tensors are for the same place.
    """
    tensors: dict[str, torch.Tensor] = {}
    origins: dict[str, str] = {}
    for key, value in load_file(Path(source) / ADAPTER_WEIGHTS).items():
        place = plain_key(key)
        if place in tensors and not torch.equal(tensors[place], value):
            raise RequestError(
                f"adapter: {source}: {origins[place]} and {key} are for the same place: remove the one that was not trained"
            )
        tensors[place], origins[place] = value, key
    if wrapped := next(filter(WRAPPERS.search, origins.values()), None):
        logger.warning(
            f"adapter: {source} was saved from a wrapped model; the wrapper's prefix is left out, as in {wrapped}"
        )
    return tensors


def idle(source: str | Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> str | None:
    """Say that an adapter changes nothing; None where a low-rank product is not zero, or anything else was trained."""
    halves: dict[str, bool] = {}
    for key, value in tensors.items():
        module, _, matrix = key.rpartition(".lora_")
        if matrix not in ("A.weight", "B.weight", "embedding_A", "embedding_B"):
            return None
        halves[module] = halves.get(module, True) and bool(value.any())
    if any(halves.values()) and (config.lora_alpha or config.alpha_pattern):
        return None
    return (
        f"adapter: {source} changes nothing: in every layer lora_B (or lora_alpha) is zero, as before training: give the "
        "folder that was saved after training, or train it"
    )


def put_on(
    model: PreTrainedModel, source: str | Path, config: LoraConfig, tensors: dict[str, torch.Tensor], **options: Any
) -> tuple[PeftModel, list[str]]:
    """Attach an adapter with its tensors to a model whose vocabulary is the adapter's.

    Args:
        options: low_cpu_mem_usage=True for a skeleton on the meta device, whose adapter then holds `tensors` themselves.

    Returns:
        The model, and the names of the tensors that its configuration asks for on this base and the adapter lacks.

    Raises:
        RequestError: shapes do not fit, or the base has no place for a tensor.
    """
    misfit = (
        f"adapter: {source} does not fit {base_name(model) or type(model).__name__}, so check that this is its base: "
    )
    # the adapter stays where it is: PEFT would move it to the device and dtype of its base, which may be a skeleton
    move, stay = "_move_adapter_to_device_of_base_layer", lambda *_, **__: None
    try:
        peft_model = wrap(model, config, **options)
        with patch.object(BaseTunerLayer, move, stay), patch.object(lora.ParamWrapper, move, stay):
            result = set_peft_model_state_dict(peft_model, tensors, NAME, **options)
    except KeyError as error:  # a part of a module that was trained as a whole
        return peft_model, [str(error.args[0])]
    except (RuntimeError, ValueError) as error:  # also wrap's RequestError
        words = " ".join(str(error).split()).removeprefix("adapter: ")
        shapes = [f"{plain_key(key)} is {there}, here {here}" for key, there, here in SHAPES.findall(words)]
        raise RequestError(misfit + ("; ".join(shapes[:3]) + "; ..." * (len(shapes) > 3) or words[:400])) from error
    wrappers = dict(peft_model.named_modules())
    homeless = []
    for key in result.unexpected_keys:
        # PEFT saves the trained rows of tied embeddings at both ends, and loads them at one
        path, _, leaf = key.rpartition(".token_adapter.")
        tied = leaf and getattr(getattr(wrappers.get(path), "token_adapter", None), "tied_adapter", None)
        if not tied or not torch.equal(tensors[key].float(), tied.trainable_tokens_delta[NAME].float().cpu()):
            homeless.append(key)
    if homeless:
        raise RequestError(f"{misfit}it has no place for {len(homeless)} tensor(s), first {homeless[0]}")
    return peft_model, [plain_key(key) for key in result.missing_keys if "lora_" in key and NAME in key]


def check_complete(source: str | Path, missing: list[str]) -> None:
    """Raise RequestError where an adapter lacks tensors that its configuration asks for."""
    if missing:
        raise RequestError(
            f"adapter: {source} lacks {len(missing)} tensor(s) that its adapter_config.json asks for on this base, first "
            f"{', '.join(missing[:3])}: save or download it again as a whole; if fewer modules were trained, name those "
            "alone in adapter_config.json (target_modules, layers_to_transform)"
        )


def adapter_gaps(source: str | Path, skeleton: PreTrainedModel) -> list[str]:
    """List the tensors that an adapter's configuration asks for on a base and its file lacks, by the file's names.

    The skeleton, the base on the meta device, gets the adapter; raises as `put_on`.
    """
    config = loadable_config(str(source), fixed_base=True)
    resize_embeddings(skeleton, vocabulary_rows(skeleton, source, config))
    return put_on(skeleton, source, config, read_tensors(source), low_cpu_mem_usage=True)[1]


def vocabulary_rows(
    model: PreTrainedModel, source: str | Path, config: LoraConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """Return how many rows the embeddings of a base have under an adapter.

    They are those of the adapter's own tensors for them, else the base's and as many more as new tokens need: those of the
    tokenizer, and those whose embeddings the adapter trains.
    """
    ends: list[Any] = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    held: dict[str, int] = {}
    for key, value in load_file(Path(source) / ADAPTER_WEIGHTS).items():
        path, _, leaf = bare(plain_key(key).removeprefix("base_model.model.")).rpartition(".")
        if leaf == "weight" and path.removesuffix(".lora_B") in names:
            held[path] = value.shape[0]
        elif leaf == "lora_embedding_A" and path in names:
            held.setdefault(path, value.shape[1])
    rows = len(ends[0].weight)
    whole = {path.removesuffix(".lora_B") for path in held}
    if max(held.values(), default=0) > rows and len(whole) < len({id(end.weight) for end in ends}):
        logger.warning(
            f"adapter: {source} has more rows than its base for {', '.join(whole)} alone: those of {', '.join(names - whole)} from "
            f"{rows} on are the mean of the others (PEFT's save_embedding_layers=True saves them)"
        )
    added = rows_for_new_tokens(tokenizer) if tokenizer is not None else 0
    return max(held.values(), default=max(rows, added, 1 + max(trained_rows(config), default=-1)))


def trained_rows(config: LoraConfig) -> list[int]:
    """List the ids of the tokens whose embeddings are in the adapter itself."""
    rows = config.trainable_token_indices or []
    return [row for ids in (rows.values() if isinstance(rows, dict) else [rows]) for row in ids]


def bare(path: str) -> str:
    """Return a module's path without PEFT's wrappers."""
    for word in ("base_layer", "original_module", "token_adapter"):
        path = path.replace(f".{word}", "").removeprefix(f"{word}.")
    return path


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter as PEFT's own files; a fully fine-tuned model as transformers' own."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder))  # type: ignore[operator]  # a transformers model
        return
    # "auto" asks the hub whether the vocabulary grew; new tokens' rows are in the adapter as it is, unless it continues one
    # that holds its embeddings as a whole
    model.save_pretrained(str(folder), save_embedding_layers=getattr(model, "holds_embeddings", False))
