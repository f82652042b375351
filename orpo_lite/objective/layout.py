"""The layout of a model's batches: the fastest one that is exact for this model, and why.

Exactness is checked, not assumed: a small random model of the same class and configuration is run over three pairs of
unequal length, longer than any of its windows, and log-probs and gradients must equal the padded layout's.
"""

import copy
import json
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from orpo_lite.data.collate import collator_of
from orpo_lite.model.precision import Place
from orpo_lite.objective.one_call import REPEATED, Attention, Kernel, choose_attention, one_by_one, pair_calls
from orpo_lite.objective.packed_attention import inner_attention, packed_attention, plain_attention

logger = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers in a config's layer_types that mix tokens by attention alone."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
"""Largest difference of a mean log-prob, and of the gradients' norm relative to itself, that counts as rounding."""
_compared: dict[tuple[type, str, str, str, bool], str | None] = {}
"""What `compare` found, by class, content of the configuration, layout, attention, and whether one call takes all pairs."""


class Layout(NamedTuple):
    """The chosen layout, why, in words, and how its attention is computed."""

    name: str
    why: str
    attention: Attention


def choose_layout(model: PreTrainedModel, wish: str = "auto", place: Place | None = None) -> Layout:
    """Choose the layout for a base model (without adapter or wrappers), and how its attention is computed.

    Args:
        wish: auto, or the layout to use: shared, packed or padded.
        place: what computes; default, the CPU.

    Raises:
        ValueError: the requested layout is not exact for this model; the message says why and which setting works.
    """
    inner = inner_attention(model) if model._can_set_attn_implementation() else None
    attention = choose_attention(model.config, inner, place or Place("cpu", (0, 0), torch.float32))
    refused = {}
    for name in {"auto": ("shared", "packed"), "padded": ()}.get(wish, (wish,)):
        reason = refusal(model) or inexactness(model, name, attention.run is not None)
        if reason is None:
            how = f"checked exact for {type(model).__name__}; {attention.name} attention, {attention.why}"
            return Layout(name, how if wish == "auto" else f"as asked; {how}", attention)
        refused[name] = reason
    if wish not in ("auto", "padded"):
        raise ValueError(
            f"layout {wish!r} is not exact for {type(model).__name__}: {refused[wish]}; set layout to padded, or to auto"
        )
    why = "; ".join(dict.fromkeys(refused.values())) or "as asked"
    name = (model.config._attn_implementation or "eager").removeprefix("orpo_lite_").removesuffix("_repeated")
    return Layout("padded", why + REPEATED * attention.repeats, attention._replace(name=name, run=None))


def refusal(model: PreTrainedModel) -> str | None:
    """Say why a model cannot take packed rows, judging by its config and modules; None where nothing rules them out."""
    text = model.config.get_text_config(decoder=True)
    other = sorted(set(getattr(text, "layer_types", None) or []) - ATTENTION_LAYERS)
    if other:
        return f"its {', '.join(other)} layers are not attention alone, and may reach across packed pairs"
    decoder = model if text is model.config else model.get_decoder()
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):
        return "its convolutions over the sequence reach across packed pairs"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if inner_attention(model) is None:
        return f"its {model.config._attn_implementation} attention cannot be called on segments, and it has no sdpa"
    return None


def inexactness(model: PreTrainedModel, layout: str, one_call: bool = False) -> str | None:
    """Compare a layout with the padded one on a small model of the same kind, once, with all pairs in `one_call` of the kernels'
    reference or in two calls each; None where they agree."""
    inner = inner_attention(model)
    assert inner is not None
    content = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    key = (type(model), content, layout, inner, one_call)
    if key not in _compared:
        _compared[key] = compare(type(model), model.config, layout, inner, one_by_one if one_call else None)
    return _compared[key]


def compare(
    kind: type[PreTrainedModel], config: PretrainedConfig, layout: str, inner: str, run: Kernel | None = None
) -> str | None:
    """Say by how much a layout differs on a small model of a class and configuration; None where it is rounding."""
    reason = "it could not be checked"
    for dtype, tolerance in TOLERANCE.items():
        try:
            model = small_model(kind, config, inner, dtype)
            expected = outcome(model, "padded")
            got = outcome(model, layout, run)
        except Exception as error:  # whatever a model's code raises, the model cannot be checked
            logger.debug("layout check of %s in %s", kind.__name__, dtype, exc_info=True)
            reason = f"it could not be checked ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            continue
        worst = difference(got, expected)
        if math.isnan(worst):  # models that compute softmax in float32 overflow on float64's mask value
            reason = "its small model's log-probs are not finite"
            continue
        same = worst <= tolerance
        return None if same else f"a small model of its kind differs by {worst:.1g} from the padded layout"
    return reason


