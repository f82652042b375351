"""What tests of the trainer share: pairs of uneven length, arguments, gradients."""

import torch
from datasets import Dataset
from transformers import TrainerCallback

from orpo_lite import ORPOConfig

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)
"""Of a model that trains in milliseconds."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    words = "sun moon river stone cloud bread lamp chair window garden".split()

    def text(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(words[int(i)] for i in torch.randint(len(words), (n,), generator=g))

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{i} {text(2, 15)}"}],
                "chosen": [{"role": "assistant", "content": text(3, 12)}],
                "rejected": [{"role": "assistant", "content": text(1, 20) + " no"}],
            }
            for i in range(count)
        ]
    )


def config(tmp_path, **kw):
    kw = {"per_device_train_batch_size": 4, "report_to": "none", "max_length": 128, "learning_rate": 1e-3, "disable_tqdm": True,
          "train_sampling_strategy": "sequential", "save_strategy": "no", "logging_steps": 1} | kw  # fmt: skip
    return ORPOConfig(output_dir=str(tmp_path / "out"), **kw)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


class Catch(TrainerCallback):
    """Gradients just before the first optimizer step."""

    gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()
