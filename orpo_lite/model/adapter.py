"""LoRA and its relatives on a base: attach, continue, initialise from data, save."""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from orpo_lite.errors import RequestError
from orpo_lite.model.base import grow_vocabulary
from orpo_lite.model.hub import readable
from orpo_lite.model.layers import base_name, base_revision, is_quantised, outside_text, routers
from orpo_lite.model.precision import autocast
from orpo_lite.model.tokenizer import new_tokens
from orpo_lite.recipe import AdapterSection, nearest, resolve_path

logger = logging.getLogger(__name__)

CHANGES_BASE = ("pissa", "olora")
"""Initialisations that take the adapter's starting product out of the base weights."""
CANNOT_REPEAT = ("corda", "loftq", "lora_ga")
"""Initialisations of foreign adapters that changed their base in a way that the adapter alone does not tell."""


def attach_adapter(
    model: PreTrainedModel,
    adapter: AdapterSection | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checkpointing: bool = False,
) -> PeftModel | PreTrainedModel:
    """Make a base trainable: a new LoRA adapter, an existing one to go on from, or (None) all of its weights.

    Trainable parameters are float32 whatever the base computes in: 16-bit ones round small updates away, and loss
    scaling refuses float16 gradients. With init_lora_weights eva the adapter is empty until `initialise_eva`.

    Args:
        tokenizer: from load_tokenizer; its new tokens get trained embeddings.
        checkpointing: activations will be recomputed, so gradients must start at the embeddings.

    Raises:
        RequestError: modules that do not exist, full fine-tuning or a base-changing initialisation on a quantised
            base, an existing adapter that does not fit.
    """
    if tokenizer is not None:
        grow_vocabulary(model, tokenizer)
    if adapter is None:
        if is_quantised(model):
            raise RequestError(
                "adapter: null asks for full fine-tuning, but the base is quantised and quantised weights cannot be "
                "trained: set model.quantization=none on an unquantised model, or give an adapter"
            )
        return model.float().requires_grad_(True)
    if adapter.init_from:
        peft_model = load_adapter(model, adapter.init_from, trainable=True)
        kept = peft_model.peft_config["default"]
        logger.info(
            f"adapter: going on from {adapter.init_from} with its own shape, r={kept.r} alpha={kept.lora_alpha}"
        )
    else:
        peft_model = new_adapter(model, adapter, tokenizer)
    prepare_frozen(peft_model)
    if checkpointing:
        model.enable_input_require_grads()
    return peft_model


def new_adapter(
    model: PreTrainedModel, adapter: AdapterSection, tokenizer: PreTrainedTokenizerBase | None
) -> PeftModel:
    """A fresh adapter as the section says."""
    init = adapter.init_lora_weights
    changes_base = isinstance(init, str) and init.startswith(CHANGES_BASE)
    if changes_base and is_quantised(model):
        raise RequestError(
            f"adapter.init_lora_weights: {init} changes the base weights, which a quantised base does not allow: set "
            "model.quantization=none, or adapter.init_lora_weights=true"
        )
    if changes_base and adapter.use_rslora and (adapter.rank_pattern or adapter.alpha_pattern):
        raise RequestError(
            f"adapter.init_lora_weights: {init} with use_rslora and a rank or alpha pattern cannot be saved as a plain "
            "adapter: leave one of the three out"
        )
    avoid = {name for name in routers(model) if not is_named(adapter, name)} | outside_text(model)
    targets = adapter.target_modules
    if targets in ("all-linear", ["all-linear"]):
        targets = all_linear(model, avoid)
    check_named(model, "target_modules", targets)
    check_named(model, "modules_to_save", adapter.modules_to_save)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=excluded(model, adapter, avoid),
        target_parameters=adapter.target_parameters,
        modules_to_save=adapter.modules_to_save,
        rank_pattern=dict(adapter.rank_pattern),  # PEFT adds to it
        alpha_pattern=dict(adapter.alpha_pattern),
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=init,  # type: ignore[arg-type]  # the recipe has checked it
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=token_rows(model, adapter, tokenizer),
        eva_config=EvaConfig() if init == "eva" else None,
        revision=base_revision(model),
    )
    # EVA replaces what it is given, so PEFT advises to give it nothing
    peft_model = wrap(model, config, low_cpu_mem_usage=init == "eva")
    check_patterns(peft_model, adapter)
    hit = sorted(name for name in adapted(peft_model) if name in avoid)
    if hit:
        raise RequestError(
            f"adapter.target_modules: {adapter.target_modules!r} would adapt the router {hit[0]}: narrow it, or name the "
            "router in it if that is wanted"
        )
    if changes_base:
        peft_model.orpo_lite_initial = {
            key: tensor.detach().to("cpu", torch.float32, copy=True)
            for key, tensor in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()
        }
    return peft_model


