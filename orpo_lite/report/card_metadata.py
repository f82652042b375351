"""The front matter of a card, in huggingface_hub's own classes, so that the hub accepts it."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from orpo_lite.recipe import Recipe
from orpo_lite.report.published_recipe import base_name

METRICS = {
    "rewards/accuracies": ("accuracy", "Reward accuracy"),
    "rewards/margins": ("reward_margin", "Reward margin"),
    "log_odds_chosen": ("log_odds_ratio", "Log-odds ratio"),
    "nll_loss": ("nll", "NLL a token"),
    "loss": ("loss", "ORPO loss"),
}
"""Evaluation's name -> type and name in the model index."""
TAGS = {"adapter": (), "merged": (), "gguf": ("gguf",)}
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


def card_data(
    kind: str,
    *,
    name: str,
    base: str | None,
    licence: dict[str, str] | None,
    tags: list[str],
    datasets: list[str] | None = None,
    results: list[EvalResult] | None = None,
) -> ModelCardData:
    """Front matter; `base` is a hub id or None, `kind` one of adapter, merged, gguf."""
    more: dict[str, Any] = {}
    if base:
        more["base_model_relation"] = RELATIONS[kind]
    if licence and (link := licence.get("link")):
        if "://" not in link:  # a file of the base's repository
            link = f"https://huggingface.co/{base}/blob/main/{link}" if base else None
        more["license_link"] = link
    return ModelCardData(
        base_model=base,
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=[*tags, *TAGS[kind]],
        license=(licence or {}).get("id"),
        license_name=(licence or {}).get("name"),
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def eval_results(facts: dict[str, Any], recipe: Recipe, kind: str) -> list[EvalResult]:
    """The evaluation after training for the model index; what is not a finite number is left out."""
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    if not before or not after:
        return []
    section = "eval" if recipe.data.eval else "train"
    sources = [source for source in facts["data"]["sources"].values() if source["section"] == section]
    on_hub = [source["path"] for source in sources if not source["files"]]
    names = ", ".join(base_name(source["path"], not source["files"]) for source in sources)
    measured = "" if kind == "adapter" or recipe.adapter is None else ", adapter on its base before merging"
    results = []
    for key, (metric, title) in METRICS.items():
        if not math.isfinite(after[key]):
            continue
        more = {"before_training": before[key], "interval_95": after.get(f"{key}_interval")}
        if key == "rewards/accuracies":
            more["always_the_longer_answer"] = after["length_baseline"]
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="preference pairs",
                dataset_type=on_hub[0] if len(on_hub) == len(sources) == 1 else "preference-pairs",
                dataset_name=f"{after['pairs']} held-out pairs of {names}",
                dataset_args={"pairs": after["pairs"], "fingerprint": facts["data"]["fingerprint"]},
                metric_type=metric,
                metric_name=f"{title}{measured}",
                metric_value=after[key],
                metric_args={name: value for name, value in more.items() if value is not None and finite(value)},
            )
        )
    return results


def finite(value: Any) -> bool:
    return all(map(math.isfinite, value)) if isinstance(value, list | tuple) else math.isfinite(value)
