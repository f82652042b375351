"""report.html: one self-contained page of a run, which opens offline."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_lite.cli import console, run_command
from orpo_lite.measure import held_by
from orpo_lite.runfolder import RunFolder

CURVES = (
    ("Loss", ("loss", "nll_loss", "eval_loss")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Log-odds ratio", ("log_odds_chosen", "eval_log_odds_chosen")),
    ("Learning rate", ("learning_rate",)),
    ("Gradient norm", ("grad_norm",)),
    ("Tokens a second", ("tokens_per_second",)),
)
COLOURS = ("var(--a)", "var(--b)", "var(--c)")
STYLE = """
:root{--bg:#fff;--fg:#1c2024;--dim:#60646c;--line:#dfe2e6;--a:#0b68cb;--b:#8a8f98;--c:#c2410c}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e8eaed;--dim:#9aa0a8;--line:#333940;--a:#6cb4ff;--b:#7d848d;--c:#ff9d6b}}
body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
figure{margin:0}figcaption{font-weight:600}.curves{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr))}
svg{width:100%;height:auto}text{fill:var(--dim);font-size:11px}.dim{color:var(--dim)}.verdict{font-size:1.1rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}.wide{overflow-x:auto}
"""


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder from run.json and metrics.jsonl, and return its path."""
    facts = folder.read()
    lines = folder.metrics.read_text("utf-8").splitlines() if folder.metrics.is_file() else []
    path = folder.path / "report.html"
    path.write_text(page(facts, [json.loads(line) for line in lines]), "utf-8")
    return path


def page(facts: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The whole page; everything that comes from data or models is escaped."""
    parts = [f"<h1>ORPO run: {escape(facts['name'])}</h1>", f"<p class=verdict>{escape(verdict(facts))}</p>"]
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    if before and after:
        parts.append("<h2>Held-out pairs</h2>" + evaluation_table(before, after))
    curves = [curve(title, names, metrics) for title, names in CURVES]
    parts.append("<h2>Training</h2><div class=curves>" + "".join(curves) + "</div>")
    if facts["samples"]["after"]:
        parts.append("<h2>Greedy answers to held-out prompts</h2>" + samples_table(facts["samples"]))
    if facts.get("plan"):
        parts.append(memory(facts["plan"]))
    parts.append("<h2>Data</h2>" + rows_table(data_rows(facts)))
    parts.append("<h2>Run</h2>" + rows_table(run_rows(facts)))
    return document(f"ORPO run {facts['name']}", "".join(parts))


def document(title: str, body: str) -> str:
    """A whole page around a body that is HTML already."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def memory(plan: dict[str, Any]) -> str:
    """The plan that training began with, and what it then took."""
    from orpo_lite.planning.drawing import html
    from orpo_lite.planning.picture import picture

    took, planned = (plan.get("measured") or {}).get("allocated_bytes"), plan["peak_bytes"]
    if not took:
        return "<h2>Memory: the plan</h2>" + html(picture(plan))
    return (
        "<h2>Memory: plan against measured</h2>"
        f"<p>{planned / 1e9:.2f} GB in tensors were planned, {took / 1e9:.2f} GB measured: the plan was "
        f"{abs(planned / took - 1):.1%} {'over' if planned >= took else 'under'}.</p>" + html(picture(plan))
    )


def verdict(facts: dict[str, Any]) -> str:
    """The result in a sentence: did the held-out accuracy move by more than chance?"""
    before, after = facts["eval"]["before"], facts["eval"]["after"]
    if not before or not after:
        return f"Trained for {facts['steps']} steps; no pairs were held out, so whether it helped is not known."
    old, new = before["rewards/accuracies"], after["rewards/accuracies"]
    if not (math.isfinite(old) and math.isfinite(new)):
        return f"Held-out reward accuracy on {after['pairs']} pairs is not a number: something went wrong in this run."
    (_, old_high), (new_low, _) = before["rewards/accuracies_interval"], after["rewards/accuracies_interval"]
    how = (
        "clearly more than chance would give"
        if new_low > old_high
        else "within what chance could give"
        if new >= old
        else "it did not improve"
    )
    return f"Held-out reward accuracy went from {old:.1%} to {new:.1%} on {after['pairs']} pairs: {how}."


def evaluation_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    from orpo_lite.evaluate import ROWS

    def cell(result: dict[str, Any], key: str) -> str:
        if key != "rewards/accuracies":
            return f"{result[key]:.4f}"
        low, high = result["rewards/accuracies_interval"]
        return f"{result[key]:.1%} <span class=dim>({low:.1%} to {high:.1%})</span>"

    rows = "".join(
        f"<tr><th scope=row>{label}</th><td>{cell(before, key)}</td><td>{cell(after, key)}</td></tr>"
        for key, label in ROWS.items()
    )
    baseline = f"<tr><th scope=row>always the longer answer</th><td>{before['length_baseline']:.1%}</td><td></td></tr>"
    head = "<tr><th scope=col></th><th scope=col>before</th><th scope=col>after</th></tr>"
    return f"<div class=wide><table>{head}{rows}{baseline}</table></div>"


def curve(title: str, names: tuple[str, ...], metrics: list[dict[str, Any]]) -> str:
    """One small chart as inline SVG; nothing where none of the metrics was logged."""
    series = {name: [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), int | float)] for name in names}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    xs, ys = zip(*[p for points in series.values() for p in points], strict=True)
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    width, height, left, top, bottom = 360, 200, 48, 8, 24

    def place(x: float, y: float) -> str:
        px = left + (x - x0) / ((x1 - x0) or 1) * (width - left - 8)
        py = height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - bottom - top)
        return f"{px:.1f},{py:.1f}"

    drawn, legend = [], []
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        drawn.append(
            f"<polyline fill=none stroke='{colour}' stroke-width=1.8 points='{' '.join(place(*p) for p in points)}'/>"
            + "".join(
                f"<circle cx={place(*p).split(',')[0]} cy={place(*p).split(',')[1]} r=2.5 fill='{colour}'>"
                f"<title>{name}, step {p[0]}: {p[1]:.5g}</title></circle>"
                for p in points
            )
        )
        legend.append(f"<span style='color:{colour}'>&#9632; {name}</span>")
    axes = (
        f"<text x=0 y={top + 10}>{y1:.3g}</text><text x=0 y={height - bottom}>{y0:.3g}</text>"
        f"<text x={left} y={height - 6}>step {x0}</text><text x={width - 8} y={height - 6} text-anchor=end>{x1}</text>"
        f"<path d='M{left},{top}V{height - bottom}H{width - 8}' fill=none stroke='var(--line)'/>"
    )
    label = f"{title}: {', '.join(f'{n} from {p[0][1]:.4g} to {p[-1][1]:.4g}' for n, p in series.items())}"
    return (
        f"<figure><figcaption>{title}</figcaption><svg viewBox='0 0 {width} {height}' role=img aria-label='{escape(label, True)}'>"
        f"{axes}{''.join(drawn)}</svg><div class=dim>{' '.join(legend)}</div></figure>"
    )


