"""report.html of one run: what its parts say, rendered by run.html.jinja."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orpo_lite.common.memory import held_by
from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.report.charts import changed_sides, curves, length_chart, margin_chart, margins
from orpo_lite.report.drawing import COLORS, Chart, Drawing, is_number, script_data, written
from orpo_lite.report.run_record import LoadedRun, RunRecord, Sample

LONGEST = 4000
"""Characters shown of a text."""


# ---- rendering -----------------------------------------------------------------------------------------------------------


@cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: everything is escaped, None is shown as nothing, a misspelled name fails."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("orpo_lite.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: "" if value is None else value, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (Path(__file__).parent / "page.js").read_text("utf-8").strip()
    made.globals |= {
        "drawing": Drawing, "script_data": script_data, "colors": COLORS, "script": Markup(script),  # noqa: S704  # our own file
        "is_number": is_number, "arrow": arrow, "held_by": held_by, "metrics": ROWS, "script_digest": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        "style": Markup((Path(__file__).parent / "page.css").read_text("utf-8").strip()),  # noqa: S704  # our own file
    }  # fmt: skip
    made.filters |= {
        "cut": cut,
        "count": count,
        "gigabytes": gigabytes,
        "duration": duration,
        "metric": metric,
        "written": written,
    }
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def render(template: str, loaded: Sequence[LoadedRun], charts: list[Chart | None], /, **parts: Any) -> bytes:
    """Render a page as UTF-8; half surrogates, which data may hold and UTF-8 cannot, become references.

    Args:
        charts: all charts of the page; without any, the page has no script.
    """
    versions = {run.record.versions.get("orpo-lite") for run in loaded} - {None}
    drawn = [chart for chart in charts if chart]
    text = environment().get_template(template).render(charts=drawn, versions=sorted(map(str, versions)), **parts)
    return text.encode("utf-8", "xmlcharrefreplace")


def run_page(run: LoadedRun) -> bytes:
    """Render the page of one run; everything that comes from data or models is escaped."""
    record = run.record
    spread = margin_chart({when: margins(run, when) for when in ("before", "after")})
    rows = evaluation_rows(run)
    if spread is not None:
        spread.hint = f"Left of 0 the rejected answer is the likelier one. {changed_sides(run)}"
    drawn, notes = curves([("", run)])
    titles = {"train": "Lengths of the training pairs", "eval": "Lengths of the held-out pairs"}
    lengths = [length_chart(one, f"lengths-{key}", titles[key]) for key, one in record.data.lengths.items()]
    return render(
        "run.html.jinja", [run], [spread if rows else None, *drawn, *lengths],
        title=f"ORPO run {run.name}", run=run, verdict=sentence(run), adapter=adapter(run), evaluations=rows, margins=spread,
        answers=answers([(when, record.samples.get(when, [])) for when in ("before", "after")]), curves=drawn, notes=notes,
        lengths=[chart for chart in lengths if chart], steps=next_steps(run),
    )  # fmt: skip


# ---- values --------------------------------------------------------------------------------------------------------------


def count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else ""


def gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"


def duration(seconds: float | None) -> str:
    """Write a time in its two largest units."""
    if seconds is None or seconds < 100:
        return "" if seconds is None else f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    return f"{minutes} min" if minutes < 100 else f"{hours} h {round((seconds - hours * 3600) / 60)} min"


def metric(result: dict[str, Any], key: str) -> str:
    """Write one metric of an evaluation, accuracy with its interval."""
    found = result.get(key)
    if found is None:
        return ""
    accuracy = key == "rewards/accuracies"
    text = (f"{found:.1%}" if accuracy else f"{found:.4f}") if math.isfinite(found) else written(found)
    if accuracy and (ends := interval(result)):
        return Markup("{} <span class=dim>({:.1%} to {:.1%})</span>").format(text, *ends)
    return text


def interval(result: dict[str, Any]) -> tuple[float, float] | None:
    """Return the lowest and the highest value of an accuracy's interval, or None where it is not known."""
    found = result.get("rewards/accuracies_interval") or ()
    return (found[0], found[1]) if len(found) == 2 and all(map(is_number, found)) else None


def arrow(*values: str) -> str:
    return Markup(" → ").join(filter(None, values))


def cut(text: str | None) -> str:
    """Return a text, or the beginning of a very long one."""
    text = text or ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [{len(text) - LONGEST:,} more characters]"


# ---- the result in words -------------------------------------------------------------------------------------------------


def verdict(record: RunRecord) -> str:
    """Say in a sentence whether the held-out accuracy moved by more than chance."""
    before, after = (dict(record.eval.get(when) or {}) for when in ("before", "after"))
    old, new = before.get("rewards/accuracies"), after.get("rewards/accuracies")
    if old is None or new is None:
        none = "eval" in record.model_fields_set and not before and not after
        why = "no pairs were held out" if none else "held-out reward accuracy before or after was not recorded"
        steps = "?" if record.steps is None else f"{record.steps:.0f}"
        return f"Trained for {steps} steps; {why}, so whether it helped is not known."
    pairs = "pairs that were not counted" if after.get("pairs") is None else f"{after['pairs']:.0f} pairs"
    if not (is_number(old) and is_number(new)):
        return f"Held-out reward accuracy on {pairs} is not a number: something went wrong in this run."
    old_range, new_range = interval(before), interval(after)
    if new < old:
        how = "it did not improve"
    elif old_range is None or new_range is None:
        how = "whether that is chance is not known"
    else:
        how = "clearly more than chance would give" if new_range[0] > old_range[1] else "within what chance could give"
    return f"Held-out reward accuracy went from {old:.1%} to {new:.1%} on {pairs}: {how}."


