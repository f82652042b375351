"""How likely sample answers are, against the model's own logits."""

import math

import pytest
import torch

from orpo_lite import ORPOTrainer
from orpo_lite.trainer.generate import answer, score_answers
from tests.trainer.test_trainer import adapted
from tests.training import config, rows


def naive(model, prompt, ids):
    """Mean log-prob of the tokens after a prompt, one sequence at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = logits.float().log_softmax(-1)
    return logps[torch.arange(len(ids)), torch.tensor(ids)].mean().item()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_each_answer_by_the_models_own_logits(layout, tmp_path, tokenizer):
    args = config(tmp_path, layout=layout, per_device_eval_batch_size=2)
    trainer = ORPOTrainer(adapted("llama"), args, None, rows(5), rows(5), tokenizer)
    model, held = trainer.model, trainer.eval_dataset
    before = answer(model, tokenizer, held, 5, 6)
    score_answers(trainer, held, before, [])
    prompts = [list(row["chosen_ids"][: row["chosen_start"]]) for row in held]
    for sample, prompt in zip(before, prompts, strict=True):
        p = naive(model, prompt, sample["ids"])
        assert sample["logp"] == pytest.approx(p, abs=1e-5) and sample["tokens"] == len(sample["ids"]) > 0
        assert sample["log_odds"] == pytest.approx(p - math.log1p(-math.exp(p)), rel=1e-4)
    old = [sample["logp"] for sample in before]
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    after = answer(model, tokenizer, held, 5, 6)
    score_answers(trainer, held, after, before)
    for first, last, prompt, once in zip(before, after, prompts, old, strict=True):
        assert last["logp"] == pytest.approx(naive(model, prompt, last["ids"]), abs=1e-5)
        assert first["logp_trained"] == pytest.approx(naive(model, prompt, first["ids"]), abs=1e-5)
        assert first["logp"] == once  # what the model before made of it stays


def test_answers_of_an_older_run_are_left_as_they_are(tmp_path, tokenizer):
    trainer = ORPOTrainer(adapted("llama"), config(tmp_path), None, rows(2), rows(2), tokenizer)
    old = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    after = answer(trainer.model, tokenizer, trainer.eval_dataset, 2, 3)
    score_answers(trainer, trainer.eval_dataset, after, old)
    assert "logp" in after[0] and old[0] == {"prompt": "a", "answer": "b"}
    score_answers(trainer, trainer.eval_dataset, [], [])  # evaluation.samples=0
