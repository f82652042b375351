"""The parts of one run's page; each is empty where the run has nothing for it."""

from __future__ import annotations

from html import escape
from typing import Any

from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.report import next_steps as commands
from orpo_lite.report.charts import Chart
from orpo_lite.report.curves import curves, length_chart, margin_chart, margins, moved
from orpo_lite.report.drawing import figure
from orpo_lite.report.run_record import Told
from orpo_lite.report.run_shapes import number
from orpo_lite.report.words import facts_table, gigabytes, seconds, sentence, table, value

SAMPLES, OPEN, LONGEST = 24, 4, 4000
"""Answers on the page, those that are open at first, and characters of a text."""


def part(title: str, body: str, lead: str = "") -> str:
    """A section with its heading."""
    name = "part-" + title.lower().replace(" ", "-").replace(",", "").replace(":", "")
    lead = f"<p class=lead>{lead}</p>" if lead else ""
    return f"<section aria-labelledby='{name}'><h2 id='{name}'>{title}</h2>{lead}{body}</section>" if body else ""


def figures(charts: list[Chart]) -> str:
    return f"<div class=charts>{''.join(map(figure, charts))}</div>" if charts else ""


def header(run: Told) -> str:
    """Name, verdict and what was run."""
    tiles = "".join(
        f"<li><span>{escape(of)}</span><b{' class=words' if len(what) > 20 else ''}>{what}</b></li>"
        for of, what in summary(run)
        if what
    )
    described = str(run.recipe.get("description") or "")
    notes = "".join(f"<p class=warn>{escape(note)}</p>" for note in run.notes)
    return (
        f"<header><p class=kicker>ORPO run</p><h1><bdi>{escape(run.name)}</bdi></h1><p class=verdict>{escape(sentence(run))}</p>"
        + (f"<p class=lead>{escape(described)}</p>" if described else "")
        + f"{notes}<ul class=tiles>{tiles}</ul></header>"
    )


def summary(run: Told) -> list[tuple[str, str]]:
    """What the tiles say, values as HTML."""
    before, after, facts = run.evaluation("before"), run.evaluation("after"), run.facts
    found = []
    for key in ("rewards/accuracies", "rewards/margins", "nll_loss"):
        cells = [value({key: one[key]}, key) for one in (before, after) if key in one]
        found.append((f"held-out {ROWS[key]}", " → ".join(cells)))
    rule = facts.get("rule") or {}
    if rule.get("before") and rule.get("after"):
        both = (rule["before"].get("chosen"), rule["after"].get("chosen"))
        if all(map(number, both)):
            found.append(("answers in the chosen style", f"{both[0]:.0%} → {both[1]:.0%}"))
    base = facts.get("base_model") or {}
    held = base.get("quantization")
    name = str(base.get("name_or_path") or "").rstrip("/")
    name = name if name.count("/") <= 1 else name.rpartition("/")[2]
    return [*found,
            ("base model" + (f", {held}" if held and held != "none" else ""), f"<bdi>{escape(name)}</bdi>" if name else ""),
            ("adapter", escape(adapter(run))), ("steps x pairs" if number(facts.get("effective_batch")) else "steps", escape(batches(facts))),
            ("training time", escape(seconds(facts.get("train_seconds")))),
            ("peak memory", escape(gigabytes(facts.get("peak_memory_bytes"))))]  # fmt: skip


def adapter(run: Told) -> str:
    if "adapter" not in run.recipe:
        return ""
    found = run.recipe["adapter"]
    if found is None:
        return "none: full fine-tuning"
    kind = "DoRA" if found.get("use_dora") else "rsLoRA" if found.get("use_rslora") else "LoRA"
    return (
        f"{kind} r={found['r']}, alpha={found['alpha']:g}"
        if number(found.get("r")) and number(found.get("alpha"))
        else kind
    )


def batches(facts: dict[str, Any]) -> str:
    steps, pairs = facts.get("steps"), facts.get("effective_batch")
    return f"{steps:,} x {pairs:,}" if number(steps) and number(pairs) else f"{steps:,.0f}" if number(steps) else ""


def results(run: Told) -> tuple[str, list[Chart]]:
    """Held-out metrics before and after, and how the margins are spread."""
    before, after = run.evaluation("before"), run.evaluation("after")
    chart = margin_chart({when: margins(run, when) for when in ("before", "after")})
    if not before and not after:
        return "", []
    rows = [(label, value(before, key), value(after, key)) for key, label in ROWS.items()]
    baseline = before.get("length_baseline", after.get("length_baseline"))
    if number(baseline):
        rows.append(("always preferring the longer answer", f"{baseline:.1%}", f"{baseline:.1%}"))
    pairs = before.get("pairs", after.get("pairs"))
    body = table(("", "before", "after"), rows)
    lead = f"On {pairs:,} pairs that were not trained on; 95% intervals in brackets." if number(pairs) else ""
    if chart is None:
        body += (
            "<p class=note>How the margins are spread over the pairs was not recorded: no held_out.json has them.</p>"
        )
        return part("Held-out pairs", body, lead), []
    chart.hint = f"Left of 0 the rejected answer is the likelier one. {moved(run)}"
    return part("Held-out pairs", f"<div class=charts><div>{body}</div>{figure(chart)}</div>", lead), [chart]


