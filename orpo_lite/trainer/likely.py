"""How likely sample answers are to the models before and after training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from orpo_lite.objective.loss import log1mexp
from orpo_lite.objective.metrics import COLUMNS
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.trainer.model_setup import base_of

if TYPE_CHECKING:
    from datasets import Dataset

    from orpo_lite.trainer.trainer import ORPOTrainer


def score_answers(
    trainer: ORPOTrainer, pairs: Dataset, samples: list[dict[str, Any]], before: list[dict[str, Any]]
) -> None:
    """Write into each sample its tokens, and its mean log-prob and log-odds under the model as it stands.

    Args:
        pairs: the tokenised pairs whose first prompts were answered.
        samples: the model's own answers, with their `ids`: tokens, logp, log_odds.
        before: answers of the model before training to the same prompts: logp_trained, log_odds_trained. Those without
            ids, of an older version's run, are left as they are.
    """
    old: list[dict[str, Any]] = (
        before if len(before) == len(samples) and all("ids" in one for one in before) else samples
    )
    rows: Any = pairs.with_format(None).select(range(len(samples)))
    scored = []
    size = max(1, trainer.args.per_device_eval_batch_size)
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        for start in range(0, len(samples), size):
            part = [
                answered(rows[i], samples[i]["ids"], old[i]["ids"])
                for i in range(start, min(start + size, len(samples)))
            ]
            scored.append(trainer.prediction_step(trainer.model, trainer.collator(part), False)[1])
    finally:
        trainer.model.train(was_training)
        plain_attention(base_of(trainer.unwrapped()))
    if not scored:
        return
    columns = torch.cat(scored).double().cpu()
    chosen, rejected = (columns[:, COLUMNS.index(name)] for name in ("logps/chosen", "logps/rejected"))
    for sample, p, odds in zip(samples, chosen.tolist(), log_odds(chosen).tolist(), strict=True):
        sample |= {"tokens": len(sample["ids"]), "logp": p, "log_odds": odds}
    if old is not samples:
        for sample, p, odds in zip(old, rejected.tolist(), log_odds(rejected).tolist(), strict=True):
            sample |= {"logp_trained": p, "log_odds_trained": odds}


def answered(row: dict[str, Any], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    """A tokenised pair's prompt with other answers."""
    if "prompt_ids" in row:
        return row | {"chosen_ids": chosen, "rejected_ids": rejected}
    prompt = list(row["chosen_ids"][: row["chosen_start"]])
    start = len(prompt)
    return row | {
        "chosen_ids": prompt + chosen,
        "chosen_start": start,
        "rejected_ids": prompt + rejected,
        "rejected_start": start,
    }


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of mean log-probs, the paper's odds of an answer."""
    return logps - log1mexp(logps)
