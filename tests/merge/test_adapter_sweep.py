"""Adapters of every kind that PEFT makes x families x tied or not x vocabulary resized or not: PEFT's own logits, the merged
model's and those of `load_adapter` are the same, or the adapter is refused with what to do.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.run import merge
from orpo_lite.model import load_adapter, load_base
from orpo_lite.recipe import ModelSection
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = 420
SIZES: dict[str, Any] = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
                         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GOT_VISION = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
              "patch_size": 16, "mlp_dim": 16, "global_attn_indexes": [0]}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48},
    "phi3": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gemma3": {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4},
    "got_ocr2": {"text_config": SIZES | {"model_type": "qwen2"}, "vision_config": GOT_VISION},
}
ATTENTION = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
NOT_TEXT = {"gemma3": ".*vision_tower.*", "got_ocr2": ".*vision_tower.*"}
ENDS = {"gpt2": ("wte", "lm_head")}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"ATTENTION": 3}, "alpha_pattern": {r"layers\.1\..*ATTENTION": 5}},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "embeddings": {"target_modules": ["EMBEDDINGS", "ATTENTION"]},
    "head": {"target_modules": ["HEAD", "ATTENTION"]},
    "saved both": {"modules_to_save": ["EMBEDDINGS", "HEAD"]},
    "saved tied": {"modules_to_save": ["EMBEDDINGS"], "ensure_weight_tying": True},
    "norm saved": {"modules_to_save": ["NORM"]},
    "tokens": {"trainable_token_indices": [7, 299]},
    "saved embeddings": {"save": True},
    "eva": {"init_lora_weights": "eva"},
    "pissa": {"init_lora_weights": "pissa"},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}
EXPERT_FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
NORMS = {"gpt2": "ln_1"}
REFUSED = {"pissa": "changed its base weights", "lora_bias": "none to add it to"}
"""Kinds that are refused in a merge, with the words."""
SIZES_OF_VOCABULARY = (ROWS, 300, 431)
RESIZED = ("llama", "qwen2", "gpt2", "gemma3")
"""Families that are tried in every combination; of the others, every kind is tied or untied by turns."""
WITH_ROWS = ("plain", "dora", "saved both", "saved embeddings", "tokens", "embeddings")
"""Kinds for which the size of the vocabulary makes a difference."""


def config(family: str, tied: bool) -> Any:
    more = FAMILIES[family]
    sizes = {} if "text_config" in more else SIZES
    made = AutoConfig.for_model(family, **sizes | more)
    made.tie_word_embeddings = made.get_text_config().tie_word_embeddings = tied
    return made


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """base_of(family, tied) -> folder of a random model, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(family: str, tied: bool) -> Path:
        if (family, tied) not in made:
            made[family, tied] = place = tmp_path_factory.mktemp(family)
            tiny_model(config(family, tied)).save_pretrained(place)
            tiny_tokenizer(eos="</s>", pad="<pad>").save_pretrained(place)
        return made[family, tied]

    return folder


def spelled(value: Any, family: str) -> Any:
    """A kind's options with the family's own names of modules."""
    embeddings, head = ENDS.get(family, ("embed_tokens", "lm_head"))
    names = {"EMBEDDINGS": [embeddings], "HEAD": [head], "ATTENTION": ATTENTION.get(family, ["q_proj", "v_proj"]),
             "NORM": [NORMS.get(family, "input_layernorm")]}  # fmt: skip
    if isinstance(value, dict):
        spelt = {key: names["ATTENTION"][0].join(key.split("ATTENTION")) for key in value}
        return {spelt[key]: rank for key, rank in value.items()}
    if isinstance(value, list) and any(name in names for name in value):
        return [one for name in value for one in names.get(name, [name])]
    return value


