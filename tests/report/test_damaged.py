"""A damaged file ends a report by its name and first wrong field, or the page says what of it is left out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_lite.common.errors import RequestError
from orpo_lite.report import as_json
from orpo_lite.report.page import run_page
from orpo_lite.trainer.run_record import read_run
from tests.report.conftest import NAN, evaluation, facts, log_lines, pairs
from tests.report.test_content import Page

RUN: dict[str, Any] = json.loads(Path(__file__).with_name("short_run.json").read_text("utf-8"))
"""A real run.json, of four steps on the CPU, its lists cut short; with what none there had: a plan and remarks."""
RUN["plan"] = {
    "recipe": "mine", "model": "org/base", "peak_bytes": 9e9, "needed_bytes": 10e9, "fullest_phase": "forward",
    "phases": {"forward": {"base weights": 8e9, "total": 8e9}}, "assumed": {"CUDA context": 1e9},
    "measured": {"allocated_bytes": 8e9, "reserved_bytes": 9e9}, "error": 0.125,
}  # fmt: skip
RUN |= {"warnings": [{"kind": "loss spike", "step": 7, "message": "it rose"}], "overflow_steps": 2,
        "out_of_memory": {"training": [{"pairs": 4}], "evaluation": []}}  # fmt: skip
RUN["data"]["drops"] |= {"dropped": {"empty prompt": 3}, "notes": ["a note"]}
LINES = [*log_lines(2), {"step": 2, "eval_loss": 1.2, "eval_rewards/accuracies": 0.6}]
SECTIONS = {"part-held-out-pairs": "eval", "part-answers": "samples", "part-training": "", "part-data": "data", "part-run": "",
            "part-memory-": "plan", "part-next-steps": ""}  # fmt: skip
"""Of the page, and the field of run.json without which each of them is not there."""


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*place, key))


def damaged(value: Any, place: tuple, new: Any) -> Any:
    """A copy with another value there; `...` takes it out."""
    found = copy.deepcopy(value)
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    if new is ...:
        del inside[place[-1]]
    else:
        inside[place[-1]] = new
    return found


def drawn(folder: Path) -> tuple[str, dict[str, Any]]:
    """The page of a run folder, and what --json prints of it."""
    run = read_run(folder)
    said = json.loads(as_json([run]), parse_constant=lambda word: pytest.fail(word))
    return run_page(run).decode("utf-8"), said["runs"][0]


WRONG = [..., None, "x", {"a": None}, NAN]


@pytest.mark.slow
@pytest.mark.parametrize("new", WRONG, ids=["removed", "null", "text", "object", "nan"])
def test_every_single_damage_to_run_json(new, written, tmp_path):
    """Each ends in an error that names the file and a field on the way there, or in a page."""
    folder = written(tmp_path / "run", RUN, LINES, held={"beta": 0.1} | {w: {k: v[:3] for k, v in pairs()[w].items()} for w in ("before", "after")})  # fmt: skip
    whole, said = drawn(folder)
    assert not said["notes"] and all(name in whole for name in SECTIONS)
    count = refused = 0
    for place in places(RUN):
        (folder / "run.json").write_text(json.dumps(damaged(RUN, place, new)), "utf-8")
        count += 1
        try:
            shown, said = drawn(folder)
        except RequestError as error:
            assert f"{folder / 'run.json'}: {place[0]}" in str(error) and "copy the run again" in str(error), place
            refused += 1
            continue
        gone = {top for name, top in SECTIONS.items() if name not in shown}
        assert gone <= {place[0]} and shown.endswith("</html>"), place
        assert "None" not in re.sub("<style.*?</style>|<script.*?</script>", "", shown), place
    assert count > 150 and (refused > 40 or new is ...)


def test_every_single_damage_to_the_other_files(written, tmp_path):
    held = {"beta": 0.1} | {w: {k: v[:3] for k, v in pairs()[w].items()} for w in ("before", "after")}
    folder = written(tmp_path / "run", RUN, LINES, held)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    before = {"eval": evaluation(0.5, 0.0), "samples": [{"prompt": "Why?", "answer": "So.", "logp": -1.0}]}
    files = {"held_out.json": (held, json.dumps), "recipe.yaml": (recipe, yaml.safe_dump), "before.json": (before, json.dumps),
             "metrics.jsonl": (LINES[0] | LINES[-1], json.dumps)}  # fmt: skip
    for name, (content, as_text) in files.items():
        if name == "before.json":
            (folder / "run.json").unlink()
        (folder / name).write_text(as_text(content), "utf-8")
        kept = (folder / name).read_text("utf-8")
        for place in places(content):
            for new in [*WRONG[:-1], [None], 10**30]:
                (folder / name).write_text(as_text(damaged(content, place, new)), "utf-8")
                try:
                    shown, _ = drawn(folder)
                except RequestError as error:
                    assert name != "metrics.jsonl" and str(folder / name) in str(error), (place, new)
                else:
                    assert "part-next-steps" in shown and shown.endswith("</html>"), (name, place, new)
        (folder / name).write_text(kept, "utf-8")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "left out of metrics.jsonl, as not readable: 1 line; the first is line 31"),
        ('{"step": 5, "loss": 1%s}' % ("0" * 400), "not finite, of ORPO loss: 1 value (step 5)"),
        ('{"step": 1e400, "loss": 1}', "the first is line 31"),
        ('{"epoch": 1, "loss": 2}', "the first is line 31"),
        ("[1]", "the first is line 31"),
        ('{"step": 5, "loss": "1.2"}', "ORPO run"),
        ('{"step": 5, "loss": 5e-324, "grad_norm": 1e-320, "nll_loss": 1e40}', "ORPO run"),
    ],
    ids=["deep", "huge", "step", "no step", "list", "text", "tiny"],
)  # fmt: skip
def test_a_line_of_metrics(line, said, written, tmp_path):
    folder = written(tmp_path / "run", lines=log_lines(30))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    shown = Page(drawn(folder)[0])
    assert said in shown.text and not shown.inside
    loss = shown.charts["loss"]["lines"][0]
    assert len([y for y in loss["y"] if y is not None]) == 30 + line.endswith("1e40}")  # all other lines are drawn


def test_what_is_unknown_is_not_said_to_be_none(written, tmp_path):
    """A run whose adapter, results or drops are not known did not train without them."""
    folder = written(tmp_path / "run", damaged(RUN, ("eval", "after"), ...), LINES)
    assert "reward accuracy before or after was not recorded" in drawn(folder)[0]
    written(folder, damaged(RUN, ("data", "drops", "dropped"), ...), LINES)
    assert "No row was left out" not in drawn(folder)[0]
    recipe = (folder / "recipe.yaml").read_text("utf-8")
    (folder / "recipe.yaml").write_text(recipe.replace("{r: 16, alpha: 32.0}", "yes please"), "utf-8")
    with pytest.raises(RequestError, match="adapter: found 'yes please'"):
        drawn(folder)


def test_files_that_are_no_json(written, tmp_path):
    folder = written(tmp_path / "run", RUN, LINES)
    for name in ("held_out.json", "run.json"):
        for content in ("[" * 100_000, "\0\0", '{"before": ', "\ud800"):
            (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
            with pytest.raises(RequestError, match=rf"{re.escape(name)} is broken JSON .*copy the run again"):
                drawn(folder)
        (folder / name).write_text("[1]")
        with pytest.raises(RequestError, match=rf"{re.escape(name)}: Input should be a valid dictionary.*found \[1\]"):
            drawn(folder)


def test_the_first_wrong_field_is_named(written, tmp_path):
    folder = written(tmp_path / "run", facts(versions={f"library {place}": place for place in range(100)}))
    with pytest.raises(
        RequestError, match=r"run\.json: versions\.library 0: Input should be a valid string, found 0: "
    ):
        drawn(folder)
