"""Every shipped recipe trains: one optimizer step, offline, on a tiny random model of the recipe's architecture.

The tiny model keeps the real config but for its sizes (tests/tiny.py), the tokenizer has the base's special tokens and
chat template, the rows have the shape of the recipe's data set, and the step goes through `orpo_lite.train.pipeline.run`.
"""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_lite.data import load_pairs
from orpo_lite.plan.meta_model import CONFIGS, shipped_config
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import BUILTIN, shipped_recipes
from orpo_lite.train.sweep import searched
from tests.tiny import base_tokenizer, layer_sizes, tiny_config, tiny_model

RECIPES = shipped_recipes()
PARAMETERS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-4-12B-it": 11_959_730_176,
    "google/gemma-4-31B-it": 31_273_086_512,
    "google/gemma-4-E4B-it": 7_941_100_832,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-2": 2_779_683_840,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
}
"""As published with the weights; Qwen3.5's without the vision half, which is not loaded. Gemma 4's are published in round
figures, which these meet: 8B, 12B, 31B (30.7B of text)."""

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SEVEN = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
GATED_DELTA = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
LAYERS = {
    "Qwen/Qwen3.5-4B": SEVEN | GATED_DELTA,
    "Qwen/Qwen3.5-9B": SEVEN | GATED_DELTA,
    "google/gemma-4-E4B-it": SEVEN | {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"},
    "microsoft/Phi-4-mini-instruct": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "microsoft/phi-2": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "mistralai/Mixtral-8x7B-v0.1": ATTENTION,  # not the router
}
"""Layers with LoRA, where they are not a Llama's seven."""

IMPLICIT = {"trl-lib/ultrafeedback_binarized"}
"""Data sets without a prompt column; the others have it as text beside whole conversations."""
QUESTIONS = ["What is the capital of France?", "How do I boil an egg?", "Write a short poem.", "Why is the sky blue?"]


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices of 64 columns lose more by waiting for a second thread than it saves, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(numbers: range, implicit: bool) -> list[dict]:
    """Pairs in UltraFeedback's shape: both sides are whole conversations, with or without a prompt column."""
    made = []
    for number in numbers:
        question = f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"
        sides = {
            side: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for side, answer in (
                ("chosen", f"Sure, here is the answer to number {number}: Paris, in eight minutes."),
                ("rejected", f"I cannot help you with that, sorry ({number})."),
            )
        }
        made.append(sides if implicit else {"prompt": question} | sides)
    return made


def write_rows(path, numbers, implicit):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(numbers, implicit)), "utf-8")
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_every_base_model_has_its_config_here(name):
    base = Recipe.load(name).model.name_or_path
    assert base.startswith(BUILTIN) or shipped_config(base) is not None  # a builtin one ships whole


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "quickstart"])
def test_header_names_a_range_and_a_plan(name):
    recipe, header = Recipe.load(name), RECIPES[name].read_text("utf-8").partition("\nname:")[0]
    words = re.search(r"# Sweep first: orpo-lite sweep --recipe (.+)", header)[1].split()
    assert words[0] == name and words[-1] == "--halving"
    rates = searched(words[1:-1])["training.learning_rate"]
    assert float(rates[0]) <= recipe.training["learning_rate"] <= float(rates[-1])
    assert all(Recipe.load(name, [f"training.learning_rate={rate}"]) for rate in rates)
    if "CPU" not in recipe.needs:
        assert recipe.plans_batches and recipe.memory.checkpointing == "auto"
        assert "# Planned for " in header


@pytest.mark.parametrize("name", sorted(path.stem.replace("--", "/", 1) for path in CONFIGS.glob("*.json")))
def test_config_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shipped_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_no_config_for_a_model_that_is_not_here(tmp_path):
    assert shipped_config("org/unknown") is None
    assert shipped_config(str(tmp_path)) is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_tiny_config_changes_sizes_only(name):
    """What makes an architecture special, windows, caps, ties and biases, must be there in the tiny model too."""
    config = tiny_config(shipped_config(name))
    real, tiny = (each.get_text_config(decoder=True) for each in (shipped_config(name), config))
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "num_local_experts", "vocab_size", "sliding_window", "max_window_layers", "initializer_range",
             "layer_types", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "per_layer_config", "no_rope_layers",
             "hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers", "linear_num_key_heads",
             "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"}  # fmt: skip
    was, now = ({**each.to_dict(), "rope_parameters": lengths(each.rope_parameters)} for each in (real, tiny))
    assert {key for key, value in now.items() if value != was.get(key)} <= sizes
    assert bool(getattr(tiny, "sliding_window", None)) == bool(getattr(real, "sliding_window", None))
    for kinds in ("layer_types", "no_rope_layers"):
        assert set(getattr(tiny, kinds, None) or []) == set(getattr(real, kinds, None) or [])
    assert bool(layer_sizes(tiny)) == bool(layer_sizes(real))
    if not layer_sizes(real):
        grouped, tiny_grouped = (c.num_key_value_heads < c.num_attention_heads for c in (real, tiny))
        assert grouped == tiny_grouped
    assert sum(parameter.numel() for parameter in tiny_model(config).parameters()) < 400_000


