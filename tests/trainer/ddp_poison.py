"""Run by test_nonfinite_processes under torchrun: a step that is not finite on one of two processes."""

import json
import os
import sys
from pathlib import Path

import torch

from orpo_lite.trainer.health import NonFinite
from tests.tiny import tiny_tokenizer
from tests.trainer.poison import build, poison_gradient, poison_token, state_of
from tests.training import CHATML

folder, spoil = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
trainer, keep = build(folder, tokenizer, use_cpu=True, gradient_accumulation_steps=2)
if spoil == "loss":
    poison_token(trainer, float("nan"))
elif rank == 1:
    poison_gradient(trainer, 3, float("inf"))
said = ""
try:
    trainer.train()
except NonFinite as error:
    said = str(error)
Path(folder, f"rank{rank}.json").write_text(
    json.dumps(
        {
            "said": said,
            "step": trainer.state.global_step,
            "kept": keep.states[1] == state_of(trainer),
            "adapter": [p.double().sum().item() for p in trainer.model.parameters() if p.requires_grad],
            "finite": all(torch.isfinite(p).all().item() for p in trainer.model.parameters() if p.requires_grad),
        }
    )
)
