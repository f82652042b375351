"""Answers of the model as it stands: to any prompts, and to those of tokenised pairs."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from orpo_lite.model import stop_token_ids
from orpo_lite.trainer.trackers import log_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; a checkpoint's own settings have no say."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn from."""

    def options(self) -> dict[str, Any]:
        """Options of transformers' generate."""
        drawn = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": 0 if drawn else None,
        }


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    stops: list[int] | None,
    streamer: BaseStreamer | None = None,
    stopping: StoppingCriteria | None = None,
) -> list[list[int]]:
    """New tokens after each prompt, the one that ends an answer included and nothing after it.

    Args:
        prompts: token ids; for encoder-decoders the encoder's.
        stops: tokens that end an answer, from `stop_tokens`.
        streamer: told each token; for one prompt.
        stopping: asked after each token.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    was_training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            eos_token_id=stops,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stopping] if stopping is not None else []),
            **sampling.options(),
        )
    finally:
        model.train(was_training)
        model.config.use_cache = use_cache
    new = out[:, 1:] if model.config.is_encoder_decoder else out[:, width:]
    return [up_to_stop(row, stops or []) for row in new.tolist()]


def up_to_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Ids up to and with the first that ends an answer; what follows in a batch is padding."""
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))]


def answer(
    model: Any, tokenizer: Any, pairs: Dataset, count: int, max_new_tokens: int, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Greedy answers to the first `count` held-out prompts: [{"prompt": ..., "answer": ..., "ids": new tokens}, ...]."""
    rows: Any = pairs.with_format(None).select(range(min(count, len(pairs))))
    prompts = [row.get("prompt_ids") or row["chosen_ids"][: row["chosen_start"]] for row in rows]
    stops = stop_tokens(model, tokenizer)
    answers: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        new = generate(model, tokenizer, part, Sampling(max_new_tokens), stops)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [
            {"prompt": tokenizer.decode(p), "answer": t.strip(), "ids": ids}
            for p, t, ids in zip(part, texts, new, strict=True)
        ]
    return answers


def stop_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Where an answer ends: EOS, the template's end of turn, and whatever the model's generation config names."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = {*stop_token_ids(tokenizer), *(given if isinstance(given, list) else [given])} - {None}
    return sorted(ids) or None


def log_answers(trainer: Any, pairs: Dataset) -> list[dict[str, str]]:
    """Greedy answers to a batch of held-out prompts, as TRL's generate_during_eval: to the log and to trackers, by TRL's names."""
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
    log_table(trainer, "game_log", ["Prompt", "Policy"], [[sample["prompt"], sample["answer"]] for sample in answers])
    return answers
