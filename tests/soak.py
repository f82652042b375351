"""A long run of a tiny model: does anything grow with the steps? Memory, open files and threads, with everything going on
that a run does: logs every 10 steps, checkpoints every 50 (two kept), evaluations every 100.

    python -m tests.soak --steps 2000
    python -m tests.soak --steps 2000 --kind budget     # orpo.tokens_per_batch
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainerCallback

from orpo_lite import ORPOTrainer
from orpo_lite.trainer.callbacks import MetricsFile
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, SIZES, config, rows

KINDS = ("pairs", "budget")


@dataclass
class Sample:
    """What the process holds after a step."""

    step: int
    resident_mb: float
    private_mb: float
    files: int
    threads: int
    children: int

    @classmethod
    def take(cls, step: int) -> Sample:
        status = dict(re.findall(r"(\w+):\s+(\d+)", Path("/proc/self/status").read_text()))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return cls(step, int(status["VmRSS"]) / 1024, int(status["RssAnon"]) / 1024, len(os.listdir("/proc/self/fd")),
                   int(status["Threads"]), len(children))  # fmt: skip


class Soak(TrainerCallback):
    """Samples every so many steps."""

    def __init__(self, every: int):
        self.every, self.samples = every, []

    def on_step_begin(self, args, state, control, **kwargs):  # after what the step before has saved and evaluated
        if state.global_step and state.global_step % self.every == 0:
            self.samples.append(Sample.take(state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.samples.append(Sample.take(state.global_step))


def soak(folder: Path, steps: int, kind: str = "pairs", every: int | None = None) -> list[Sample]:
    """Train so many steps, and sample at each tenth of them."""
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(LlamaConfig(**SIZES)), LoraConfig(r=4, target_modules="all-linear"))
    options = {"tokens_per_batch": 150} if kind == "budget" else {}
    args = config(
        folder, max_steps=steps, logging_steps=10, save_strategy="steps", save_steps=50, save_total_limit=2,
        eval_strategy="steps", eval_steps=100, gradient_checkpointing=False, use_cpu=True, **options,
    )  # fmt: skip
    trainer = ORPOTrainer(model, args, None, rows(300), rows(8, seed=9), tokenizer)
    watch = Soak(every or max(1, steps // 10))
    trainer.add_callback(watch)
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl", resumed=False))
    trainer.train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(10, steps + 1, 10))
    assert len(list((folder / "out").glob("checkpoint-*"))) == 2
    return watch.samples


def growth(samples: list[Sample]) -> dict[str, float]:
    """From the second sample, when all is warm, to the last in training: MB of memory, files, threads, children."""
    first, last = samples[1], samples[-2]
    return {
        "resident_mb": last.resident_mb - first.resident_mb,
        "private_mb": last.private_mb - first.private_mb,
        "files": last.files - first.files,
        "threads": last.threads - first.threads,
        "children": last.children - first.children,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kind", choices=KINDS, default="pairs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(Path(folder), given.steps, given.kind)
    print(f"{'step':>6} {'RSS MB':>8} {'private':>8} {'files':>6} {'threads':>8} {'children':>9}")
    for s in samples:
        print(f"{s.step:>6} {s.resident_mb:>8.1f} {s.private_mb:>8.1f} {s.files:>6} {s.threads:>8} {s.children:>9}")
    print("growth:", ", ".join(f"{name} {value:+.1f}" for name, value in growth(samples).items()))


if __name__ == "__main__":
    main()
