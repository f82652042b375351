"""The plan that a run makes before it loads the model: for the lengths of its own pairs, and against the card in use."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from pydantic import TypeAdapter, ValidationError

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import format_gb
from orpo_lite.data import pair_lengths
from orpo_lite.plan.gpus import FITS, NOT, Card, card_here, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.meta_model import find_config
from orpo_lite.plan.predict import Plan, plan
from orpo_lite.plan.search import changed, find_remedy, fit
from orpo_lite.plan.step import Shape, batch_sizes, evaluation_pairs, micro_batch
from orpo_lite.recipe import DataSection, Recipe

if TYPE_CHECKING:
    from orpo_lite.data import Pairs

logger = logging.getLogger(__name__)

OTHERS = 300_000_000
"""Bytes held by other programs from which on they are mentioned: less may be an error in the size of our own context."""
NO_REMEDY = "Nothing that was tried makes it fit: use a larger card or a smaller model"
VERSIONS = ("orpo-lite", "torch", "transformers", "peft", "accelerate", "bitsandbytes")
"""Packages whose versions a cached plan depends on."""
PLANNED = ("optim", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
           "dataloader_drop_last")  # fmt: skip
"""Fields of the training section that plans depend on."""


# ---- before the model is loaded --------------------------------------------------------------------------------------


def fit_to_card(recipe: Recipe, pairs: Lengths, device: torch.device) -> Recipe:
    """Return the recipe with the fastest settings for the card that memory.gpu_gb names; others unchanged.

    Raises:
        RequestError: nothing that was tried fits.
    """
    size = recipe.memory.gpu_gb
    if not size:
        return recipe
    if device.type != "cuda":
        console.print("memory.gpu_gb: there is no GPU here; training with the recipe's own settings", soft_wrap=True)
        return recipe
    card = Card(f"memory.gpu_gb={size:g}", size, torch.cuda.get_device_capability(device))
    # other micro-batches and limits than the recipe's are tried, so every pair's length matters
    digest = hashlib.sha256(pairs.train.tobytes() + pairs.held_out.tobytes() + recipe.data.model_dump_json().encode())
    path = cache_folder() / f"fit-{cache_key(recipe, card.target, pairs)}-{digest.hexdigest()[:20]}.json"
    words = cached(path, OVERRIDES)
    if words is None:
        words = list(fit(recipe, card, pairs.shape, shorten=False).choice.words)
        store(path, OVERRIDES, words)
    console.print(f"memory.gpu_gb={size:g}: fitted with {' '.join(words)}", markup=False, soft_wrap=True)
    found = changed(recipe, words)
    assert found is not None  # it was planned
    return found


def plan_before_loading(recipe: Recipe, pairs: Lengths, device: torch.device, force: bool, command: str) -> Plan | None:
    """Print the plan in a line, and refuse a run that cannot fit the card in use.

    Args:
        pairs: lengths of the run's pairs.
        force: start even a run that cannot fit.
        command: the command line that started the run, to which a remedy is added.

    Returns:
        The plan, or None where the model cannot be planned.

    Raises:
        RequestError: it does not fit; the message says by how much, what else is on the card, and what would make it fit.
    """
    card, others = card_here(device) if device.type == "cuda" else (None, 0)
    if card and recipe.memory.gpu_gb and recipe.memory.gpu_gb < card.gigabytes:
        card = Card(f"memory.gpu_gb={recipe.memory.gpu_gb:g}", recipe.memory.gpu_gb, card.capability)
    try:
        made = cached_plan(recipe, card.target if card else Target("cpu"), pairs)
    except Exception as error:  # a model that the meta run cannot follow may still train
        line = (str(error) or type(error).__name__).splitlines()[0]
        console.print(f"memory: no plan, because {line}; training continues without", markup=False, soft_wrap=True)
        return None
    words = verdict(made, card) if card else ""
    console.print(
        f"memory: planned {format_gb(made.needed, 2)}{f' of {card.gigabytes:.1f} GB' if card else ''} (tensors "
        f"{format_gb(made.peak, 2)}, fullest in the {made.fullest} phase){words and ', ' + words}; {made.shape.why}",
        soft_wrap=True,
    )
    if card is None:
        return made
    warn_of_host_memory(made)
    if words != NOT:
        return made
    whole, room = card, f"{card.gigabytes:.1f} GB"
    if others > OTHERS:
        whole = Card(card.name, card.gigabytes + others / 1e9, card.capability)
        held = f"{format_gb(others)} are held by {holders() or 'other programs'}"
        room += f" left of {whole.gigabytes:.1f} GB, since {held}"
    problem = (
        f"memory: {made.recipe} needs {format_gb(made.needed)}, and {card.name} has {room}: it would run out in the "
        f"{made.fullest} phase ({made.shape.why})"
    )
    if force:
        logger.warning("%s; starting anyway because of --force", problem)
        return made
    console.print("memory: looking for settings that fit")
    freed = " It fits once those programs have ended." if whole is not card and verdict(made, whole) == FITS else ""
    words, planned = find_remedy(recipe, card, lambda trial, target: cached_plan(trial, target, pairs))
    remedy = f"With {format_gb(planned.needed)} it fits:\n  {command} {words}\n" if planned else NO_REMEDY
    raise RequestError(f"{problem}.{freed} {remedy}; or start anyway with --force")


def holders() -> str:
    """List the programs on the GPUs, by nvidia-smi; empty where it does not say."""
    command = ["nvidia-smi", "--query-compute-apps=process_name,pid,used_memory", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in lines[:5])


def warn_of_host_memory(made: Plan) -> None:
    """Warn where the host has less memory free than loading takes: the base passes through it on its way to the card."""
    free = psutil.virtual_memory().available
    if made.load_host > free:
        logger.warning(
            "loading takes about %s of the host's memory (partly an assumption), and %s are free: close other programs",
            format_gb(made.load_host),
            format_gb(free),
        )


# ---- the costliest micro-batch of the run's pairs --------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompt, chosen and rejected answer of each pair, (N, 3) int64."""

    train: np.ndarray
    held_out: np.ndarray
    encoder_decoder: bool = False

    @classmethod
    def of(cls, pairs: Pairs, encoder_decoder: bool) -> Lengths:
        """Read the lengths of tokenized pairs."""

        def columns(rows: object) -> np.ndarray:
            found = pair_lengths(rows)  # type: ignore[arg-type]
            return np.stack([found[name] for name in ("prompt", "chosen", "rejected")], 1)

        held_out = columns(pairs.eval) if pairs.eval is not None else np.empty((0, 3), dtype=np.int64)
        return cls(columns(pairs.train), held_out, encoder_decoder)

    def shape(self, recipe: Recipe, layout: str) -> Shape:
        """Return the costliest micro-batch of training and of evaluation; the recipe's limit where no pair would remain."""
        train = self._kept(self.train, recipe.data)
        if not len(train):
            return micro_batch(recipe, layout, self.encoder_decoder)
        (size, steps), budget = batch_sizes(recipe), recipe.orpo.tokens_per_batch
        pairs = costliest(train, layout, size * steps if budget else size, budget)
        held_out = costliest(self._kept(self.held_out, recipe.data), layout, evaluation_pairs(recipe), None)
        prompt, *answers = pairs[0]
        return Shape(
            pairs,
            f"{len(pairs)} of the data's costliest pairs (prompt {prompt:,}, answers {answers[0]:,} and {answers[1]:,} tokens); "
            + (f"orpo.tokens_per_batch of {budget:,}" if budget else "training.per_device_train_batch_size"),
            held_out,
        )

    def _kept(self, pairs: np.ndarray, data: DataSection) -> np.ndarray:
        """Apply the data section's limits, which may be tighter than when the pairs were tokenized."""
        limit = data.max_length
        if limit is None or self.encoder_decoder:
            return pairs
        if data.overlong == "drop":
            return pairs[pairs[:, 0] + pairs[:, 1:].max(1) <= limit]
        prompt = np.minimum(pairs[:, :1], limit - 1)
        return np.concatenate([prompt, np.minimum(pairs[:, 1:], limit - prompt)], 1)