def samples_table(samples: dict[str, list[dict[str, str]]], most: int = 12) -> str:
    rows = "".join(
        f"<tr><td><pre>{escape(a['prompt'])}</pre></td><td><pre>{escape(a['answer'])}</pre></td><td><pre>{escape(b['answer'])}</pre></td></tr>"
        for a, b in list(zip(samples["before"], samples["after"], strict=True))[:most]
    )
    head = "<tr><th scope=col>prompt</th><th scope=col>before</th><th scope=col>after</th></tr>"
    return f"<div class=wide><table>{head}{rows}</table></div>"


def rows_table(rows: list[tuple[str, Any]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in rows)
        + "</table>"
    )


def data_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    data = facts["data"]
    drops = data["drops"].get("dropped", {})
    return [
        ("training pairs", data["train_pairs"]),
        ("held-out pairs", data["eval_pairs"]),
        ("left out", ", ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"),
        ("fingerprint", data["fingerprint"]),
    ]


def run_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("base model", facts["base_model"]["name_or_path"]),
        ("trainable parameters", f"{facts['parameters']['trainable']:,} of {facts['parameters']['total']:,}"),
        ("steps", facts["steps"]),
        ("pairs a step", facts["effective_batch"]),
        ("adapter kept", facts["adapter"]),
        ("training time", f"{facts['train_seconds']:.0f} s, {facts['pairs_per_second']:.1f} pairs a second"),
        ("peak memory", f"{facts['peak_memory_bytes'] / 1e9:.2f} GB {held_by(facts)}"),
        ("device", facts["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)),
    ]


def command(run: Annotated[str, typer.Argument(help="run folder")]) -> None:
    """Write a run's report.html again."""
    console.print(str(write_report(RunFolder.open(run))), soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command(command)
