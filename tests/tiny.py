"""Tiny random models and tokenizers that keep a real model's architecture, built without any download.

`tiny_config` shrinks sizes only, so windows, soft caps, tied heads, biases, partial rotary and q/k norms stay in the
test; `base_tokenizer` gives a byte-level BPE with the special tokens and the chat template of a recipe's base model.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import orpo_lite

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
HIDDEN, WINDOW = 64, 16
SIZES = {
    "intermediate_size": 96,
    "d_ff": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "sliding_window": WINDOW,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
}
"""Fields that are shrunk where the real config has them and they are not null or 0."""
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14, "position_embedding_size": 16,
         "output_proj_dims": 32, "out_hidden_size": HIDDEN, "subsampling_conv_channels": [4, 4], "mm_embed_dim": 32,
         "mm_posemb_size": 16, "audio_embed_dim": 32}  # fmt: skip
"""The same for the halves of multimodal models that are not text."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer: transformers gives it to every tokenizer saved beside a Qwen model, whatever the file says."""
CORPUS = """The quick brown fox jumps over the lazy dog. How do I boil an egg? Boil it for eight minutes.
You are a helpful assistant.\n\nuser\nassistant\nsystem\nWhat is the capital of France? The capital of France is Paris.
I cannot help you with that, sorry. Sure, here is a short poem:\n\nRoses are red,\nviolets are blue.\n\n"""


