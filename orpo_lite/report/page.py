"""report.html of one run, and compare.html of several over one another: what their parts say, for the templates."""

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orpo_lite.common.text import counted, cut, duration, format_gb, measured
from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.report.charts import accuracy_interval, curves, margin_chart, margins
from orpo_lite.report.drawing import COLORS, Chart, is_finite, script_data, written
from orpo_lite.trainer.run_record import LoadedRun, Sample


@cache
def environment() -> jinja2.Environment:
    """Return the templates' environment: everything is escaped, None is shown as nothing, a misspelled name fails."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("orpo_lite.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: "" if value is None else value, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (Path(__file__).parent / "page.js").read_text("utf-8").strip()
    made.globals |= {
        "script_data": script_data, "colors": COLORS,
        "is_finite": is_finite, "metrics": ROWS, "few_pairs": few_pairs,
        "script": Markup(script),  # noqa: S704  # our own file
        "script_digest": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        "style": Markup((Path(__file__).parent / "page.css").read_text("utf-8").strip()),  # noqa: S704  # our own file
    }  # fmt: skip
    made.filters |= {
        "cut": cut, "measured": measured, "written": written, "sh": shlex.quote, "shown_path": shown_path,
        "duration": known(duration), "count": known("{:,}".format), "counted": known(counted),
        "rate": known("{:.1f}".format), "gigabytes": known(lambda size: format_gb(size, 2)),
    }  # fmt: skip
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def render(template: str, loaded: Sequence[LoadedRun], charts: list[Chart | None], /, **parts: Any) -> bytes:
    """Render a page as UTF-8; half surrogates, which data may hold and UTF-8 cannot, become references."""
    versions = {run.record.versions.get("orpo-lite") for run in loaded} - {None}
    drawn = [chart for chart in charts if chart]
    text = environment().get_template(template).render(charts=drawn, versions=sorted(map(str, versions)), **parts)
    return text.encode("utf-8", "xmlcharrefreplace")


def run_page(run: LoadedRun) -> bytes:
    """Render the page of one run; everything that comes from data or models is escaped."""
    spread = margin_chart(
        {"before": margins(run, "before"), "after": margins(run, "after")},
        title="Reward margins of the held-out pairs",
        x="reward margin",
        hint="Left of 0 the rejected answer is the likelier one.",
    )
    drawn = curves([("", run)])
    return render(
        "run.html.jinja", [run], [spread if run.last_evaluation else None, *drawn],
        title=f"ORPO run {run.name}", run=run, verdict=verdict(run), margins=spread,
        answers=answers([(when, run.record.samples.get(when, [])) for when in ("before", "after")]), curves=drawn,
    )  # fmt: skip


def known(write: Callable[..., str]) -> Callable[..., str]:
    """Return a filter that writes nothing for None."""
    return lambda value, *words: "" if value is None else write(value, *words)


def verdict(run: LoadedRun) -> str:
    """Say in a sentence whether the held-out accuracy moved by more than chance, or where an unfinished run stands."""
    record = run.record
    if run.state != "finished":
        now = "This run is under way" if run.state == "under way" else "This run was stopped before its end"
        key = "eval_rewards/accuracies"
        held = [line for line in run.metrics if is_finite(line.get(key)) and line["step"]][-1:]
        accuracy = "".join(f"; held-out reward accuracy was {line[key]:.1%} at step {line['step']:g}" for line in held)
        return f"{now}, its last log line at step {record.steps}{accuracy}."
    before, after = record.evaluation("before"), record.evaluation("after")
    old, new = (one.get("rewards/accuracies") for one in (before, after))
    if old is None or new is None:
        none = "eval" in record.model_fields_set and not before and not after
        why = "no pairs were held out" if none else "held-out reward accuracy before or after was not recorded"
        steps = "?" if record.steps is None else record.steps
        return f"Trained for {steps} steps; {why}, so whether it helped is not known."
    count = after.get("pairs")
    pairs = "pairs that were not counted" if count is None else counted(count, "pair")
    if not (is_finite(old) and is_finite(new)):
        return f"Held-out reward accuracy on {pairs} is not a number: something went wrong in this run."
    if new <= old:
        how = "it got worse" if new < old else "it did not change"
    elif not count:
        how = "whether that is chance is not known"
    else:
        how = "clearly more than chance would give" if told_apart(old, new, count) else "within what chance could give"
    return f"Held-out reward accuracy went from {old:.1%} to {new:.1%} on {pairs}: {how}."


def told_apart(one: float, other: float, pairs: int) -> bool:
    """Tell whether the 95% intervals of two accuracies, each on so many pairs, lie apart."""
    low, high = sorted((one, other))
    return accuracy_interval(low, pairs)[1] < accuracy_interval(high, pairs)[0]


WIDE, MOST = 0.2, 10_000
"""Width of an accuracy's interval above which it tells little, and the pairs up to which enough of them are looked for."""