def combinations() -> Iterator[tuple[str, str, bool, int]]:
    for family, kind in itertools.product(FAMILIES, KINDS):
        if kind == "experts" and family not in EXPERT_FAMILIES:
            continue
        number = list(KINDS).index(kind)
        for tied in (False, True) if family in RESIZED else (number % 2 == 0,):
            for rows in SIZES_OF_VOCABULARY if family in RESIZED and kind in WITH_ROWS else (ROWS,):
                yield family, kind, tied, rows


def adapter(base: Path, family: str, kind: str, rows: int, place: Path) -> tuple[Any, torch.Tensor]:
    """Write an adapter that PEFT made; return PEFT's model and token ids for it."""
    options = {name: spelled(value, family) for name, value in KINDS[kind].items()}
    save: Any = options.pop("save", "auto")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    init = options.pop("init_lora_weights", True)
    given = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ATTENTION.get(family, ["q_proj", "v_proj"]),
             "exclude_modules": NOT_TEXT.get(family), "fan_in_fan_out": family == "gpt2"} | options  # fmt: skip
    made = get_peft_model(model, LoraConfig(**given, init_lora_weights=True if init == "eva" else init))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(place, save_embedding_layers=save)
    if init == "eva":  # which would need data to start from; the file says the same
        at = place / "adapter_config.json"
        at.write_text(json.dumps(json.loads(at.read_text()) | {"init_lora_weights": "eva"}))
    tiny_tokenizer(eos="</s>", pad="<pad>").save_pretrained(place)
    return made.eval(), torch.tensor([[5, 7, 42, 99, rows - 1, 299, 11, rows - 2]])


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind(base_of, family, tmp_path, recwarn):
    warnings.simplefilter("ignore")
    wrong, refused, done = [], [], 0
    for number, (_, kind, tied, rows) in enumerate(c for c in combinations() if c[0] == family):
        case, base, place = (
            f"{kind}, {'tied' if tied else 'untied'}, {rows} rows",
            base_of(family, tied),
            tmp_path / str(number),
        )
        try:
            made, ids = adapter(base, family, kind, rows, place)
        except (ValueError, NotImplementedError) as error:  # PEFT itself does not make such a one
            refused.append(f"{case}: PEFT: {error}")
            continue
        whole = [
            key for key in load_file(place / "adapter_model.safetensors") if "lora_" not in key and "token_" not in key
        ]
        # PEFT looks for the size of a vocabulary where these configurations have none
        if (
            family in NOT_TEXT
            and rows != ROWS
            and not any(name in key for key in whole for name in ("embed_tokens", "wte", "lm_head"))
        ):
            refused.append(f"{case}: PEFT saves no embeddings")
            continue
        # PEFT saves no row of an untied head that LoRA leaves alone, so nobody has the new ones
        seen = ROWS if kind == "embeddings" and not tied else None
        right = logits(made, ids)[..., :seen]
        try:
            found = AutoModelForCausalLM.from_pretrained(
                merge(place, tmp_path / f"{number}-merged", verify=False), attn_implementation="eager"
            )
            if not (far := (logits(found, ids)[..., :seen] - right).abs().max().item()) < 1e-5 * max(
                1, right.abs().max().item()
            ):
                wrong.append(f"{case}: merged is off by {far}")
        except RequestError as error:
            refused.append(f"{case}: {error}")
            if REFUSED.get(kind, "nothing else") not in str(error):
                wrong.append(f"{case}: merge refuses: {error}")
        try:
            model, _ = load_base(ModelSection(name_or_path=str(base), quantization="none", attention="eager"))
            if not (far := (logits(load_adapter(model, place), ids)[..., :seen] - right).abs().max().item()) < 1e-5:
                wrong.append(f"{case}: loaded is off by {far}")
        except RequestError as error:
            wrong.append(f"{case}: load_adapter refuses: {error}")
        done += 1
    print(f"{family}: {done} combinations, {len(refused)} refused\n  " + "\n  ".join(refused))
    assert not wrong, "\n".join(wrong)


def test_there_are_enough():
    assert len(list(combinations())) >= 200
