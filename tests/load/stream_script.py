"""Run by test_stream_trainer, alone and under torchrun: train on a stream, and write which rows each process computed."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

from tests.load.test_stream_trainer import Plain, with_bad
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, SIZES, config

from orpo_lite import ORPOTrainer  # isort: skip
from peft import LoraConfig, get_peft_model  # isort: skip

folder, workers, budget = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
model = tiny_model(LlamaConfig(**SIZES))
torch.manual_seed(1)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
processes = int(os.environ.get("WORLD_SIZE", 1))
args = config(folder, per_device_train_batch_size=8 // processes, max_steps=5, use_cpu=True, logging_steps=1,
              dataloader_num_workers=workers, tokens_per_batch=budget or None)  # fmt: skip
steps = []


class Watched(ORPOTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        steps.append([row for batch in inputs["micro_batches"] for row in batch["pair_rows"].tolist()])
        return super().training_step(model, inputs, num_items_in_batch)


trainer = Watched(model, args, None, Plain(with_bad(26)), None, tokenizer)
trainer.train()
weights = sum(p.double().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad)
losses = [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]
outcome = {"steps": steps, "losses": losses, "weights": weights, "drops": trainer.drop_reports["train"].dropped}
(folder / f"rank{args.process_index}.json").write_text(json.dumps(outcome))
