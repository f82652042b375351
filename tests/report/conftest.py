"""Run folders written by hand, so that no test here trains."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """name: {name}
description: a made-up run
model: {{name_or_path: org/base-7B, quantization: nf4}}
adapter: {{r: 16, alpha: 32.0}}
data: {{train: [{{path: org/pairs}}]}}
orpo: {{beta: {beta}}}
training: {{learning_rate: {rate}, output_dir: {output}}}
"""


def log_lines(steps: int, every: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        share = step / steps
        noise = draw.uniform(-0.02, 0.02)
        lines.append({"step": step, "loss": 1.5 - share + noise, "nll_loss": 1.4 - 0.9 * share, "log_odds_ratio": -0.7 + 0.5 * share,
                      "rewards/chosen": -0.1 + 0.02 * share, "rewards/rejected": -0.1 - 0.2 * share, "rewards/margins": 0.22 * share,
                      "rewards/accuracies": 0.5 + 0.45 * share, "log_odds_chosen": 2 * share, "learning_rate": 1e-4 * (1 - share),
                      "grad_norm": 0.5 + noise, "tokens_per_second": 1000 + 1000 * noise, "peak_memory_gb": 9.5})  # fmt: skip
    return lines


def evaluation(accuracy: float, margin: float, **more: Any) -> dict[str, Any]:
    return {"loss": 1.2, "rewards/chosen": -0.1, "rewards/rejected": -0.1 - margin, "rewards/accuracies": accuracy,
            "rewards/margins": margin, "log_odds_chosen": 10 * margin, "nll_loss": 1.1, "log_odds_ratio": -0.6,
            "rewards/accuracies_interval": [accuracy - 0.05, min(1.0, accuracy + 0.05)], "length_baseline": 0.55, "pairs": 40} | more  # fmt: skip


def facts(**more: Any) -> dict[str, Any]:
    def sample(answer: str, **likely: float) -> dict[str, Any]:
        return {"prompt": "<|im_start|>user\nWhat is 2 + 2?", "answer": answer, "tokens": 5} | likely

    return {
        "name": "mine", "versions": {"orpo-lite": "0.1.0", "torch": "2.13.0", "bitsandbytes": None}, "device": "Some GPU", "processes": 1,
        "seed": 42, "base_model": {"name_or_path": "org/base-7B", "commit": None, "revision": "main", "quantization": "nf4", "facts": []},
        "data": {"fingerprint": "f00d", "train_pairs": 28, "eval_pairs": 40,
                 "sources": {"org/pairs": {"section": "train", "path": "org/pairs", "shape": "strings", "rows": 90, "kept": 68}},
                 "drops": {"rows": 90, "kept": 68, "dropped": {"empty prompt": 15, "prompts differ": 7}, "truncated": {"prompt": 3, "completion": 0},
                           "notes": ["a note"]}},
        "layout": {"name": "shared", "why": "checked"}, "parameters": {"trainable": 1000, "total": 70000}, "effective_batch": 8, "steps": 30,
        "train_seconds": 4000.0, "total_seconds": 5000.0, "pairs_per_second": 1.5, "peak_memory_bytes": 9_500_000_000, "plan": None,
        "out_of_memory": {"training": [], "evaluation": []}, "warnings": [{"kind": "loss spike", "step": 7, "message": "it rose"}],
        "overflow_steps": 0, "adapter": "last, step 30",
        "eval": {"before": evaluation(0.5, 0.0), "after": evaluation(0.9, 0.2)},
        "samples": {"before": [sample("Five.", logp=-0.7, log_odds=0.014, logp_trained=-2.0, log_odds_trained=-1.85)],
                    "after": [sample("Four.", logp=-0.25, log_odds=1.26)]},
        "rule": {"before": None, "after": None},
    } | more  # fmt: skip


def pairs(seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    one = lambda shift: {"logps/chosen": [-1 + draw.gauss(shift, 0.3) for _ in range(40)], "logps/rejected": [-1 + draw.gauss(-shift, 0.3) for _ in range(40)]}  # noqa: E731 # fmt: skip
    return {"beta": 0.1, "before": one(0.0), "after": one(0.6)}


Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def written() -> Writer:
    """Write a run folder of given parts; None leaves one out."""

    def write(
        folder: Path,
        run: Any = ...,
        lines: list | None = None,
        held: Any = ...,
        beta: float = 0.1,
        rate: float = 1e-4,
        **more: Any,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        name = more.get("name", "mine")
        (folder / "recipe.yaml").write_text(RECIPE.format(name=name, beta=beta, rate=rate, output=folder), "utf-8")
        content = facts(**more) if run is ... else run
        if content is not None:
            (folder / "run.json").write_text(json.dumps(content), "utf-8")
        if held is not None:
            (folder / "held_out.json").write_text(json.dumps(pairs() if held is ... else held), "utf-8")
        lines = log_lines(30) + [{"step": s, "eval_loss": 1.3 - s / 100, "eval_rewards/accuracies": 0.5 + s / 80, "eval_rewards/margins": s / 150}
                                 for s in (0, 15, 30)] if lines is None else lines  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return folder

    return write


NAN = math.nan
