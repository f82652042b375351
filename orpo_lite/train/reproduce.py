"""`python -m orpo_lite.train --reproduce FILE`: the forward and backward pass of a step that was not finite, again."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from rich.markup import escape
from safetensors.torch import load_file, save_file

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import apply_override
from orpo_lite.trainer.nonfinite_report import LARGE_WEIGHT, not_finite, trained
from orpo_lite.trainer.reproducer import Reproducer

FINITE, SAME, OTHER = 0, 1, 3
"""Exit status: every number is finite now; not finite, as recorded; not finite, with other numbers."""
NUMERIC = ("seed", "tf32", "use_cpu", "full_determinism")
"""Training fields that bear on a step's numbers. The file may be a stranger's: nothing else of them is taken."""


def reproduce(path: Path, overrides: list[str]) -> int:
    """Do a saved step again, say what came of it, and write nothing.

    Args:
        path: a run's reproduce-step-N.zip.
        overrides: key=value words for its recipe, such as model.dtype=float32.

    Returns:
        The exit status: 0 where all is finite, 1 where it is not, as recorded, 3 where it is not in another way.

    Raises:
        RequestError: the file is damaged or foreign, or its recipe cannot be followed here.
    """
    saved = Reproducer.read(path)
    try:
        return replay(saved, stepwise_recipe(saved, path, overrides))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"--reproduce: {path}: something is missing or of another kind than a run writes ({type(error).__name__}: {error}): "
            "copy it again from the run folder, and use the version of orpo_lite that it names in step.json"
        ) from error
    finally:
        saved.aside.cleanup()


def stepwise_recipe(saved: Reproducer, path: Path, overrides: list[str]) -> Recipe:
    """The file's recipe with the saved weights in place of what the run began with."""
    content = saved.facts.get("recipe")
    if not isinstance(content, dict):
        raise RequestError(
            f"--reproduce: {path}: recipe: found none, since a script made the run and not a recipe; its step.json holds rows "
            "and numbers all the same"
        )
    content = content | {"training": {k: v for k, v in content.get("training", {}).items() if k in NUMERIC}}
    words = [apply_override(content, word) for word in overrides]
    recipe = Recipe.parse(content, str(path), words)
    if recipe.model.trust_remote_code and "model.trust_remote_code" not in words:
        raise RequestError(
            f"--reproduce: {path}: its recipe runs Python code from {recipe.model.name_or_path}: add "
            "model.trust_remote_code=true to the command if you trust that code and whoever gave you the file"
        )
    if recipe.adapter is not None:
        adapter = recipe.adapter.model_copy(update={"init_from": str(saved.weights)})
        return recipe.model_copy(update={"adapter": adapter})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name_or_path": str(saved.weights)})})


def replay(saved: Reproducer, recipe: Recipe) -> int:
    """Forward and backward of all passes, and the comparison."""
    from orpo_lite.model import attach_adapter, load_base, load_tokenizer
    from orpo_lite.trainer.config_from_recipe import arguments, checkpointed
    from orpo_lite.trainer.trainer import ORPOTrainer

    facts = saved.facts
    if not facts["processes"] or not all(one["items"] for one in facts["processes"]):
        raise KeyError("items")
    original = recipe.model.model_copy(update={"name_or_path": facts["recipe"]["model"]["name_or_path"]})
    tokenizer = load_tokenizer(recipe.model if recipe.adapter is not None else original)
    base, known = load_base(recipe.model, tokenizer)
    checkpointing = checkpointed(recipe, base.device)
    broken = set_aside(saved.weights / "adapter_model.safetensors") if recipe.adapter is not None else {}
    model = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing != 0)
    row = {"chosen_ids": [0, 1], "rejected_ids": [0, 1], "chosen_start": 1, "rejected_start": 1}
    if model.config.is_encoder_decoder:
        row["prompt_ids"] = [0]
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe.model_copy(update={"orpo": recipe.orpo.model_copy(update={"tokens_per_batch": None})})
        args = arguments(recipe, Path(scratch), known, has_eval=False, checkpointing=checkpointing)
        # the layout is the file's batches' own: padded asks for no check of the model
        args.layout, args.report_to = "padded", []
        args.learning_rate = 1e-4  # no step is taken: nothing to warn of
        trainer = ORPOTrainer(model, args, None, Dataset.from_list([row]), None, tokenizer)
    if broken:
        set_peft_model_state_dict(model, broken)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = facts["accumulation"]
    if trainer.accelerator.scaler is not None and facts["scale"] is not None:
        trainer.accelerator.scaler.load_state_dict(trainer.accelerator.scaler.state_dict() | {"scale": facts["scale"]})
    totals = None if facts["totals"] is None else torch.tensor(facts["totals"], device=args.device)
    losses = [loss for rank in range(len(facts["processes"])) for loss in passes(trainer, saved, rank, totals)]
    bad = {
        n: [count, p.numel()]
        for n, p in trained(trainer.model).items()
        if p.grad is not None and (count := not_finite(p.grad))
    }
    return tell(facts, losses, bad)


