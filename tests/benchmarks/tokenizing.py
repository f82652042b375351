"""Seconds for tokenizing preference rows, here and by TRL's ORPOTrainer, in turn: python -m tests.benchmarks.tokenizing."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from tokenizers import AddedToken
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.model import load_base, load_tokenizer
from orpo_lite.model.tokenizer import MARKER
from orpo_lite.recipe import Recipe
from tests.tiny import template_text

WIDE = re.compile("<｜[^｜<>]+｜>")  # noqa: RUF001
"""Control tokens of DeepSeek."""
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "train.jsonl"


def main() -> None:
    """Compare both on real rows, a recipe's rules here and TRL's defaults there, with templates of several lengths."""
    recipe = Recipe.load("quickstart", ["model.quantization=none"])
    tokenizer: Any = load_tokenizer(recipe.model)
    model = load_base(recipe.model, tokenizer)[0]
    rows = datasets.Dataset.from_json(str(DATA))
    datasets.disable_caching()
    args = TRLConfig(output_dir="/tmp/tokenizing", report_to=[], max_length=1024, bf16=False, use_cpu=True)
    for name in sys.argv[1:] or ["qwen2_5", "llama3_1", "qwen3", "deepseek_r1_distill"]:
        tokenizer.chat_template = template_text(f"{name}.jinja")
        tokenizer.add_tokens(
            [
                AddedToken(one, special=True)
                for one in {*MARKER.findall(tokenizer.chat_template), *WIDE.findall(tokenizer.chat_template)}
            ]
        )
        seconds: dict[str, list[float]] = {"here": [], "TRL": []}
        for _ in range(3):
            for side in seconds:
                started = time.perf_counter()
                if side == "TRL":
                    with mock.patch("transformers.Trainer.__init__", side_effect=InterruptedError):
                        try:
                            TRLTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
                        except InterruptedError:
                            pass
                else:
                    tokenize_rows(rows, tokenizer, TokenizeOptions(strict=True, completion_end="turn", overlong="drop"))
                seconds[side].append(time.perf_counter() - started)
        here, trl = (min(values) for values in seconds.values())
        print(f"{name}: {len(rows)} rows, here {here:.2f} s, TRL {trl:.2f} s: {trl / here:.1f}x", flush=True)


if __name__ == "__main__":
    main()
