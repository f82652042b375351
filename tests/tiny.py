"""Tiny random models and tokenizers that keep a real model's architecture, built without any download.

`tiny_config` shrinks sizes only, so windows, soft caps, tied heads, biases, partial rotary and q/k norms stay in the
test; `base_tokenizer` gives a byte-level BPE with the special tokens and the chat template of a recipe's base model.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
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
}
"""Fields that are shrunk where the real config has them and they are not null or 0."""

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
    real, tiny = config, copy.deepcopy(config)
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

    if getattr(real, "layer_types", None):
        kinds = list(dict.fromkeys(real.layer_types))
        tiny.layer_types = (kinds * layers)[: max(layers, len(kinds))]
        layers = len(tiny.layer_types)
    for name in ("num_hidden_layers", "max_window_layers"):
        size(name, layers)

    # weights scaled by the width, so that logits are as spread out as the real model's
    size("initializer_range", getattr(real, "initializer_range", 0) * (real.hidden_size / HIDDEN) ** 0.5)
    if tokenizer is None:
        tiny.vocab_size, tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id = 320, 1, 2, None
    else:
        # a few rows more than the tokenizer has, as Qwen's and Phi's embeddings
        tiny.vocab_size = len(tokenizer) + 8
        tiny.bos_token_id, tiny.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        tiny.pad_token_id = tokenizer.pad_token_id
    # through the constructor again, so that the config checks what was set
    return type(real).from_dict(tiny.to_dict() | {"dtype": "float32"})


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
LLAMA2 = Family(bos="<s>", eos="</s>", unk="<unk>", add_bos=True)
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
    "Qwen/Qwen3-4B": Family(**QWEN | {"specials": (*QWEN["specials"], "<think>", "</think>")}, template="qwen3.jinja"),
    "meta-llama/Llama-2-7b-hf": LLAMA2,
    "meta-llama/Meta-Llama-3-70B": Family(
        bos="<|begin_of_text|>", eos="<|end_of_text|>", specials=LLAMA3, add_bos=True
    ),
    "meta-llama/Meta-Llama-3-8B": Family(bos="<|begin_of_text|>", eos="<|end_of_text|>", specials=LLAMA3, add_bos=True),
    "meta-llama/Llama-3.2-3B-Instruct": Family(
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        specials=(*LLAMA3, "<|finetune_right_pad_id|>"),
        add_bos=True,
        template="llama3_2.jinja",
    ),
    "mistralai/Mistral-7B-v0.1": LLAMA2,
    "mistralai/Mixtral-8x7B-v0.1": LLAMA2,
    "google/gemma-2-9b-it": Family(
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        specials=("<start_of_turn>", "<end_of_turn>"),
        add_bos=True,
        template="gemma.jinja",
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
