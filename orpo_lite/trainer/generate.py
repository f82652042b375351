"""Answers of the model in training: sampled for any prompts or those of tokenized pairs, and scored."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.data.lengths import answer_tokens
from orpo_lite.model import stop_token_ids
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.loss import log1mexp

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.generation.streamers import BaseStreamer

    from orpo_lite.trainer.trainer import ORPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; a checkpoint's own are ignored."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that together have this probability."""

    def __post_init__(self) -> None:
        if self.top_p < 1 and not self.temperature:
            raise RequestError("--top-p has an effect only on sampling: set --temperature too, such as 0.7")

    def options(self) -> dict[str, Any]:
        """Return the options of transformers' generate."""
        chosen: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
        if self.temperature:
            chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0} | chosen


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: list[int],
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Generate the new tokens after each prompt, up to and including the one that ends an answer.

    Args:
        prompts: token ids.
        stops: tokens that end an answer, from `stop_token_ids`.
        streamer: receives each token; for one prompt only.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    was_training = model.training
    model.eval()
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            eos_token_id=stops or None,
            streamer=streamer,
            use_cache=True,
            **sampling.options(),
        )
    finally:
        model.train(was_training)
    answers = []
    for ids in out[:, width:].tolist():  # what follows the end of an answer in a batch is padding
        end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
        answers.append(ids[:end])
    return answers


def answer(
    model: Any, tokenizer: Any, pairs: Dataset, count: int, max_new_tokens: int, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Answer the first `count` held-out prompts greedily: [{"prompt": ..., "answer": ..., "ids": new tokens}, ...]."""
    rows: Any = pairs.with_format(None).select(range(min(count, len(pairs))))
    prompts = [row["chosen_ids"][: row["chosen_start"]] for row in rows]
    stops = stop_token_ids(tokenizer, model.generation_config)
    answers: list[dict[str, Any]] = []
    with progress("answering held-out prompts", len(prompts)) as advance:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            for prompt, ids in zip(
                part, generate(model, tokenizer, part, Sampling(max_new_tokens), stops), strict=True
            ):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers.append({"prompt": tokenizer.decode(prompt), "answer": text, "ids": ids})
            advance(len(part))
    return answers


def log_answers(trainer: Any, pairs: Dataset) -> list[dict[str, str]]:
    """Answer a batch of held-out prompts, as TRL's generate_during_eval, to the log and to W&B, by TRL's names."""
    args, step = trainer.args, trainer.state.global_step
    count = min(args.eval_batch_size, len(pairs))
    rows = pairs.select(random.Random(step).sample(range(len(pairs)), count))
    model = trainer.unwrapped()
    with trainer.compute_loss_context_manager():
        answers = answer(model, trainer.tokenizer, rows, count, args.max_completion_length or 128)
    if not trainer.is_world_process_zero():
        return answers
    for sample in answers:
        logger.info("step %d: %s -> %s", step, sample["prompt"][-200:], sample["answer"])
    if "wandb" in args.report_to:
        import wandb  # pyright: ignore[reportMissingImports]

        table = wandb.Table(["Prompt", "Policy"], [[sample["prompt"], sample["answer"]] for sample in answers])
        wandb.log({"game_log": table, "train/global_step": step})
    return answers


def score_answers(
    trainer: ORPOTrainer, pairs: Dataset, samples: list[dict[str, Any]], before: list[dict[str, Any]]
) -> None:
    """Add to each sample its number of tokens, and its mean log-prob and log-odds under the present model.

    Args:
        pairs: the tokenized pairs whose first prompts were answered.
        samples: the model's own answers, with their `ids`: tokens, logp, log_odds.
        before: answers of the untrained model to the same prompts, which get logp_trained and log_odds_trained. Those
            without ids, of an older version's run, stay as they are.
    """
    old = before if len(before) == len(samples) and all("ids" in one for one in before) else samples
    rows: Any = pairs.with_format(None).select(range(len(samples)))
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with progress("scoring the answers", len(samples)) as advance:
            for row, sample, other in zip(rows, samples, old, strict=True):
                prompt = list(row["chosen_ids"][: row["chosen_start"]])
                answers = {"chosen_ids": prompt + sample["ids"], "rejected_ids": prompt + other["ids"]}
                starts = dict.fromkeys(("chosen_start", "rejected_start"), len(prompt))
                logps = mean_logps(trainer.model, answers | starts, trainer.args.device)
                odds = logps - log1mexp(logps)
                sample |= {"tokens": len(sample["ids"]), "logp": logps[0].item(), "log_odds": odds[0].item()}
                if other is not sample:
                    other |= {"logp_trained": logps[1].item(), "log_odds_trained": odds[1].item()}
                advance(1)
    finally:
        trainer.model.train(was_training)


@torch.no_grad()
def mean_logps(model: Any, pair: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Compute the mean log-prob per completion token of a tokenized pair's two sides, (2,) float64, by the model's own logits."""
    found, inner = [], unwrap(extract_model_from_parallel(model))
    for side in ("chosen", "rejected"):
        ids = torch.tensor([pair[f"{side}_ids"]], device=device)
        places = torch.tensor(list(answer_tokens(pair, side, first=1)), device=device)
        keep = ids.shape[1] + 1 - int(places[0])
        only = {"logits_to_keep": keep} if inner._supports_logits_to_keep() else {}
        logits = model(input_ids=ids, use_cache=False, **only).logits[0, -keep:][places - places[0]]
        found.append(logits.float().log_softmax(-1).gather(1, ids[0, places, None]).double().mean().cpu())
    return torch.stack(found)