def sentence(run: LoadedRun) -> str:
    """Return the verdict of a finished run, or where an unfinished one stands."""
    if run.state == "finished":
        return verdict(run.record)
    now = "This run is under way" if run.state == "under way" else "This run was stopped before its end"
    held = [line for line in run.metrics if is_number(line.get("eval_rewards/accuracies")) and line["step"]]
    accuracy = (
        "; held-out reward accuracy was {eval_rewards/accuracies:.1%} at step {step:g}".format(**held[-1])
        if held
        else ""
    )
    return f"{now}, its last log line at step {run.record.steps:g}{accuracy}."


def adapter(run: LoadedRun) -> str:
    """Name the kind of adapter, its rank and alpha; empty where the recipe does not say."""
    found = run.recipe.adapter
    if found is None:
        return "none: full fine-tuning" if run.full_fine_tuning else ""
    kind = "DoRA" if found.get("use_dora") else "rsLoRA" if found.get("use_rslora") else "LoRA"
    rank, alpha = found.get("r"), found.get("alpha")
    return f"{kind} r={rank}, alpha={alpha:g}" if is_number(rank) and is_number(alpha) else kind


# ---- parts of the page ---------------------------------------------------------------------------------------------------


def evaluation_rows(run: LoadedRun) -> list[tuple[str, str, str]]:
    """Return name and value before and after of every held-out metric; none where nothing was measured."""
    before, after = run.evaluation("before"), run.evaluation("after")
    if not before and not after:
        return []
    rows = [(label, metric(before, key), metric(after, key)) for key, label in ROWS.items()]
    baseline = before.get("length_baseline", after.get("length_baseline"))
    if is_number(baseline):
        rows.append(("always preferring the longer answer", f"{baseline:.1%}", f"{baseline:.1%}"))
    return rows


def answers(sides: list[tuple[str, list[Sample]]]) -> list[tuple[str, list[tuple[str, Sample]]]]:
    """Return the held-out prompts with each side's greedy answer; sides without any are left out."""
    sides = [(name, samples) for name, samples in sides if samples]
    total = min((len(samples) for _, samples in sides), default=0)
    return [(sides[0][1][i].prompt, [(name, samples[i]) for name, samples in sides]) for i in range(total)]


# ---- next steps ----------------------------------------------------------------------------------------------------------


def next_steps(run: LoadedRun) -> list[tuple[str, str]]:
    """Return commands to type next for this run, and what each is for; none for a run without a folder."""
    if run.path is None:
        return []
    here = shown_path(run.path)
    place, name = shlex.quote(here), run.path.resolve().name
    if run.state != "finished":
        why = f"resume from {run.checkpoint}" if run.checkpoint else "start again: there is no checkpoint"
        resume = " --resume" if run.checkpoint else ""
        return [
            (f"python -m orpo_lite.train --recipe {place}{resume}", why),
            (f"python -m orpo_lite.report {place}", "this page again, as far as the run has come by then"),
        ]
    whole, found = run.full_fine_tuning, []
    if not whole:
        found.append(
            (f"python -m orpo_lite.evaluate {place}", "base against adapter, on these or other pairs (--data)")
        )
    found.append((f"python -m orpo_lite.chat {place}" + ("" if whole else " --compare"), "talk to it"))
    if not whole:
        merged = shlex.quote(f"{here}-merged")
        found.append((f"python -m orpo_lite.merge {place} --output {merged}", "a plain transformers model"))
    if not encoder_decoder(run.path):
        gguf = shlex.quote(f"{name}.gguf")
        command = f"python -m orpo_lite.export {place} --output {gguf} --quant q8_0 --ollama"
        found.append((command, "for llama.cpp and Ollama"))
    seed = run.record.seed
    again = f"training.seed={1 if seed is None else int(seed) + 1}"
    return [
        *found,
        (f"python -m orpo_lite.push {place} --repo USER/{shlex.quote(name)} --dry-run", "what would go to the hub"),
        (f"python -m orpo_lite.train --recipe {place} {again}", "again with another seed, in a new folder"),
        (f"python -m orpo_lite.report {place} {shlex.quote(f'{here}-2')}", "then compare the two"),
    ]


def encoder_decoder(folder: Path) -> bool:
    """Tell whether the configuration beside the weights says so; GGUF holds decoders only."""
    for name, key, said in (
        ("adapter_config.json", "task_type", "SEQ_2_SEQ_LM"),
        ("config.json", "is_encoder_decoder", True),
    ):
        try:
            if json.loads((folder / name).read_text("utf-8")).get(key) == said:
                return True
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return False


def shown_path(path: Path) -> str:
    """Return a path relative to here, where it lies here: a page that is passed on need not name its author's home."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
