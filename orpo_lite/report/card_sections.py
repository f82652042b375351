"""The sections of a card that say what was trained on what, how, and what came of it."""

from __future__ import annotations

from typing import Any

import yaml

from orpo_lite.common.markdown import fence, inline, number, table
from orpo_lite.common.memory import held_by
from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import BUILTIN
from orpo_lite.report.published_recipe import base_name, shareable, without_places

CITATION = """@article{hong2024orpo,
  title   = {{ORPO: Monolithic Preference Optimization without Reference Model}},
  author  = {Jiwoo Hong and Noah Lee and James Thorne},
  year    = 2024,
  journal = {arXiv preprint arXiv:2403.07691}
}"""
SAMPLES, SAMPLE_CHARACTERS = 4, 1500
HOUSEKEEPING = ("output_dir", "logging_", "save_", "eval_", "report_to", "hub_", "push_", "run_name", "per_device_eval")
"""Training fields that say nothing of the weights; recipe.yaml has them all."""


def link(name: str, hub: str | None) -> str:
    return f"[{inline(name)}](https://huggingface.co/{hub})" if hub else inline(name)


def origin(base: str, hub: str | None, revision: str | None, licence: dict[str, str] | None, held: str | None) -> str:
    """Base, revision, licence and quantisation as a list."""
    where = (
        "" if hub else " (ships with orpo-lite)" if base.startswith(BUILTIN) else " (a local folder, not on the hub)"
    )
    lines = [f"base model: {link(base, hub)}{where}" + (f", revision {inline(revision)}" if revision else "")]
    if licence is None:
        lines.append("licence: see the base model")
    elif "id" in licence:
        name = f", {licence['name']}" if "name" in licence else ""
        lines.append(f"licence: {inline(licence['id'] + name)} (the base model's, from {inline(licence['source'])})")
    else:
        lines.append(
            f"licence: see the base model, whose {inline(licence['source'])} begins: {inline(licence['title'])}"
        )
    if held:
        lines.append(f"base held in training as: {'not quantised' if held == 'none' else inline(held)}")
    return "\n".join(f"- {line}" for line in lines)


def results_section(recipe: Recipe, facts: dict[str, Any], kind: str) -> str:
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    if not before or not after:
        return "No pairs were held out, so nothing is known of its quality."
    rows = [(label, cell(before, key), cell(after, key)) for key, label in ROWS.items()]
    rows.append(("always preferring the longer answer", number(after["length_baseline"], ".1%"), ""))
    old, new = facts["rule"]["before"], facts["rule"]["after"]
    if old and new:
        count = len(facts["samples"]["after"])
        rows += [(f"{count} greedy answers in the {style} style, by the recipe's rule",
                  number(old[style], ".1%"), number(new[style], ".1%")) for style in ("chosen", "rejected")]  # fmt: skip
    which = "the adapter on its base, before merging or converting" if kind != "adapter" and recipe.adapter else "after"
    text = (
        f"On {after['pairs']:,} held-out pairs, with 95% intervals in brackets. *before*: the base; *after*: {{}}.\n\n"
    )
    return text.format(which if which != "after" else "this model") + table(rows, ("", "before", "after"))


def cell(result: dict[str, Any], key: str) -> str:
    form = ".1%" if key == "rewards/accuracies" else ".4f"
    low_high = result.get(f"{key}_interval")
    return number(result[key], form) + (
        f" ({number(low_high[0], form)} to {number(low_high[1], form)})" if low_high else ""
    )


def samples_section(samples: dict[str, list[dict[str, str]]]) -> str:
    """The first answers, before and after side by side in an HTML table whose cells are code blocks."""
    pairs = list(zip(samples["before"], samples["after"], strict=True))
    if not pairs:
        return ""
    parts = [
        "## Sample answers",
        f"Greedy answers to held-out prompts: the first {len(pairs[:SAMPLES])} of {len(pairs)}.",
    ]
    for old, new in pairs[:SAMPLES]:
        prompt, before, after = (fence(shortened(text)) for text in (old["prompt"], old["answer"], new["answer"]))
        # blank lines around each fence: within a block of HTML, Markdown reads one only after a blank line
        parts.append(
            f'<table>\n<tr><th colspan="2">prompt</th></tr>\n<tr><td colspan="2">\n\n{prompt}\n\n</td></tr>\n'
            f"<tr><th>before</th><th>after</th></tr>\n<tr><td>\n\n{before}\n\n</td><td>\n\n{after}\n\n</td></tr>\n</table>"
        )
    return "\n\n".join(parts)