def wrap(model: PreTrainedModel, config: LoraConfig, **options: Any) -> PeftModel:
    """get_peft_model, with what PEFT refuses as a RequestError."""
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that 5.23 renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        try:
            return get_peft_model(model, config, **options)  # type: ignore[return-value]  # never the mixed kind here
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise RequestError(f"adapter: {' '.join(str(error).split())}") from error


def is_named(adapter: AdapterSection, router: str) -> bool:
    """True where the recipe's targets spell out this router."""
    targets = adapter.target_modules
    text = (
        " ".join([targets] if isinstance(targets, str) else targets) + " " + " ".join(adapter.target_parameters or [])
    )
    return re.search(rf"\b{re.escape(router.rpartition('.')[2])}\b", text) is not None


def all_linear(model: PreTrainedModel, avoid: set[str]) -> str | list[str]:
    """PEFT's all-linear, or for a mixture of experts the names that it stands for here.

    There PEFT's own would take in router and fused experts, as in transformers 4, when those were linear modules.
    """
    if not routers(model):
        return "all-linear"
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    head = model.get_output_embeddings()
    names = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in avoid
        }
    )
    trial = LoraConfig(target_modules=names, task_type="CAUSAL_LM")
    try:
        convert_peft_config_for_transformers(trial, model, None)
        kept = sorted(trial.target_modules or [])
    except ValueError:  # only some of the linear modules that PEFT takes for a fused expert's parts
        kept = [name for name in names if name not in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")]
    left = [name for name in names if name not in kept]
    logger.warning(
        f"adapter: all-linear adapts {', '.join(kept)} here, not the fused experts"
        + (f", nor {', '.join(left)}, by which PEFT would understand the experts" if left else "")
        + "; adapter.target_parameters reaches experts"
    )
    return kept


def adapted(model: PeftModel) -> list[str]:
    """Names, within the base, of the modules that carry LoRA."""
    prefix = "base_model.model."
    return [n.removeprefix(prefix) for n, module in model.named_modules() if isinstance(module, LoraLayer)]


def excluded(model: PreTrainedModel, adapter: AdapterSection, avoid: set[str]) -> str | list[str] | None:
    """exclude_modules with the linear routers that the recipe does not name."""
    own = adapter.exclude_modules
    aside = sorted(name for name, module in model.named_modules() if name in avoid and isinstance(module, nn.Linear))
    if not aside:
        return own
    if isinstance(own, str):
        return f"(?:{own})|" + "|".join(map(re.escape, aside))
    return [*(own or []), *aside]


def check_named(model: PreTrainedModel, field: str, names: str | list[str] | None) -> None:
    """Every listed module must exist: PEFT leaves out silently those that do not."""
    if not isinstance(names, list):
        return
    known = [name for name, _ in model.named_modules() if name]
    unknown = [name for name in names if not any(k == name or k.endswith(f".{name}") for k in known)]
    if unknown:
        last = sorted({k.rpartition(".")[2] for k in known if not k.rpartition(".")[2].isdigit()})
        raise RequestError(
            f"adapter.{field}: {base_name(model) or type(model).__name__} has no module called "
            f"{', '.join(unknown)}{nearest(unknown[0], last)}; it has {', '.join(last)}"
        )


def check_patterns(model: PeftModel, adapter: AdapterSection) -> None:
    """Every rank or alpha pattern must hit an adapted module, by PEFT's own rule."""
    names = adapted(model)
    for field, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise RequestError(f"adapter.{field}: {pattern!r} matches none of the {len(names)} adapted modules")


def token_rows(
    model: PreTrainedModel, adapter: AdapterSection, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, list[int]] | None:
    """Embedding rows (and, where it is not tied, output rows) of the new tokens, to be trained."""
    tokens = new_tokens(tokenizer)
    if not tokens or tokenizer is None:
        return None
    if model.config.is_encoder_decoder:
        raise RequestError("model.new_tokens: not supported for encoder-decoder models, whose embeddings are shared")
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]
    ends = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        ends.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)]
    rows = {name: ids for name in names if name not in (adapter.modules_to_save or [])}
    return rows or None


