"""report.html: one self-contained page of a run, or of several over one another, which opens offline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.report.charts import as_data
from orpo_lite.report.document import document
from orpo_lite.report.run_record import Told, known, read_run
from orpo_lite.report.run_shapes import FACTS, LINE
from orpo_lite.report.words import verdict
from orpo_lite.trainer.run_folder import RunFolder

__all__ = ["command", "document", "page", "verdict", "write_report"]


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder from what the run recorded, and return its path.

    Raises:
        RequestError: there is nothing to report yet, or what is there is broken.
    """
    path = folder.path / "report.html"
    write_atomically(path, encoded(run_page(read_run(folder))))
    return path


def page(facts: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """The page of a run by run.json's content and metrics.jsonl's lines alone.

    Everything that comes from data or models is escaped.
    """
    notes: list[str] = []
    told = Told(known(facts, FACTS, "run.json", notes), [known(line, LINE, "metrics.jsonl", notes) for line in metrics])
    told.notes = notes
    return run_page(told)


def run_page(run: Told) -> str:
    from orpo_lite.report import sections

    held, held_charts = sections.results(run)
    training, curves = sections.training(run)
    data, lengths = sections.data(run)
    parts = [
        sections.header(run),
        held,
        sections.answers(run),
        training,
        sections.memory(run),
        data,
        sections.details(run),
    ]
    charts = held_charts + curves + lengths
    body = f"<main>{''.join(parts)}{sections.go_on(run)}</main>{footer([run])}"
    return document(f"ORPO run {run.name}", body, as_data(charts) if charts else None)


def compare_page(runs: Sequence[Told]) -> str:
    from orpo_lite.report.compare import comparison

    body, charts = comparison(runs)
    title = "ORPO runs: " + ", ".join(run.name for run in runs)
    return document(title[:200], f"<main>{body}</main>{footer(runs)}", as_data(charts) if charts else None)


def encoded(content: str) -> bytes:
    """UTF-8; half surrogates, which data may hold and UTF-8 does not know, as the browser's replacement character."""
    return content.encode("utf-8", "xmlcharrefreplace")


def footer(runs: Sequence[Told]) -> str:
    from html import escape

    versions = {str((run.facts.get("versions") or {}).get("orpo-lite") or "") for run in runs} - {""}
    trained = f" Trained with orpo-lite {escape(', '.join(sorted(versions)))}." if versions else ""
    return f"<footer>Made by orpo-lite; this file needs no network.{trained}</footer>"


def as_json(runs: Sequence[Told]) -> dict[str, Any]:
    """What the pages are made of: facts, verdict and state of each run, and where recipes differ."""
    from orpo_lite.report.compare import differing
    from orpo_lite.report.curves import margins
    from orpo_lite.report.words import sentence

    told = [
        {"path": str(run.path), "state": run.state, "verdict": sentence(run), "checkpoint": run.checkpoint, "notes": run.notes,
         "log_lines": len(run.metrics), "last": run.metrics[-1] if run.metrics else None, "facts": run.facts, "recipe": run.recipe,
         "margins": {when: margins(run, when) for when in ("before", "after")}}
        for run in runs
    ]  # fmt: skip
    return finite({"runs": told, "differences": differing(runs)})


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command(
    runs: Annotated[list[str], typer.Argument(help="run folder, finished or not; several are laid over one another")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="file to write; default: report.html in the run folder, of several compare.html in the first"
        ),
    ] = None,
    json_too: Annotated[bool, typer.Option("--json", help="print the facts as JSON; no page is written")] = False,
) -> None:
    """Write a run's report.html, or the comparison of several runs."""
    told = [read_run(run) for run in runs]
    if json_too:
        print(json.dumps(as_json(told), indent=1, allow_nan=False))
        return
    assert told[0].path is not None
    path = output or told[0].path / ("report.html" if len(told) == 1 else "compare.html")
    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(f"--output: found {str(path)!r}, expected the name of a file in a folder that is there")
    try:
        write_atomically(path, encoded(run_page(told[0]) if len(told) == 1 else compare_page(told)))
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): give another place with --output") from None
    console.print(str(path), soft_wrap=True, markup=False)
