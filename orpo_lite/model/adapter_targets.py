"""Modules of a base that an adapter targets, and those that it must leave alone."""

import logging

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.model.inspection import base_name, routers
from orpo_lite.model.tokenizer import new_tokens
from orpo_lite.recipe import AdapterSection

logger = logging.getLogger(__name__)


def all_linear(model: PreTrainedModel, avoid: set[str]) -> str | list[str]:
    """Return PEFT's all-linear, or for a mixture of experts the names that it stands for here.

    On those, PEFT's own all-linear would include router and fused experts, which were linear modules in transformers 4.
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
    logger.warning(
        f"adapter: all-linear adapts {', '.join(kept)} here, not the fused experts; adapter.target_parameters reaches those"
    )
    return kept


def check_named(model: PreTrainedModel, adapter: AdapterSection, targets: str | list[str]) -> None:
    """Refuse names of modules and parameters that do not exist, which PEFT skips silently or with a warning."""
    modules = [name for name, _ in model.named_modules() if name]
    # fused experts held in 4 bits are parametrized
    weights = [
        name.replace(".parametrizations.", ".").removesuffix(".original") for name, _ in model.named_parameters()
    ]
    for field, names, known, kind, parts in (
        ("target_modules", targets, modules, "module", 1),
        ("modules_to_save", adapter.modules_to_save, modules, "module", 1),
        ("target_parameters", adapter.target_parameters, weights, "parameter", 2),
    ):
        listed = names if isinstance(names, list) else []
        unknown = [name for name in listed if not any(k == name or k.endswith(f".{name}") for k in known)]
        if unknown:
            last = sorted({".".join(k.split(".")[-parts:]) for k in known if not k.rpartition(".")[2].isdigit()})
            raise RequestError(
                f"adapter.{field}: {base_name(model) or type(model).__name__} has no {kind} called "
                f"{', '.join(unknown)}{nearest(unknown[0], last)}; it has {', '.join(last)}"
            )


def token_rows(
    model: PreTrainedModel, adapter: AdapterSection, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, list[int]] | None:
    """Return the embedding rows (and output rows, where those are not tied) of the new tokens, to be trained."""
    tokens = new_tokens(tokenizer)
    if not tokens or tokenizer is None:
        return None
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]
    ends: list[nn.Module | None] = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        ends.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is end for end in ends)]
    rows = {name: ids for name in names if name not in (adapter.modules_to_save or [])}
    return rows or None