def difference(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the larger of the largest difference of two outcomes' log-probs and their gradients' relative one."""
    gradient = (got[1] - expected[1]).norm() / expected[1].norm()
    return torch.maximum((got[0] - expected[0]).abs().max(), gradient).item()


def outcome(model: PreTrainedModel, layout: str, run: Kernel | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute sums of log-probs by pair and side, (9,) float64, and the gradient of a loss over them, flattened."""
    batch = collator_of(layout)(check_pairs(model.config.get_text_config(decoder=True).vocab_size))
    inputs: dict[str, Any] = {
        k: batch[k].to(model.device) for k in ("input_ids", "attention_mask", "position_ids") if k in batch
    }
    router = bool(getattr(model.config.get_text_config(decoder=True), "output_router_logits", False))
    if router:
        inputs["output_router_logits"] = True
    if layout == "padded":
        plain_attention(model)
        output = model(**inputs, use_cache=False)
    else:
        with packed_attention(model):
            output = model(**inputs, use_cache=False, orpo_segments=pair_calls(batch, run))
    logits = output.logits.cpu().flatten(0, 1)[batch["label_rows"]].double()
    logps = logits.log_softmax(-1).gather(1, batch["label_ids"][:, None]).squeeze(1)
    # per pair and side, weighted by position in the sequence, so that swapped tokens show
    groups = [logps[batch[side] == pair] for side in ("chosen_pair", "rejected_pair", "nll_pair") for pair in range(3)]
    sums = torch.stack([(mine * torch.arange(1, len(mine) + 1)).sum() / len(mine) ** 2 for mine in groups])
    loss = sums.sum() + (output.aux_loss.cpu().double() if router else 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros(1) if g is None else g.flatten().cpu().double() for g in grads]
    return sums.detach(), torch.cat(flat)


def check_pairs(vocabulary: int) -> list[dict[str, Any]]:
    """Make three pairs of unequal length with prompts and completions that share some, much or nothing."""
    g = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=g).tolist()

    pairs = []
    for prompt, common, chosen, rejected in ((13, 0, 9, 17), (5, 2, 21, 4), (24, 3, 6, 11)):
        start = tokens(prompt) + tokens(common)
        pairs.append({"chosen_ids": start + tokens(chosen), "rejected_ids": start + tokens(rejected)})
        pairs[-1] |= {"chosen_start": prompt, "rejected_start": prompt}
    return pairs


def small_model(
    kind: type[PreTrainedModel], config: PretrainedConfig, inner: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Make a random model of a class, with its configuration except the sizes, and weights that tell tokens apart."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = shrink(config)
        small.get_text_config(decoder=True)._attn_implementation = inner
        model: Any = kind(small).train()
        model.to(dtype)
        disable_dropout(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=min(1.0, 2 * parameter.shape[-1] ** -0.5))
                else:  # norms, biases, sinks: near their initial values, but not all alike
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the modules, and the probabilities that attention keeps as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


SMALL = {
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "intermediate_size": 64, "ffn_dim": 64,
    "n_inner": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": 8,
    "attention_chunk_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "vocab_size": 199, "vocab_size_per_layer_input": 199,
    "hidden_size_per_layer_input": 16, "hidden_size_per_block": 64, "floor_scale": 8,
}  # fmt: skip
"""Sizes of the small model; a model that is already smaller keeps its own."""


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a configuration with few layers, heads and channels, and windows shorter than the pairs of the check.

    Kinds of layers, head grouping, soft caps, biases, ties and positions stay. A configuration whose sizes depend on each
    other in ways unknown here makes a model that fails to build, and the layout is then not taken as exact.
    """
    small = copy.deepcopy(config)
    text: Any = small.get_text_config(decoder=True)
    for other in (getattr(small, name, None) for name in small.sub_configs):
        if other is not None and other is not text:
            other.num_hidden_layers = 1  # a tower that text never passes through
    names = getattr(text, "per_layer_attributes", None) or ()
    own = [{name: getattr(layer, name) for name in names} for layer in text.per_layer_config] if names else []
    if own:
        text.per_layer_config = None
    whole = {name: getattr(text, name) for name in names}
    heads, grouped = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    head_dim = getattr(text, "head_dim", None)
    fits = head_dim is None or head_dim * heads == text.hidden_size
    for name, value in SMALL.items():
        now = getattr(text, name, None)
        if isinstance(now, int) and not isinstance(now, bool) and now > value:
            setattr(text, name, value)
    few = min(4, heads)
    text.num_attention_heads = few
    if isinstance(grouped, int):
        text.num_key_value_heads = few if grouped == heads else 1 if grouped == 1 or few < 2 else few // 2
    if head_dim is not None and not hasattr(text, "qk_rope_head_dim"):  # latent attention keeps the sizes of its parts
        text.head_dim = text.hidden_size // few if fits else min(head_dim, 24)
    for token, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if getattr(text, name, None) is not None:  # as small as the vocabulary
            setattr(text, name, token)
    if own:  # layers of other sizes (Gemma 4's) keep the proportion
        scaled = [{k: max(1, v * getattr(text, k) // whole[k]) for k, v in sizes.items()} for sizes in own]
        text.per_layer_config = dict(enumerate(scaled))
    _fewer_layers(text)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict):
        half = int(text.hidden_size // few * rope.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):  # longrope: a factor for each rotary frequency
            if isinstance(rope.get(name), list):
                rope[name] = rope[name][:half]
    return small


def cut_layers(text: Any, count: int) -> None:
    """Keep the first layers of a configuration, and of its lists with a value for each layer."""
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count


def _fewer_layers(text: Any) -> None:
    """Keep as many layers as show every kind, at least two."""
    layers = text.num_hidden_layers
    patterns = [k for k, v in vars(text).items() if isinstance(v, list) and len(v) == layers]
    kinds = list(zip(*(map(str, getattr(text, k)) for k in patterns), strict=True)) or [()] * layers
    keep = min(layers, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))
    if getattr(text, "num_kv_shared_layers", 0):  # the last layers take keys and values from the ones before
        keep = layers
    cut_layers(text, keep)
    if isinstance(getattr(text, "max_window_layers", None), int):
        text.max_window_layers = min(text.max_window_layers, keep)