def training(run: Told) -> tuple[str, list[Chart]]:
    charts, notes = curves([("", run)])
    ill = ills(run.facts)
    if not charts:
        return part("Training", "<p class=note>metrics.jsonl holds no metric to draw.</p>" + ill), []
    lead = "Hover or tap to read values; drag to zoom, double-click to see all again. With the keyboard: arrows, + and -, Escape."
    drawn = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    return part("Training", ill + drawn + figures(charts), lead), charts


def ills(facts: dict[str, Any]) -> str:
    """What looked ill on the way."""
    said = [
        f"step {'?' if one.get('step') is None else one['step']}: {one.get('kind') or 'warning'}. "
        f"{one.get('message') or one.get('text') or ''}"
        for one in facts.get("warnings") or []
    ]
    if facts.get("skipped_steps"):
        said.append(f"{len(facts['skipped_steps'])} steps were not finite and were left out")
    if facts.get("overflow_steps"):
        said.append(f"{facts['overflow_steps']} overflows of fp16's loss scaling")
    for passes, met in (facts.get("out_of_memory") or {}).items():
        if met:
            said.append(f"memory ran out {len(met)} times in {passes}; smaller micro-batches took its place")
    if not said:
        return ""
    return (
        "<h3>Looked ill on the way</h3><ul>" + "".join(f"<li class=warn>{escape(one)}</li>" for one in said) + "</ul>"
    )


def answers(run: Told) -> str:
    """Greedy answers to held-out prompts, before and after side by side."""
    old, new = run.samples("before"), run.samples("after")
    if not old and not new:
        return ""
    sides = [("before", old)] if not new else [("before", old), ("after", new)]
    return answer_part([(name, some) for name, some in sides if some])


def answer_part(sides: list[tuple[str, list[dict[str, Any]]]]) -> str:
    count = min(len(some) for _, some in sides)
    blocks = []
    for i in range(min(count, SAMPLES)):
        prompt = sides[0][1][i].get("prompt") or ""
        cells = "".join(
            f"<div><h3>{escape(name)}</h3><pre dir=auto>{cut(some[i].get('answer') or '')}</pre>{likely(some[i])}</div>"
            for name, some in sides
        )
        blocks.append(
            f"<article class=sample aria-label='Prompt {i + 1}'><div class=prompt tabindex=0 role=group aria-label='Prompt "
            f"{i + 1}'><pre dir=auto>{cut(prompt)}</pre></div><div class=answers>{cells}</div></article>"
        )
    more = f"<details><summary>{len(blocks) - OPEN} more</summary>{''.join(blocks[OPEN:])}</details>" if len(blocks) > OPEN else ""  # fmt: skip
    lead = f"Greedy answers to held-out prompts: the first {len(blocks)} of {count}."
    if any("logp" in one for _, some in sides for one in some):
        lead += " Mean log-prob is that of an answer's tokens under the model that gave it, log-odds are log(p / (1 - p)) of it"
        old = any("logp_trained" in one for _, some in sides for one in some)
        lead += "; “trained” is what the trained model makes of the answer from before." if old else "."
    return part("Answers", "".join(blocks[:OPEN]) + more, lead)


def likely(sample: dict[str, Any]) -> str:
    """How likely the answer is, where the run recorded it."""
    said = []
    if number(sample.get("logp")):
        said.append(f"mean log-prob {sample['logp']:.3f}" + odds(sample.get("log_odds"), "log-odds "))
    if number(sample.get("logp_trained")):
        said.append(f"trained: {sample['logp_trained']:.3f}" + odds(sample.get("log_odds_trained")))
    if number(sample.get("tokens")):
        said.append(f"{sample['tokens']} tokens")
    return f"<p>{escape(' · '.join(said))}</p>" if said else ""


def odds(found: Any, name: str = "") -> str:
    return "" if found is None else f", {name}{found:.2f}"


def cut(text: Any) -> str:
    """Escaped text, of a very long one the beginning."""
    text = str(text)
    return (
        escape(text) if len(text) <= LONGEST else f"{escape(text[:LONGEST])} [{len(text) - LONGEST:,} more characters]"
    )