def costliest(pairs: np.ndarray, layout: str, count: int, budget: int | None) -> tuple[tuple[int, ...], ...]:
    """Return the costliest of some pairs (N, 3), the first one first: at most `count`, within the budget of tokens."""
    prompt, chosen, rejected = pairs.T
    costs = {
        "padded": 2 * (prompt + np.maximum(chosen, rejected)),
        "packed": 2 * prompt + chosen + rejected,
        "shared": prompt + chosen + rejected,
    }[layout]
    order = np.argsort(-costs, kind="stable")
    taken, tokens = [], 0
    for i in order.tolist():
        if len(taken) == count:
            break
        # all are padded to the first, which is the longest
        cost = int(costs[order[0] if layout == "padded" else i])
        if budget is None or not taken or tokens + cost <= budget:
            taken.append(tuple(pairs[i].tolist()))
            tokens += cost
    return tuple(taken)


# ---- plans on disk, so that the next start of a run has its plan at once ---------------------------------------------

PLANS = TypeAdapter(Plan)
OVERRIDES = TypeAdapter(list[str])


def cached_plan(recipe: Recipe, target: Target, pairs: Lengths) -> Plan:
    """Plan a recipe for its pairs' own lengths, or read that plan from disk.

    Raises:
        RequestError: as `predict.plan`.
    """
    path = cache_folder() / f"{cache_key(recipe, target, pairs)}.json"
    made = cached(path, PLANS)
    if made is None:
        made = plan(recipe, target, shape=lambda layout: pairs.shape(recipe, layout))
        store(path, PLANS, made)
    return dataclasses.replace(made, recipe=recipe.name)


def cache_folder() -> Path:
    """Return $ORPO_LITE_CACHE/plans, else orpo_lite/plans in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("ORPO_LITE_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "orpo_lite"
    return root.expanduser() / "plans"


def cache_key(recipe: Recipe, target: Target, pairs: Lengths) -> str:
    """Hash everything that a plan depends on, and the versions that made it."""
    content = recipe.model_dump(mode="json", include={"model", "adapter", "orpo", "memory"})
    content["training"] = {name: recipe.training.get(name) for name in PLANNED}
    content["held out"] = evaluation_pairs(recipe)
    # the layout is only known once the model is built
    content["shapes"] = [vars(pairs.shape(recipe, layout)) for layout in ("padded", "packed", "shared")]
    content["config"] = find_config(recipe.model).to_dict()
    content["target"] = vars(target)
    content["versions"] = {name: installed(name) for name in VERSIONS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:40]


def installed(package: str) -> str | None:
    """Return a package's version."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def cached(path: Path, kind: TypeAdapter) -> Any:
    """Read what was stored under a path; None where there is nothing, or it is damaged."""
    try:
        return kind.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def store(path: Path, kind: TypeAdapter, content: Any) -> None:
    """Write to the cache; where it cannot be written, do without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, kind.dump_json(content))