def set_aside(path: Path) -> dict[str, torch.Tensor]:
    """Weights that steps before have thrown out, if so: zeros stand for them in the file while the model is set up.

    No adapter that is not finite is loaded, and how the output head works would be measured wrong with such weights.
    """
    if not path.is_file():
        return {}
    tensors = load_file(path)
    if all(float(tensor.abs().max()) <= LARGE_WEIGHT for tensor in tensors.values() if tensor.numel()):
        return {}
    save_file({n: torch.zeros_like(t) for n, t in tensors.items()}, path)
    return tensors


def passes(trainer: Any, saved: Reproducer, rank: int, totals: Any) -> list[float]:
    """The losses of a process's passes, its random state first; gradients add up on the model."""
    device = trainer.args.device
    if f"{rank}.random" in saved.tensors:
        torch.set_rng_state(saved.tensors[f"{rank}.random"])
    if device.type != "cpu" and f"{rank}.device_random" in saved.tensors:
        torch.get_device_module(device).set_rng_state(saved.tensors[f"{rank}.device_random"])
    losses = []
    for parts in saved.items(rank):
        item = parts[0] if len(parts) == 1 else {"micro_batches": parts}
        losses.append(float(trainer._forward_backward(trainer.model, trainer._prepare_inputs(item), totals)))
    return losses


def tell(facts: dict[str, Any], losses: list[float], bad: dict[str, list[int]]) -> int:
    """Print both sides, and judge."""
    found, processes = facts["found"], len(facts["processes"])
    # several processes averaged gradients of shares that were as many times too large
    several = processes > 1
    recorded = [loss / (processes if several else 1) for loss in found["losses"]]
    # a pass that failed before its backward pass was the last recorded, and left no gradients
    same_losses = len(losses) >= len(recorded) > 0 and all(
        a == b or (math.isnan(a) and math.isnan(b)) or (several and math.isclose(a, b, rel_tol=1e-6))
        for a, b in zip(losses, recorded, strict=False)
    )
    finite = all(map(math.isfinite, losses)) and not bad
    console.print(f"step {facts['step']}, {len(losses)} passes over {sum(map(len, facts['texts']))} pairs")
    for name, one, other in (
        ("loss of each pass", recorded, losses),
        ("gradients not finite", counted(found["gradients"]), counted(bad)),
    ):
        console.print(escape(f"{name}\n  recorded {one}\n  now      {other}"), soft_wrap=True)
    if finite:
        console.print("every number is finite: the step does not fail here")
        return FINITE
    if same_losses and found["gradients"] in (bad, {}):
        console.print("not finite, and the same numbers as recorded")
        return SAME
    console.print("not finite, but other numbers than recorded: another device, version or setting")
    return OTHER


def counted(found: dict[str, list[int]]) -> str:
    values = sum(counts[0] for counts in found.values())
    return f"{values:,} values in {len(found)} tensors"