def prepare_frozen(model: PeftModel) -> None:
    """Settle the dtypes: what is trained in float32, and in a quantised base the norms too.

    PEFT's prepare_model_for_kbit_training also turns embeddings and output head to float32, 2 GB more for Llama-3-8B
    on a 16 GB card; QLoRA's own code keeps those in the compute dtype, as here.
    """
    norms_too = is_quantised(model)
    for module in model.modules():
        norm = norms_too and "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False):
            wanted = parameter.requires_grad or norm
            if wanted and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def load_adapter(model: PreTrainedModel, source: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put an existing LoRA adapter (folder or hub id) on a base, every tensor of it and nothing less.

    Unlike PeftModel.from_pretrained, keys that the adapter lacks or the base has no place for are errors, and the
    adapter is never rounded to the base's 16 bits on the way.

    Raises:
        RequestError: no such adapter, not LoRA, or shapes and names that do not fit this base.
    """
    source = resolve_path(str(source))
    if Path(source).is_dir() and not (Path(source) / "adapter_config.json").is_file():
        raise RequestError(f"adapter: {source} holds no adapter_config.json, so it is no adapter folder")
    with readable(source):
        config = PeftConfig.from_pretrained(source)
    if not isinstance(config, LoraConfig):
        raise RequestError(f"adapter: {source} is of type {config.peft_type}, expected LORA")
    init = str(config.init_lora_weights).lower()
    if init.startswith(CANNOT_REPEAT) or (init.startswith(CHANGES_BASE) and is_quantised(model)):
        raise RequestError(
            f"adapter: {source} was initialised with {init}, which changed its base weights, and this base does not have "
            "that change: save it as a plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    if not init.startswith(CHANGES_BASE):
        config.init_lora_weights = True  # the weights come from the file; EVA and others would warn or compute
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, None
    if trained_on and base_name(model) and trained_on != base_name(model):
        logger.warning(f"adapter: {source} was trained on {trained_on}, and goes on {base_name(model)} here")
    config.inference_mode = not trainable
    try:
        with readable(source):
            peft_model = wrap(model, config)
            result = peft_model.load_adapter(source, "default", is_trainable=trainable)
    except (RuntimeError, SafetensorError) as error:
        raise RequestError(f"adapter: {source} does not fit {base_name(model)}: {first_mismatch(error)}") from error
    wrong = [("lacks", k) for k in result.missing_keys] + [("has no place for", k) for k in result.unexpected_keys]
    if wrong:
        whose = {"lacks": f"{source} lacks", "has no place for": f"{base_name(model)} has no place for"}
        raise RequestError(
            f"adapter: {source} does not fit {base_name(model)}: {len(wrong)} tensor(s) differ, first: "
            f"{whose[wrong[0][0]]} {wrong[0][1]}"
        )
    return peft_model


def first_mismatch(error: Exception) -> str:
    """The first module of torch's or PEFT's list of shapes that differ, in one line."""
    found = re.search(r"size mismatch for (\S+):[^.]*\.?", " ".join(str(error).split()))
    return found.group(0) if found else " ".join(str(error).split())


def initialise_eva(model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """EVA's data pass (arXiv 2410.07170): A from the principal directions of each layer's inputs, ranks shared out anew.

    Args:
        batches: input_ids, attention_mask and, optionally, labels (B, T); positions labelled -100 or masked out are
            not looked at. They are gone through again and again until every layer's directions settle.

    Raises:
        RequestError: encoder-decoder base, no batches, or batches with too few tokens for the rank.
    """
    config: LoraConfig = model.peft_config["default"]  # type: ignore[assignment]
    batches = [dict(batch) for batch in batches]
    if model.config.is_encoder_decoder:
        raise RequestError("adapter.init_lora_weights: eva is not supported for encoder-decoder models")
    needed = round(max([config.r, *config.rank_pattern.values()]) * config.eva_config.rho)
    fewest = min((batch_tokens(batch) for batch in batches), default=0)
    if fewest < needed:
        raise RequestError(
            f"adapter.init_lora_weights: eva at rank {config.r} needs at least {needed} tokens a batch, found {fewest}: "
            "raise training.per_device_train_batch_size or lower adapter.r"
        )
    passes = iter(range(100 * len(batches)))

    def forward(peft_model: PeftModel, batch: dict[str, Any]) -> None:
        if next(passes, None) is None:
            raise RequestError("adapter.init_lora_weights: eva did not settle in 100 passes: raise adapter.eva_batches")
        with autocast(peft_model):
            peft_model(batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)

    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    prepare_frozen(model)


def batch_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Positions of a batch that EVA looks at."""
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    return int((mask & (batch["labels"] != -100)).sum() if "labels" in batch else mask.sum())


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapter as PEFT's own files; a fully fine-tuned model as transformers' own.

    What starts by changing the base (PiSSA, OLoRA) is written as the plain LoRA of twice the rank that, on the
    original base, gives the same outputs: [B, -B0] [A; A0] for a start of B0 A0.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(str(folder))  # type: ignore[operator]  # a transformers model
        return
    initial = getattr(model, "orpo_lite_initial", None)
    if initial is None:
        # "auto" asks the hub whether the vocabulary grew; new tokens' rows are in the adapter as it is
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    with tempfile.TemporaryDirectory() as aside:
        start = Path(aside) / "initial"
        start.mkdir()
        save_file(initial, start / "adapter_model.safetensors")
        model.save_pretrained(
            str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=str(start)
        )
