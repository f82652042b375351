"""What a run knows of its memory before it starts, and after it is done: the plan beside the card that is there."""

from __future__ import annotations

import hashlib
import logging
import subprocess

import torch

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.plan.cache import cached_plan, folder, key, load, store
from orpo_lite.plan.gpus import FITS, NOT, Card, verdict
from orpo_lite.plan.kernels import Target
from orpo_lite.plan.lengths import Lengths
from orpo_lite.plan.predict import CONTEXT_BYTES, Plan
from orpo_lite.plan.remedies import changed, find_remedy
from orpo_lite.plan.search import fit
from orpo_lite.recipe import Recipe

logger = logging.getLogger(__name__)

OTHERS = 300_000_000
"""Bytes that others hold on a card before it is worth a word: less is the error in our own context's size."""


def fitted(recipe: Recipe, lengths: Lengths, device: torch.device) -> Recipe:
    """A recipe that names its card by memory.gpu_gb, with the fastest settings that fit it; others as they are.

    Raises:
        RequestError: nothing that was tried fits.
    """
    size = recipe.memory.gpu_gb
    if not size:
        return recipe
    if device.type != "cuda":
        console.print("memory.gpu_gb: there is no GPU here to fit the recipe to: trained as it stands", soft_wrap=True)
        return recipe
    card = Card(f"memory.gpu_gb={size:g}", size, torch.cuda.get_device_capability(device))
    # a fit tries other micro-batches and limits than the recipe's, so that every length counts
    digest = hashlib.sha256(
        lengths.train.tobytes() + lengths.held_out.tobytes() + recipe.data.model_dump_json().encode()
    )
    path = folder() / f"fit-{key(recipe, card.target, lengths)}-{digest.hexdigest()[:20]}.json"
    words = load(path)
    if words is None:
        words = fit(recipe, card, lengths.shape, shorten=False).choice.words
        store(path, words)
    console.print(f"memory.gpu_gb={size:g}: fitted with {' '.join(words)}", markup=False, soft_wrap=True)
    found = changed(recipe, list(words))
    assert found is not None  # plans were made of it
    return found


def before_loading(recipe: Recipe, lengths: Lengths, device: torch.device, force: bool, again: str) -> Plan | None:
    """Print the plan in a line, and refuse what cannot fit the card that is there.

    Args:
        lengths: of the run's pairs.
        force: go on with what cannot fit.
        again: the command-line that started the run, to which a remedy is added.

    Returns:
        The plan, or None where there cannot be one.

    Raises:
        RequestError: it does not fit; the message says by how much, what else is on the card, and what would make it.
    """
    card, others = card_here(device) if device.type == "cuda" else (None, 0)
    if card and recipe.memory.gpu_gb and recipe.memory.gpu_gb < card.gigabytes:
        card = Card(f"memory.gpu_gb={recipe.memory.gpu_gb:g}", recipe.memory.gpu_gb, card.capability)
    target = card.target if card else Target("cpu")
    try:
        made = cached_plan(recipe, target, lengths)
    except Exception as error:  # a model that the meta run cannot follow may train all the same
        line = (str(error) or type(error).__name__).splitlines()[0]
        console.print(f"memory: no plan, since {line}; training goes on without", markup=False, soft_wrap=True)
        return None
    where = f"tensors {gigabytes(made.peak)}, fullest in the {made.fullest} phase"
    if card is None:
        console.print(f"memory: planned {gigabytes(made.needed)} GB ({where}); {made.shape.why}", soft_wrap=True)
        return made
    words = verdict(made, card)
    console.print(
        f"memory: planned {gigabytes(made.needed)} GB of {card.gigabytes:.1f} GB ({where}), {words}; {made.shape.why}",
        soft_wrap=True,
    )
    warn_of_host(made)
    if words != NOT:
        return made
    problem = refusal(made, card, others)
    if force:
        logger.warning("%s; going on, since --force says so", problem)
        return made
    console.print("memory: looking for what would make it fit")
    raise RequestError(
        f"{problem}. {remedy(recipe, card, others, made, lengths, again)}; or start all the same with --force"
    )


def gigabytes(size: float) -> str:
    """Bytes as GB, 10^9, with as many places as say something."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"


def card_here(device: torch.device) -> tuple[Card, int]:
    """The card with the memory that this process can have of it, and the bytes that others hold."""
    free, total = torch.cuda.mem_get_info(device)
    # asking has made this process's own context, which a plan counts itself
    ours = CONTEXT_BYTES["cuda"] + torch.cuda.memory_reserved(device)
    others = max(0, total - free - ours)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Card(name, (total - others) / 1e9, capability), others


def refusal(made: Plan, card: Card, others: int) -> str:
    """That it does not fit, in numbers."""
    room = f"{card.gigabytes:.1f} GB"
    if others > OTHERS:
        total = card.gigabytes + others / 1e9
        room += f" left of {total:.1f} GB, since {others / 1e9:.1f} GB are held by {holders() or 'other programs'}"
    return (
        f"memory: {made.recipe} needs {made.needed / 1e9:.1f} GB, and {card.name} has {room}: it would run out in the "
        f"{made.fullest} phase ({made.shape.why})"
    )


def holders() -> str:
    """Programs on the cards, as nvidia-smi lists them; empty where it does not say."""
    command = ["nvidia-smi", "--query-compute-apps=process_name,pid,used_memory", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in lines[:5])


def remedy(recipe: Recipe, card: Card, others: int, made: Plan, lengths: Lengths, again: str) -> str:
    """What would make it fit, as a command-line."""
    whole = Card(card.name, card.gigabytes + others / 1e9, card.capability)
    freed = "It fits once those have ended. " if others > OTHERS and verdict(made, whole) == FITS else ""
    words, planned = find_remedy(recipe, card, lambda trial, target: cached_plan(trial, target, lengths))
    if planned is None:
        return f"{freed}Nothing that was tried makes it fit: take a larger card or a smaller model"
    return f"{freed}With {planned.needed / 1e9:.1f} GB it fits:\n  {again} {words}\n"


def warn_of_host(made: Plan) -> None:
    """The base passes through the host's memory on its way to the card."""
    import psutil

    there = psutil.virtual_memory().available
    if made.load_host > there:
        logger.warning(
            "loading takes about %.1f GB of the host's memory (assumed in part), and %.1f GB are free: close other programs",
            made.load_host / 1e9,
            there / 1e9,
        )