def shortened(text: str) -> str:
    gone = len(text) - SAMPLE_CHARACTERS
    return text if gone <= 0 else f"{text[:SAMPLE_CHARACTERS]}\n[{gone:,} more characters]"


def data_section(recipe: Recipe, facts: dict[str, Any]) -> str:
    data = facts["data"]
    rows = []
    for source in data["sources"].values():
        hub = None if source["files"] else source["path"]
        shown = base_name(source["path"], hub is not None)
        name = f"[{inline(shown)}](https://huggingface.co/datasets/{hub})" if hub else inline(shown)
        rows.append((name, {"train": "training", "eval": "held out"}[source["section"]], inline(source["shape"] or ""),
                     f"{source['rows']:,}", f"{source['kept']:,}", f"{source['weight']:g}"))  # fmt: skip
    drops = data["drops"]
    lines = [
        f"{data['train_pairs']:,} training pairs, {data['eval_pairs']:,} held out"
        + ("" if recipe.data.eval or not data["eval_pairs"] else " of the same sources")
        + f"; fingerprint `{data['fingerprint']}`.",
        table(rows, ("source", "for", "shape", "rows", "kept", "weight")),
        f"Rows left out: {drops['rows'] - drops['kept']:,} of {drops['rows']:,}."
        + (" By reason:" if drops["dropped"] else ""),
    ]
    if drops["dropped"]:
        lines.append(table(((inline(why), f"{n:,}") for why, n in drops["dropped"].items()), ("reason", "rows")))
    cuts = [f"{side} cut in {count:,} pairs" for side, count in drops["truncated"].items() if count]
    remarks = [*cuts, *(without_places(note, recipe, facts) for note in drops["notes"])]
    return "\n\n".join([*lines, "\n".join(f"- {inline(remark)}" for remark in remarks)]).rstrip()


def hyperparameters(recipe: Recipe, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What shaped the weights: the recipe's own fields, and what was resolved from them."""
    rows: dict[str, Any] = {
        "pairs an optimizer step": facts["effective_batch"],
        "optimizer steps": facts["steps"],
        "seed": facts["seed"],
        "compute dtype": facts["base_model"]["dtype"],
        "layout": f"{facts['layout']['name']} ({facts['layout']['why']})",
    }
    given = yaml.safe_load(shareable(recipe, facts))
    rows |= {f"adapter.{k}": v for k, v in (given["adapter"] or {}).items() if v is not False and k != "eva_batches"}
    rows |= {f"orpo.{k}": v for k, v in given["orpo"].items() if k != "layout"}
    for key in ("max_length", "max_prompt_length", "max_completion_length", "overlong", "completion_end"):
        rows[f"data.{key}"] = given["data"][key]
    rows |= {f"training.{k}": v for k, v in given["training"].items() if not k.startswith(HOUSEKEEPING) and k != "seed"}
    return [(inline(key), inline(str(value))) for key, value in rows.items() if value not in (None, {}, [], "")]


def run_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    plan = facts.get("plan") or {}
    rows = [
        ("device", inline(facts["device"]) + (f", {facts['processes']} processes" if facts["processes"] > 1 else "")),
        (
            "training",
            f"{number(facts['train_seconds'], ',.1f')} s, {number(facts['pairs_per_second'], ',.1f')} pairs/s",
        ),
        ("whole run", f"{number(facts['total_seconds'], ',.1f')} s"),
        ("peak memory, measured", f"{number(facts['peak_memory_bytes'] / 1e9, '.2f')} GB {inline(held_by(facts))}"),
        *([("peak memory, planned", f"{number(plan['peak_bytes'] / 1e9, '.2f')} GB in tensors")] if plan else []),
        ("trainable parameters", f"{facts['parameters']['trainable']:,} of {facts['parameters']['total']:,}"),
        ("weights kept", inline(facts["adapter"])),
        ("versions", inline(", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version))),
    ]
    return rows


def limits(recipe: Recipe, facts: dict[str, Any], kind: str) -> list[str]:
    lines, held = [], facts["base_model"]["quantization"]
    if held != "none" and kind == "adapter":
        lines.append(
            f"Trained over {inline(held)} weights: on the 16-bit base the answers differ a little. "
            "`orpo_lite.merge --onto quantized` keeps those of training."
        )
    if facts["base_model"]["commit"] is None and facts["base_model"]["hub_id"]:
        lines.append("Which commit of the base was used is not known.")
    if facts["eval"]["after"]:
        lines.append("One run with one seed; the intervals are of the sample of pairs, not of training.")
    lines.append("Nothing but what stands above was measured: no safety, no other language, no other task.")
    return lines


def citation() -> str:
    return f"## Citation\n\nORPO:\n\n{fence(CITATION, 'bibtex')}"