def tiny_config(config: PretrainedConfig, tokenizer: Any = None, layers: int = 2) -> PretrainedConfig:
    """The same architecture with hidden size 64 and as few layers as show every kind of layer, at least `layers`.

    Heads keep their kind: as many key heads as query heads, one, or half; and a head_dim that is not hidden / heads
    stays so. The window becomes 16 tokens, shorter than a test sequence. The vocabulary and the special token ids are
    the tokenizer's; without one, 320 tokens of which 1 begins and 2 ends a sequence.
    """
    whole = copy.deepcopy(config)
    real, tiny = config.get_text_config(decoder=True), whole.get_text_config(decoder=True)
    for name in whole.sub_configs:
        other = getattr(whole, name, None)
        if other is not None and other is not tiny:
            shrink_tower(other)
    sizes = layer_sizes(real)
    if sizes:
        real = copy.deepcopy(real)
        tiny.per_layer_config = real.per_layer_config = None
    names = set(real.to_dict()) | set(real.attribute_map)

    def size(name: str, value: Any) -> None:
        if name in names and getattr(real, name):
            setattr(tiny, name, value)

    heads, kv_heads = real.num_attention_heads, getattr(real, "num_key_value_heads", None)
    head_dim = getattr(real, "head_dim", None) or real.hidden_size // heads
    size("hidden_size", HIDDEN)
    size("num_attention_heads", 4)
    size("num_key_value_heads", 4 if kv_heads == heads else 1 if kv_heads == 1 else 2)
    size("head_dim", HIDDEN // 4 if head_dim * heads == real.hidden_size else 24)
    for name, value in SIZES.items():
        size(name, value)
    size("num_experts_per_tok", min(2, getattr(real, "num_experts_per_tok", None) or 2))
    rope = getattr(tiny, "rope_parameters", None) or {}
    for name in ("short_factor", "long_factor"):  # one for each pair of rotary channels
        if name in rope:
            rope[name] = rope[name][: int(HIDDEN // 4 * rope.get("partial_rotary_factor", 1.0)) // 2]

    lists = [k for k, v in vars(real).items() if isinstance(v, list) and len(v) == real.num_hidden_layers]
    if lists:
        rows = [tuple(row) for row in zip(*(getattr(real, name) for name in lists), strict=True)]
        kinds = list(dict.fromkeys(rows))
        shared = len(kinds) if getattr(real, "num_kv_shared_layers", 0) else 0  # with keys and values of those before
        size("num_kv_shared_layers", shared)
        kept = (kinds * layers)[: max(layers, len(kinds) + shared)]
        for name, values in zip(lists, zip(*kept, strict=True), strict=True):
            setattr(tiny, name, list(values))
        layers = len(kept)
    for name in ("num_hidden_layers", "max_window_layers"):
        size(name, layers)
    if sizes:  # in the same proportion to the others' as in the model
        tiny.per_layer_config = {
            i: {k: max(1, v * getattr(tiny, k) // getattr(real, k)) for k, v in sizes[rows.index(row)].items()}
            for i, row in enumerate(kept)
        }

    # weights scaled by the width, so that logits are as spread out as the real model's
    size("initializer_range", getattr(real, "initializer_range", 0) * (real.hidden_size / HIDDEN) ** 0.5)
    if tokenizer is None:
        ids = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    else:
        # a few rows more than the tokenizer has, as Qwen's and Phi's embeddings
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ids["vocab_size"] = len(tokenizer) + 8
    for name, value in ids.items():
        setattr(tiny, name, value)
    size("vocab_size_per_layer_input", ids["vocab_size"])
    # through the constructor again, so that the config checks what was set
    return type(config).from_dict(whole.to_dict() | {"dtype": "float32"})


def layer_sizes(text: Any) -> dict[int, dict[str, int]]:
    """Return the sizes that differ from layer to layer (Gemma 4's heads), for each layer; empty where none does."""
    names = getattr(text, "per_layer_attributes", None) or ()
    return {i: {k: getattr(one, k) for k in names} for i, one in enumerate(text.per_layer_config)} if names else {}


def shrink_tower(config: PretrainedConfig) -> None:
    """Make the vision or audio half of a multimodal configuration tiny, which text never passes through."""
    for name, value in TOWER.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


def tiny_model(config: PretrainedConfig, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """A random float32 model of this (tiny) config in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs).eval()


def tiny_tokenizer(
    special_tokens: tuple[str, ...] = (),
    chat_template: str | None = None,
    bos: str | None = None,
    eos: str | None = "</s>",
    pad: str | None = None,
    unk: str | None = None,
    add_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens with real merges, trained in a moment on a few sentences.

    `special_tokens` become tokens that never split; `add_bos` puts `bos` before every text, as Llama's tokenizers do.
    """
    specials = list(dict.fromkeys(token for token in (bos, eos, pad, unk, *special_tokens) if token))
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([CORPUS], trainer)
    if add_bos and bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        extra_special_tokens=[token for token in specials if token not in (bos, eos, pad, unk)],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@dataclass(frozen=True)
class Family:
    """What a base model's tokenizer adds to plain text."""

    eos: str
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    specials: tuple[str, ...] = ()
    add_bos: bool = False
    template: str | None = None
    """File in trl/chat_templates, or the template itself; None for a model that has none."""


def chatml(default_system: str) -> str:
    """The ChatML template of SmolLM2 and Qwen2, which write a system turn where there is none."""
    return (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n" + default_system + "<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


LLAMA3 = ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>")
QWEN = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "specials": ("<|im_start|>", "<tool_call>", "</tool_call>")}
QWEN_THINKING = QWEN | {"specials": (*QWEN["specials"], "<think>", "</think>")}
LLAMA2 = Family(bos="<s>", eos="</s>", unk="<unk>", add_bos=True)
MISTRAL = Family(bos="<s>", eos="</s>", unk="<unk>", specials=("[INST]", "[/INST]"), add_bos=True,
                 template=(Path(orpo_lite.__file__).parent / "model/templates/mistral.jinja").read_text("utf-8"))  # fmt: skip
GEMMA = Family(bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", specials=("<start_of_turn>", "<end_of_turn>"),
               add_bos=True, template="gemma.jinja")  # fmt: skip
GEMMA4 = replace(
    GEMMA, eos="<turn|>", specials=("<|turn>", "<|channel>", "<channel|>"), add_bos=False, template="gemma4_v5.jinja"
)
LLAMA3_CHAT = Family(
    bos="<|begin_of_text|>", eos="<|eot_id|>", specials=(*LLAMA3, "<|finetune_right_pad_id|>"), add_bos=True,
    template="llama3_2.jinja",
)  # fmt: skip
SMOLLM3 = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\nReasoning Mode: ' }}"
    "{{ ('/think' if enable_thinking else '/no_think') ~ '\n\n<|im_end|>\n' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ message.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
"""SmolLM3's, without its tools and long default instructions: today's date, and an empty thought before plain answers."""
PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
FAMILIES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Family(
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        template=chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ),
    "Qwen/Qwen2-0.5B-Instruct": Family(**QWEN, template=chatml("You are a helpful assistant.")),
    "Qwen/Qwen2.5-7B-Instruct": Family(**QWEN, template="qwen2_5.jinja"),
    "Qwen/Qwen3-4B": Family(**QWEN_THINKING, template="qwen3.jinja"),
    "Qwen/Qwen3-8B": Family(**QWEN_THINKING, template="qwen3.jinja"),
    "Qwen/Qwen3-14B": Family(**QWEN_THINKING, template="qwen3.jinja"),
    "Qwen/Qwen3.5-4B": Family(**QWEN_THINKING, template="qwen3_5_think.jinja"),
    "Qwen/Qwen3.5-9B": Family(**QWEN_THINKING, template="qwen3_5_think.jinja"),
    "meta-llama/Llama-2-7b-hf": LLAMA2,
    "meta-llama/Meta-Llama-3-70B": Family(
        bos="<|begin_of_text|>", eos="<|end_of_text|>", specials=LLAMA3, add_bos=True
    ),
    "meta-llama/Meta-Llama-3-8B": Family(bos="<|begin_of_text|>", eos="<|end_of_text|>", specials=LLAMA3, add_bos=True),
    "meta-llama/Llama-3.1-8B-Instruct": replace(LLAMA3_CHAT, template="llama3_1.jinja"),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA3_CHAT,
    "mistralai/Mistral-7B-v0.1": LLAMA2,
    "mistralai/Mixtral-8x7B-v0.1": LLAMA2,
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL,
    "mistralai/Ministral-8B-Instruct-2410": MISTRAL,
    "google/gemma-2-9b-it": GEMMA,
    "google/gemma-3-4b-it": replace(GEMMA, template="gemma3.jinja"),
    "google/gemma-3-12b-it": replace(GEMMA, template="gemma3.jinja"),
    "google/gemma-4-E4B-it": GEMMA4,
    "google/gemma-4-12B-it": GEMMA4,
    "google/gemma-4-31B-it": GEMMA4,
    "HuggingFaceTB/SmolLM3-3B": Family(
        bos="<|begin_of_text|>",
        eos="<|im_end|>",
        pad="<|eot_id|>",
        specials=("<|im_start|>", "<think>", "</think>"),
        template=SMOLLM3,
    ),
    "microsoft/Phi-4-mini-instruct": Family(
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<|endoftext|>",
        specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        template=PHI4,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Family(
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        specials=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        template="deepseek_r1_distill.jinja",
    ),
    "microsoft/phi-2": Family(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>"),
}


@functools.cache
def template_text(name: str | None) -> str | None:
    """A template by its file name in trl/chat_templates; text that is a template already comes back as it is."""
    return (TEMPLATES / name).read_text("utf-8") if name and name.endswith(".jinja") else name


def base_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the special tokens and the chat template of one of the recipes' base models."""
    family = FAMILIES[name_or_path]
    return tiny_tokenizer(
        family.specials,
        template_text(family.template),
        bos=family.bos,
        eos=family.eos,
        pad=family.pad,
        unk=family.unk,
        add_bos=family.add_bos,
    )