def few_pairs(run: LoadedRun) -> dict[str, Any]:
    """Return, for the page, what too few held-out pairs cannot tell, and how many could; empty where they can."""
    last = run.last_evaluation
    old, new = (one.get("rewards/accuracies") for one in (run.record.evaluation("before"), last))
    if not (is_finite(old) and is_finite(new) and (pairs := last.get("pairs"))):
        return {}

    def lacks(count: int) -> str:
        low, high = accuracy_interval(new, count)
        return "difference" if old != new and not told_apart(old, new, count) else "size" if high - low > WIDE else ""

    if not (lack := lacks(pairs)):
        return {}
    enough = next((count for count in range(pairs, MOST) if not lacks(count)), None)
    return {"pairs": pairs, "accuracy": new, "interval": accuracy_interval(new, pairs), "lack": lack, "enough": enough}


def answers(sides: list[tuple[str, list[Sample]]]) -> list[tuple[str, list[tuple[str, Sample]]]]:
    """Return the held-out prompts with each side's greedy answer, without sides that have none; empty if prompts differ."""
    names, samples = [name for name, some in sides if some], [some for _, some in sides if some]
    asked = list(zip(*samples, strict=False))
    same = all(len({one.prompt for one in row}) == 1 for row in asked)
    return [(row[0].prompt, list(zip(names, row, strict=True))) for row in asked] if same else []


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's content; empty where there is none, or none that can be read."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def shown_path(path: Path) -> str:
    """Return a path relative to here, where it lies here: a page that is passed on need not name its author's home."""
    whole, here = path.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


HOUSEKEEPING = {"name", "description", "needs", "training.output_dir"}
"""Fields of a recipe that do not shape the weights."""


def compare_page(runs: Sequence[LoadedRun]) -> bytes:
    """Render the page of several runs."""
    named = dict(zip(labels(runs), runs, strict=True))
    drawn = curves(list(named.items()))
    spread = margin_chart(
        {name: margins(run, "after", scale=1.0) for name, run in named.items()},  # without beta, which may differ
        title="Held-out pairs after training",
        x="chosen minus rejected, mean log-prob",
        hint="Mean log-prob of the chosen answer minus that of the rejected one. Left of 0 the rejected one is likelier.",
    )
    return render(
        "compare.html.jinja", runs, [*drawn, spread], title=f"ORPO runs: {', '.join(run.name for run in runs)}"[:200],
        runs=runs, compared=[(name, run, verdict(run)) for name, run in named.items()], head=("", *named),
        other_pairs=len({run.record.data.fingerprint for run in runs} - {None}) > 1,
        differences=[(key, *map(shown, row)) for key, row in differences(runs).items()],
        curves=drawn, margins=spread, other_betas=len({run.beta for run in runs}) > 1,
        answers=answers([(name, run.record.samples.get("after", [])) for name, run in named.items()]),
    )  # fmt: skip


def labels(runs: Sequence[LoadedRun]) -> list[str]:
    """Return a letter and a name for each run: that of its folder, where names are not all different."""
    names = [run.name for run in runs]
    for parts in (1, 2):
        if len(set(names)) < len(names):
            names = ["/".join(run.path.resolve().parts[-parts:]) for run in runs]
    short = (name if len(name) <= 60 else f"{name[:59]}…" for name in names)
    return [f"{chr(ord('A') + place % 26)} · {name}" for place, name in enumerate(short)]


def differences(runs: Sequence[LoadedRun]) -> dict[str, list[Any]]:
    """Return the fields in which the recipes differ, each with its value in every run; None where a run does not have it."""
    from transformers.utils.generic import flatten_dict

    recipes = [flatten_dict(run.recipe.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in HOUSEKEEPING)
    rows = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: row for key, row in rows.items() if any(one != row[0] for one in row[1:])}


def shown(value: Any) -> str:
    """Write a field's value as a recipe has it; of data sources their paths."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "path" in one for one in value):
        value = ", ".join(str(one["path"]) for one in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:299]}…"
