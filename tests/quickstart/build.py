"""Rebuild the embedded quickstart from a seed: tokenizer, base model, preference pairs.

    python -m tests.quickstart.build [--output DIR] [--seed 0]

The base learns from generated text only (corpus.py), in which either style answers about half of the questions. The
data files are the same bytes on every machine; the weights are the same on one machine and thread count (float32 sums
differ elsewhere, which moves no figure that matters).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_lite.common.console import console, run_command
from orpo_lite.recipe import Recipe
from tests.quickstart.corpus import CLOSERS, OPENERS, conversations, preference_rows

SIZES = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
VOCABULARY = 2048  # at most: merging stops when every word of the text is one token
STEPS, BATCH, LEARNING_RATE, WARMUP = 1000, 16, 4e-3, 50
BUCKET = 8  # batches sorted by length together, so that little is padding

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_tokenizer(seed: int) -> Any:
    """Byte-level BPE from 8,000 generated conversations, with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    text = (f"{m['role']}\n{m['content']}" for chat in itertools.islice(conversations(seed), 8000) for m in chat)
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=SIZES["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def batches(tokenizer: Any, seed: int) -> Iterator[Any]:
    """Right-padded batches of whole conversations, similar lengths together, without end."""
    rng, text = random.Random(f"batches {seed}"), conversations(seed)
    while True:
        chats = tokenizer.apply_chat_template(list(itertools.islice(text, BUCKET * BATCH)), tokenize=False)
        rows = sorted(tokenizer(chats).input_ids, key=len)
        bucket = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(bucket)
        for batch in bucket:
            yield tokenizer.pad({"input_ids": batch}, return_tensors="pt")


def pretrain(tokenizer: Any, seed: int) -> Any:
    """Train the base from scratch on the tokens of every turn; float32, one thread (two get in each other's way)."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, dtype="float32", **SIZES, **special)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    start, smooth = time.monotonic(), math.nan
    for step, batch in zip(range(STEPS), batches(tokenizer, seed), strict=False):
        rate = min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            console.print(f"step {step + 1}/{STEPS}  loss {smooth:.3f}  {time.monotonic() - start:.0f} s")
    return model.eval()


def check(splits: dict[str, list[dict[str, Any]]], tokenizer: Any) -> None:
    """What the demonstration rests on; an AssertionError here is a mistake in corpus.py or in the recipe's rule."""
    rule = Recipe.load("quickstart").evaluation.rule
    assert rule is not None, "recipes/quickstart.yaml has no evaluation.rule"
    courteous, curt = (re.compile(pattern, re.IGNORECASE) for pattern in (rule.chosen, rule.rejected))
    for polite, rude in OPENERS + [(f" {a}", f" {b}") for a, b in CLOSERS]:
        assert courteous.search(polite) and not curt.search(polite), polite
        assert curt.search(rude) and not courteous.search(rude), rude
        assert len(tokenizer(polite).input_ids) == len(tokenizer(rude).input_ids), (polite, rude)
    for row in splits["train"] + splits["heldout"]:
        for turn in row["prompt"]:
            assert not courteous.search(turn["content"]) and not curt.search(turn["content"]), turn
    asked = {split: {json.dumps(row["prompt"]) for row in rows} for split, rows in splits.items()}
    assert not asked["train"] & asked["heldout"]


def command(
    output: Annotated[Path, typer.Option(help="folder for model/, train.jsonl and heldout.jsonl")] = Path(
        "outputs/quickstart-base"
    ),
    seed: Annotated[int, typer.Option(help="another seed gives another model and other pairs")] = 0,
) -> None:
    """Rebuild the quickstart's base model and preference pairs from a seed."""
    tokenizer, splits = build_tokenizer(seed), preference_rows(seed)
    check(splits, tokenizer)
    model = pretrain(tokenizer, seed)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text("".join(lines), "utf-8", newline="\n")
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens; written to {output}")


if __name__ == "__main__":
    run_command(command)
