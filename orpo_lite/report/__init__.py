"""report.html: one self-contained page of a run, or of several over one another, which opens offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic_core import to_json

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import LoadedRun, read_run

__all__ = ["command", "write_report"]


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder from what the run recorded, and return its path.

    Raises:
        RequestError: there is nothing to report yet, or what is there is broken.
    """
    from orpo_lite.report.page import run_page

    path = folder.path / "report.html"
    write_atomically(path, run_page(read_run(folder)))
    return path


def as_json(runs: Sequence[LoadedRun]) -> str:
    """Return everything that the pages are made from: facts, verdict and state of each run, and where recipes differ."""
    from orpo_lite.report.charts import margins
    from orpo_lite.report.page import differences, verdict

    content = [
        {"path": run.path, "state": run.state, "verdict": verdict(run), "checkpoint": run.checkpoint, "notes": run.notes,
         "log_lines": len(run.metrics), "last": run.metrics[-1] if run.metrics else None, "facts": run.record,
         "recipe": run.recipe, "margins": {when: margins(run, when) for when in ("before", "after")}}
        for run in runs
    ]  # fmt: skip
    # JSON has no word for NaN and the infinities
    return to_json({"runs": content, "differences": differences(runs)}, indent=1, inf_nan_mode="null").decode()


def command(
    runs: Annotated[list[str], typer.Argument(help="run folder, finished or not; several are compared")],
    output: Annotated[Path | None, typer.Option(help="file to write; default: report.html in the run folder, or for "
        "several compare.html in the first")] = None,
    json_too: Annotated[bool, typer.Option("--json", help="print the facts as JSON; no page is written")] = False,
) -> None:  # fmt: skip
    """Write a run's report.html, or the comparison of several runs."""
    from orpo_lite.report.page import compare_page, run_page

    loaded = [read_run(run) for run in runs]
    if json_too:
        print(as_json(loaded))
        return
    path = output or loaded[0].path / ("report.html" if len(loaded) == 1 else "compare.html")
    try:
        write_atomically(path, run_page(loaded[0]) if len(loaded) == 1 else compare_page(loaded))
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}): give another place with --output") from None
    console.print(str(path), soft_wrap=True, markup=False)