def data(run: Told) -> tuple[str, list[Chart]]:
    """Sources, rows left out by reason, and lengths."""
    found = run.facts.get("data") or {}
    if not found:
        return "", []
    drops = found.get("drops") or {}
    rows = [("training pairs", found.get("train_pairs")), ("held-out pairs", found.get("eval_pairs")),
            ("rows read", drops.get("rows")), ("rows kept", drops.get("kept"))]  # fmt: skip
    body = facts_table(
        [(name, f"{n:,}" if number(n) else n) for name, n in rows] + [("fingerprint", found.get("fingerprint"))]
    )
    dropped = {why: n for why, n in (drops.get("dropped") or {}).items() if number(n)}
    if dropped:
        most = max(dropped.values()) or 1
        cells = [
            (
                escape(why),
                f"{n:,}",
                f"<span class=bar style='width:{max(0.3, 12 * n / most):.1f}rem' aria-hidden=true></span>",
            )
            for why, n in dropped.items()
        ]
        body += "<h3 style='margin-top:1.25rem'>Left out, by reason</h3>" + table(("reason", "rows", ""), cells)
    elif drops.get("dropped") == {}:
        body += "<p class=note>No row was left out.</p>"
    cuts = [f"{side} cut in {n:,} pairs" for side, n in (drops.get("truncated") or {}).items() if number(n) and n]
    remarks = [*cuts, *(drops.get("notes") or [])]
    body += "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in remarks) + "</ul>" if remarks else ""
    sources = [
        (f"<bdi>{escape(one.get('path') or name)}</bdi>", escape(one.get("section") or ""), escape(one.get("shape") or ""),
         *(f"{one[key]:,}" if number(one.get(key)) else "" for key in ("rows", "kept")))
        for name, one in (found.get("sources") or {}).items()
        if one
    ]  # fmt: skip
    if sources:
        body += "<h3 style='margin-top:1.25rem'>Sources</h3>" + table(
            ("source", "for", "shape", "rows", "kept"), sources, kind="cards"
        )
    kept = found.get("lengths") or {}
    titles = {"train": "Lengths of the training pairs", "eval": "Lengths of the held-out pairs"}
    charts = [length_chart(kept[key], f"lengths-{key}", title) for key, title in titles.items() if kept.get(key)]
    drawn = [chart for chart in charts if chart is not None]
    body += f"<div class=charts style='margin-top:1.25rem'>{''.join(map(figure, drawn))}</div>" if drawn else ""
    return part("Data", body), drawn


def memory(run: Told) -> str:
    """Show the plan that training began with beside what was measured."""
    plan = run.facts.get("plan") or {}
    if not plan.get("phases"):
        return ""
    if not drawable(plan):
        return part("Memory: the plan", "<p class=note>run.json holds only a part of the plan, so it is not shown.</p>")
    took, planned = (plan.get("measured") or {}).get("allocated_bytes"), plan["peak_bytes"]
    body = f"<p>Peak {planned / 1e9:.2f} GB in tensors, in the {escape(plan['fullest_phase'])} phase; {plan['needed_bytes'] / 1e9:.2f} GB with what is assumed.</p>"
    if took:
        body = (
            f"<p>{planned / 1e9:.2f} GB in tensors were planned, {took / 1e9:.2f} GB measured: the plan was "
            f"{abs(planned / took - 1):.1%} {'over' if planned >= took else 'under'}.</p>"
        )
    phases = plan["phases"]
    names = dict.fromkeys(name for parts in phases.values() for name in parts if name != "total")
    rows = [
        (escape(name), *(f"{parts[name] / 1e9:.2f}" if parts.get(name) else "" for parts in phases.values()))
        for name in [*names, "total"]
    ]
    title = "Memory: plan against measured" if took else "Memory: the plan"
    return part(title, body + table(("GB (10^9 bytes)", *phases), rows, kind="cards"))


def drawable(plan: dict[str, Any]) -> bool:
    """Check that the plan holds everything that its table shows."""
    phases, measured = plan["phases"].values(), plan.get("measured") or {"allocated_bytes": 0}
    parts = [*phases, plan.get("assumed")]
    return (
        all(plan.get(key) is not None for key in ("recipe", "model", "peak_bytes", "needed_bytes"))
        and plan.get("fullest_phase") in plan["phases"]
        and all(part is not None and None not in part.values() for part in parts)
        and None not in (measured.get("allocated_bytes"), measured.get("reserved_bytes", 0))
    )


def details(run: Told) -> str:
    """Everything else that run.json has of the run."""
    from orpo_lite.common.memory import held_by

    facts = run.facts
    base, parameters = facts.get("base_model") or {}, facts.get("parameters") or {}
    rows = [
        ("base model", base.get("name_or_path")),
        ("revision", base.get("commit") or base.get("revision")),
        *(("", one.removeprefix("base: ")) for one in base.get("facts") or []),
        ("trainable parameters", f"{parameters['trainable']:,} of {parameters['total']:,}"
         if number(parameters.get("trainable")) and number(parameters.get("total")) else None),
        ("layout", ": ".join(filter(None, (facts.get("layout") or {}).values()))),
        ("steps", facts.get("steps")),
        ("pairs a step", facts.get("effective_batch")),
        ("seed", facts.get("seed")),
        ("adapter kept", facts.get("adapter")),
        ("training time", f"{seconds(facts.get('train_seconds'))}, {facts['pairs_per_second']:.1f} pairs a second"
         if number(facts.get("train_seconds")) and number(facts.get("pairs_per_second")) else None),
        ("peak memory", f"{gigabytes(facts['peak_memory_bytes'])} {held_by(facts)}"
         if number(facts.get("peak_memory_bytes")) and facts.get("device") else None),
        ("device", facts.get("device")),
        ("processes", facts.get("processes")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items() if version)),
    ]  # fmt: skip
    return part("Run", facts_table(rows))


def go_on(run: Told) -> str:
    """What to type next, for this run."""
    return part("How to go on", commands.block(run)) if run.path is not None else ""
