"""Answers of the model as it stands to the prompts of tokenised pairs."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import torch

from orpo_lite.model import stop_token_ids

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def answer(
    model: Any, tokenizer: Any, pairs: Dataset, count: int, max_new_tokens: int, batch_size: int = 8
) -> list[dict[str, str]]:
    """Greedy answers to the first `count` held-out prompts: [{"prompt": ..., "answer": ...}, ...]."""
    rows: Any = pairs.with_format(None).select(range(min(count, len(pairs))))
    prompts = [row.get("prompt_ids") or row["chosen_ids"][: row["chosen_start"]] for row in rows]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    answers: list[dict[str, str]] = []
    was_training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in part], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                    eos_token_id=stop_tokens(model, tokenizer),
                    # a checkpoint's own sampling settings mean nothing to a greedy answer
                    temperature=None,
                    top_p=None,
                    top_k=None,
                )
            new = out if model.config.is_encoder_decoder else out[:, width:]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            answers += [{"prompt": tokenizer.decode(p), "answer": t.strip()} for p, t in zip(part, texts, strict=True)]
    finally:
        model.train(was_training)
        model.config.use_cache = use_cache
    return answers


def stop_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Where an answer ends: EOS, the template's end of turn, and whatever the model's generation config names."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = {*stop_token_ids(tokenizer), *(given if isinstance(given, list) else [given])} - {None}
    return sorted(ids) or None


def log_answers(trainer: Any, pairs: Dataset) -> list[dict[str, str]]:
    """Greedy answers to a batch of held-out prompts, as TRL's generate_during_eval: to the log and to wandb."""
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
        wandb.log({"game_log": table})
    return answers
