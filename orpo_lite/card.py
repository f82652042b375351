"""README.md of a run folder: a model card made from run.json, never by hand."""

from __future__ import annotations

from typing import Any

import yaml

from orpo_lite.evaluate import ROWS
from orpo_lite.recipe import BUILTIN, Recipe
from orpo_lite.report import verdict
from orpo_lite.runfolder import RunFolder

CITATION = """@article{hong2024orpo,
  title   = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author  = {Jiwoo Hong and Noah Lee and James Thorne},
  year    = 2024,
  journal = {arXiv preprint arXiv:2403.07691}
}"""


def write_card(folder: RunFolder) -> None:
    """Write README.md into the run folder."""
    (folder.path / "README.md").write_text(card(folder.recipe(), folder.read()), "utf-8")


def card(recipe: Recipe, facts: dict[str, Any]) -> str:
    """Front matter that the hub understands, then what was done, with what, and what came of it."""
    name, base = facts["name"], facts["base_model"]["name_or_path"]
    tags = ["orpo", "trl-compatible"] + (["qlora"] if recipe.model.quantization in ("nf4", "fp4") else [])
    meta: dict[str, Any] = {"tags": tags + ([] if recipe.adapter is None else ["lora"])}
    meta["library_name"] = "transformers" if recipe.adapter is None else "peft"
    if not base.startswith((BUILTIN, "/", ".")):
        meta["base_model"] = base
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n\n# {name}\n\n{verdict(facts)}\n",
        f"{inline(recipe.description)}\n\nTrained with [ORPO](https://arxiv.org/abs/2403.07691) on {inline(base)} by "
        f"orpo-lite {facts['versions']['orpo-lite']}: {facts['steps']} steps of {facts['effective_batch']} pairs, beta "
        f"{recipe.orpo.beta:g}, learning rate {recipe.training.get('learning_rate')}, seed {facts['seed']}.\n",
    ]
    if before and after:
        lines = [f"| {label} | {before[key]:.4f} | {after[key]:.4f} |" for key, label in ROWS.items()]
        low, high = after["rewards/accuracies_interval"]
        parts.append(
            f"## Results on {after['pairs']} held-out pairs\n\n| | before | after |\n|---|---|---|\n"
            + "\n".join(lines)
            + f"\n\nReward accuracy after: 95% interval {low:.1%} to {high:.1%}. Always preferring the longer answer would score "
            f"{after['length_baseline']:.1%}.\n"
        )
    drops = facts["data"]["drops"].get("dropped", {})
    parts.append(
        f"## Data\n\n{facts['data']['train_pairs']} training pairs, {facts['data']['eval_pairs']} held out; left out: "
        + (", ".join(f"{count} {reason}" for reason, count in drops.items()) or "none")
        + f". Fingerprint `{facts['data']['fingerprint']}`.\n"
    )
    if recipe.adapter is not None:
        parts.append(
            "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
        )
    parts.append(f"Trained on {facts['device']} in {facts['train_seconds']:.0f} s; recipe.yaml repeats the run.\n")
    parts.append(f"## Citation\n\n```bibtex\n{CITATION}\n```\n")
    return "\n".join(parts)


def inline(text: str) -> str:
    """Text from a recipe or a model's name, harmless in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else " " if c in "\r\n" else c for c in text)
