"""Run by test_distributed under torchrun: evaluate, train, and print what each process ends with."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, config, rows

from orpo_lite import ORPOTrainer  # isort: skip
from peft import LoraConfig, get_peft_model  # isort: skip

tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
model = tiny_model(LlamaConfig(**sizes))
torch.manual_seed(1)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
processes = int(os.environ.get("WORLD_SIZE", 1))
options = {"tokens_per_batch": 200} if sys.argv[2] == "budget" else {}
args = config(Path(sys.argv[1]), per_device_train_batch_size=8 // processes, max_steps=3, use_cpu=True, **options)
trainer = ORPOTrainer(model, args, None, rows(24), rows(7, seed=9), tokenizer)
before = trainer.evaluate()
trainer.train()
logged = [
    [log["loss"], log["grad_norm"], log["rewards/margins"]] for log in trainer.state.log_history if "grad_norm" in log
]
weights = sum(p.double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad)
outcome = {
    "before": before["eval_loss"],
    "logged": logged,
    "after": trainer.evaluate()["eval_loss"],
    "weights": weights,
}
Path(sys.argv[1], f"rank{args.process_index}.json").write_text(json.dumps(outcome))