def lengths(rope):
    """Rotary settings without the numbers that there are for each channel."""
    return {key: True if isinstance(value, list) else value for key, value in (rope or {}).items()}


PLAIN = {
    "qwen3-8b-qlora": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Paris.<|im_end|>"),
    "qwen3.5-4b-qlora": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Paris.<|im_end|>"),
    "smollm3-3b-qlora": ("<|im_start|>assistant\n", "<think>\n\n</think>\nParis.<|im_end|>"),
    "gemma-4-12b-qlora": ("<|turn>model\n", "Paris.<turn|>"),
    "phi-4-mini-qlora": ("<|assistant|>", "Paris.<|end|>"),
    "llama-3.1-8b-qlora": ("<|end_header_id|>\n\n", "Paris.<|eot_id|>"),
    "r1-distill-qwen-7b-qlora": ("<｜Assistant｜><think>\n", "A capital.\n</think>\n\nParis.<｜end▁of▁sentence｜>"),
}
"""End of the prompt, and all of the answer that is trained."""


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_trained_ends_and_thinks_as_the_model_does(name, tmp_path):
    recipe = Recipe.load(name)
    thought = "<think>\nA capital.\n</think>\n\n" if "r1" in name else ""
    row = {"conversations": [{"from": "human", "value": "Which one?"}]}
    row |= {
        side: {"from": "gpt", "value": thought + answer} for side, answer in (("chosen", "Paris."), ("rejected", "No."))
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    tokenizer = base_tokenizer(recipe.model.name_or_path)
    sources = {"train": [{"path": str(tmp_path / "pairs.jsonl")}], "eval": None, "eval_fraction": 0}
    data = Recipe.parse(recipe.model_dump(mode="json") | {"data": recipe.data.model_dump(mode="json") | sources}).data
    pair = load_pairs(data, tokenizer).train[0]
    start = int(pair["chosen_start"])
    prompt, answer = (tokenizer.decode(part) for part in (pair["chosen_ids"][:start], pair["chosen_ids"][start:]))
    assert (prompt[-len(PLAIN[name][0]) :], answer) == PLAIN[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_one_step(name, tmp_path):
    from orpo_lite.train.pipeline import run

    shipped = Recipe.load(name)
    base = shipped.model.name_or_path
    implicit = shipped.data.train[0].path in IMPLICIT
    words = [
        f"data.train={write_rows(tmp_path / 'pairs.jsonl', range(12), implicit)}",
        f"data.eval={write_rows(tmp_path / 'eval.jsonl', range(12, 16), implicit)}",
        "training.max_steps=1",
        f"training.output_dir={tmp_path / 'run'}",
        # a warm-up of several steps starts at 0: the one step taken here has to move the adapter
        "training.warmup_steps=0",
        # evaluates and saves during training as well
        "training.logging_steps=1",
        "training.eval_steps=1",
        "training.save_steps=1",
        "evaluation.samples=1",
        "evaluation.max_new_tokens=4",
        "model.dtype=float32",
    ]
    if not base.startswith(BUILTIN):
        tokenizer = base_tokenizer(base)
        config = tiny_config(shipped_config(base), tokenizer)
        tiny_model(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        words.append(f"model.name_or_path={tmp_path / 'base'}")

    finished = run(Recipe.load(name, words))

    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert finished.record.steps == 1 and record["steps"] == 1
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert adapter and all(tensor.isfinite().all() for tensor in adapter.values())
    # B starts at zero, so whatever is not zero was learned
    untouched = [key for key, tensor in adapter.items() if "lora_B" in key and not tensor.any()]
    assert not untouched, untouched
    layers = {key.split(".")[-3] for key in adapter if "lora_B" in key}
    assert layers == LAYERS.get(base, SEVEN)
    template = (tmp_path / "run" / "chat_template.jinja").read_text("utf-8")
    if not base.startswith(BUILTIN):
        assert template == tokenizer.chat_template or (tokenizer.chat_template is None and "<|assistant|>" in template)
    for side in ("before", "after"):
        assert all(math.isfinite(value) for value in record["eval"][side].values() if isinstance(value, float))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    step = next(line for line in logged if "loss" in line)
    assert math.isfinite(step["loss"]) and step["loss"] > 0
    assert Recipe.load(tmp_path / "run").orpo == shipped.orpo
