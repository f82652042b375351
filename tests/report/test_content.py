"""What the report says: every part from the run's files, whatever of them is missing, strange or long."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import lock_folder, unlock_folder
from orpo_lite.report import command, write_report
from orpo_lite.report.charts import histogram
from orpo_lite.report.drawing import Chart, Line, running_mean
from orpo_lite.report.drawing import written as plain
from orpo_lite.report.page import few_pairs, told_apart, verdict
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import read_run
from tests.report.conftest import NAN, evaluation, facts, log_lines

VOID = {"meta", "br", "wbr", "path", "rect", "input", "img", "link", "hr"}


class Page(HTMLParser):
    """Text by the element that it is in, headings, attributes, and the data for the script."""

    def __init__(self, content: str):
        super().__init__()
        self.inside: list[str] = []
        self.text, self.code, self.data, self.scripts = "", "", "", []
        self.headings: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.inside.append(tag)
        if re.fullmatch("h[1-4]", tag):
            self.headings.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.inside and self.inside.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "script" in self.inside:
            self.scripts.append(data)
        elif "style" not in self.inside:
            self.text += data
            if any(re.fullmatch("h[1-4]", one) for one in self.inside):
                self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
            if "pre" in self.inside:
                self.code += data

    @property
    def charts(self) -> dict[str, Any]:
        return {one["key"]: one for one in json.loads(self.scripts[0])["charts"]}


def told(folder: Path) -> Page:
    return Page(write_report(RunFolder.open(folder)).read_text("utf-8"))


def test_every_part_is_there(written, tmp_path):
    shown = told(written(tmp_path / "run"))
    sections = [name for tag, name in shown.headings if tag == "h2"]
    assert sections == ["Held-out pairs", "Answers", "Training", "Data", "Run", "Next steps"]
    assert set(shown.charts) == {"margins", "loss", "rewards", "margin", "accuracy", "log-odds", "learning-rate", "gradient-norm",
                                 "tokens", "memory"}  # fmt: skip
    for words in ("from 50.0% to 90.0% on 40 pairs: clearly more than chance", "90.0% (85.0% to 95.0%)", "empty prompt", "15", "a note",
                  "prompt cut in 3 pairs", "LoRA r=16, alpha=32", "67 min", "9.50 GB", "loss spike. it rose", "What is 2 + 2?", "Five.",
                  "mean log-prob -0.250, log-odds 1.26", "trained: -2.000, -1.85", "f00d", "a made-up run"):  # fmt: skip
        assert words in shown.text, words
    run = tmp_path / "run"
    for line in (
        f"python -m orpo_lite.evaluate {run}",
        f"chat {run} --compare",
        f"merge {run} --output {run}-merged",
        "export",
        "push",
    ):
        assert line in shown.code, line
    loss = {line["n"]: line["y"] for line in shown.charts["loss"]["lines"]}
    lines = log_lines(30)
    assert loss["ORPO loss"][0] == pytest.approx(lines[0]["loss"], rel=1e-4)
    # the parts add up where they do in the metrics: odds term = -beta * log_odds_ratio
    assert loss["odds term"][0] == pytest.approx(-0.1 * lines[0]["log_odds_ratio"], rel=1e-4)
    held = next(line for line in shown.charts["accuracy"]["lines"] if line["n"].endswith("held out"))
    low, high = held["band"][0]  # of 20 of 40, Wilson's by hand
    assert (low, high) == (pytest.approx(0.352, abs=1e-3), pytest.approx(0.648, abs=1e-3))


def accuracies(before: float, after: float, pairs: int) -> dict[str, Any]:
    return {"before": evaluation(before, 0.0, pairs=pairs), "after": evaluation(after, 0.2, pairs=pairs)}


@pytest.mark.parametrize(
    ("held", "said"),
    [
        # the intervals by hand: 6 of 8 is 0.409 to 0.929, 8 of 8 is 0.676 to 1
        (accuracies(0.75, 1.0, 8), "on 8, an accuracy of 100.0% may be anything from 67.6% to 100.0%, so the change from the 75.0% before training may be chance. About 27 pairs would be enough"),
        (accuracies(0.0, 1.0, 8), "on 8, an accuracy of 100.0% may be anything from 67.6% to 100.0%. About 16 pairs would be enough"),
        (accuracies(1.0, 1.0, 1), "on 1, an accuracy of 100.0% may be anything from 20.7% to 100.0%. About 16 pairs"),
        (accuracies(0.7, 0.6, 200), "so the change from the 70.0% before training may be chance. About"),
        (accuracies(0.6, 0.61, 2000), "on 2,000, an accuracy of 61.0% may be anything from 58.8% to 63.1%, so the change from the 60.0% before training may be chance. It would take more than 10,000 pairs at these"),
        ({"before": evaluation(0.5, 0.0, pairs=10), "after": None}, "on 10, an accuracy of 50.0% may be"),
        (accuracies(0.5, 0.9, 120), ""),
        (accuracies(NAN, 0.9, 8), ""),
        (accuracies(0.5, 0.9, 0), ""),
        ({"before": None, "after": None}, ""),
    ],
)  # fmt: skip
def test_too_few_pairs_are_said_with_how_many_would_do(held, said, written, tmp_path):
    folder = written(tmp_path / "run", facts(eval=held))
    command([str(folder), str(folder)], output=tmp_path / "two.html")
    for content in (
        write_report(RunFolder.open(folder)).read_text("utf-8"),
        (tmp_path / "two.html").read_text("utf-8"),
    ):
        notes = re.findall("<p class=few role=note>(.*?)</p>", content)
        assert bool(notes) == bool(said) and all(said in note for note in notes), notes
        if "About" in said and "16" in said:  # what is enough is: no note any more
            assert not few_pairs(read_run(written(tmp_path / "enough", facts(eval=accuracies(0.0, 1.0, 16)))))


def test_the_note_agrees_with_the_verdict(written, tmp_path):
    for pairs in (5, 40, 93, 150):
        for after in (0.4, 0.5, 0.6, 1.0):
            run = read_run(written(tmp_path / "run", facts(eval=accuracies(0.5, after, pairs))))
            by_chance = few_pairs(run).get("lack") == "difference"
            assert by_chance == (after != 0.5 and not told_apart(0.5, after, pairs))
            assert after <= 0.5 or by_chance == ("within what chance" in verdict(run))


def test_numbers_and_their_units_agree(written, tmp_path):
    """One is one pair, and no unit is said twice."""
    held = {"before": {"logps/chosen": [-1.0], "logps/rejected": [NAN]}, "after": {"logps/chosen": [-1.0], "logps/rejected": [-2.0]}}  # fmt: skip
    known = facts(eval=accuracies(0.0, 1.0, 1), overflow_steps=1, out_of_memory={"training": [{}], "evaluation": []})
    known["data"]["drops"] |= {"truncated": {"prompt": 1, "completion": 1}}
    known["samples"]["after"][0]["tokens"] = 1
    lines = log_lines(9)
    lines[4]["loss"] = NAN
    folder = written(tmp_path / "run", known, lines, held)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{")
    command([str(folder), str(folder)], output=tmp_path / "two.html")
    for shown in (told(folder), Page((tmp_path / "two.html").read_text("utf-8"))):
        words = " ".join(shown.text.split())
        assert not re.search(
            r"(?<![\d.,%])\b1 (\w+ )?(pairs|values|lines|margins|times|overflows|tokens|are)\b", words
        ), words
        assert not re.search(r"\b([a-z]{3,}) \1\b", words), words  # "pairs pairs"
    assert "1 token" in words or "1 pair" in words


def test_the_plan_stands_beside_what_was_measured(written, tmp_path):
    def page(run):
        return write_report(RunFolder.open(written(tmp_path / "run", run))).read_text("utf-8")

    plan = {"recipe": "mine", "model": "base", "peak_bytes": 6e9, "needed_bytes": 7e9, "fullest_phase": "backward", "assumed": {},
            "phases": {"load": {"weights": 3e9, "total": 3e9}, "backward": {"weights": 3e9, "<i>kept": 3e9, "total": 6e9}}}  # fmt: skip
    assert "Memory: " not in page(facts(plan=None))
    text = page(facts(plan=plan))
    assert "Memory: the plan</h2>" in text and "&lt;i&gt;kept" in text and "<i>kept" not in text
    text = page(facts(plan=plan | {"measured": {"allocated_bytes": 5e9, "reserved_bytes": 6e9}}))
    assert "6.00 GB in tensors were planned, 5.00 GB measured: the plan was 20.0% over" in text


def test_margins_are_of_each_pair(written, tmp_path):
    held = {"beta": 0.1, "before": {"logps/chosen": [-2.0, -2.0, -1.0, -1.0], "logps/rejected": [-1.0, -1.0, -2.0, -2.0]},
            "after": {"logps/chosen": [-1.0, -3.0, -1.0, NAN], "logps/rejected": [-2.0, -1.0, -2.0, -2.0]}}  # fmt: skip
    shown = told(written(tmp_path / "run", held=held))
    assert "not finite, and left out: 1 margin after" in shown.text
    sums = {line["n"]: sum(line["y"]) for line in shown.charts["margins"]["lines"]}
    assert sums == {"before": 4, "after": 3}
    old = told(written(tmp_path / "old", held=None))
    assert (
        (tmp_path / "old" / "report.html").is_file() and "was not recorded" in old.text and "margins" not in old.charts
    )


@pytest.mark.parametrize("missing", [*facts(), "all"])
def test_a_run_of_an_older_version(missing, written, tmp_path):
    """Whatever run.json does not have is left out, or is nothing, and the rest is there."""
    known = {} if missing == "all" else {k: v for k, v in facts().items() if k != missing}
    assert "Next steps" in told(written(tmp_path / "run", known)).text


def test_a_run_folder_of_version_0_1(tmp_path):
    """Written by the last commit before run.json had a model."""
    folder = shutil.copytree(Path(__file__).parents[1] / "fixtures" / "run_15425f3", tmp_path / "run")
    shown = told(folder)
    assert "from 75.0% to 100.0% on 8 pairs" in shown.text
    assert {"margins", "loss"} <= set(shown.charts)


def test_one_log_line_no_evaluation_full_fine_tuning(written, tmp_path):
    folder = written(
        tmp_path / "run",
        facts(eval={"before": None, "after": None}, samples={"before": [], "after": []}),
        log_lines(1),
        None,
    )
    recipe = (folder / "recipe.yaml").read_text().replace("{r: 16, alpha: 32.0}", "null").replace("nf4", "none")
    (folder / "recipe.yaml").write_text(recipe)
    shown = told(folder)
    assert "no pairs were held out" in shown.text and "none: full fine-tuning" in shown.text
    assert (
        "orpo_lite.merge" not in shown.code and "orpo_lite.evaluate" not in shown.code and "--compare" not in shown.code
    )
    assert "orpo_lite.export" in shown.code
    assert shown.charts["loss"]["lines"][0]["y"] and "Held-out" not in [name for _, name in shown.headings]
    none = told(written(tmp_path / "none", lines=[], held=None))
    assert "metrics.jsonl holds no metric to draw" in none.text and not none.scripts


def test_values_that_are_not_finite_are_gaps_and_said(written, tmp_path):
    lines = log_lines(20)
    lines[4]["loss"], lines[5]["loss"], lines[7]["grad_norm"] = NAN, math.inf, NAN
    run = facts(eval={"before": evaluation(0.5, 0.0), "after": evaluation(NAN, NAN, nll_loss=math.inf)})
    shown = told(written(tmp_path / "run", run, lines))
    assert "not finite, of ORPO loss: 2 values (step 5, 6)" in shown.text and "is not a number" in shown.text
    assert shown.charts["loss"]["lines"][0]["y"][4:6] == [None, None]
    assert "NaN" not in shown.scripts[0] and "Infinity" not in shown.scripts[0]


def test_a_long_run(written, tmp_path):
    """Ten thousand pairs, three epochs, every step logged."""
    lines = log_lines(3750)
    lines[3210]["loss"] = 77.0
    shown = told(written(tmp_path / "run", lines=lines))
    assert (tmp_path / "run" / "report.html").stat().st_size < 3_000_000
    faint, mean = shown.charts["loss"]["lines"][:2]
    assert 77.0 in faint["y"] and len(faint["y"]) == 3750 and max(mean["y"]) < 3


def test_a_run_under_way_and_one_that_stopped(written, tmp_path):
    folder = written(tmp_path / "run", None, log_lines(12), None)
    assert "This run was stopped before its end, its last log line at step 12" in told(folder).text
    (folder / "checkpoints" / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-10").mkdir()
    (folder / "before.json").write_text(
        json.dumps({"eval": evaluation(0.5, 0.0), "samples": [{"prompt": "Why?", "answer": "So."}]})
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 1.')  # killed here
    shown = told(folder)
    assert f"train --recipe {folder} --resume" in shown.code and "resume from checkpoint-10" in shown.code
    assert (
        "Why?" in shown.text
        and "50.0%" in shown.text
        and "left out of metrics.jsonl, as not readable: 1 line;" in shown.text
    )
    lock_folder(folder)
    try:
        assert "This run is under way" in told(folder).text
    finally:
        unlock_folder(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "before.json").unlink()
    with pytest.raises(RequestError, match=r"neither run\.json nor a line in metrics\.jsonl"):
        told(folder)
    with pytest.raises(RequestError, match=r"no recipe\.yaml"):
        RunFolder.open(tmp_path)


def test_runs_over_one_another(written, tmp_path, capsys):
    first, second = written(tmp_path / "a" / "run"), written(tmp_path / "b" / "run", beta=0.3, rate=5e-6, name="mine")
    third = written(tmp_path / "c", None, log_lines(5), None)
    command([str(first), str(second), str(third)])
    path = Path(capsys.readouterr().out.strip())
    assert path == first / "compare.html"
    shown = Page(path.read_text("utf-8"))
    for words in ("A · a/run", "B · b/run", "orpo.beta", "0.3", "training.learning_rate", "5e-06", "stopped", "50.0% → 90.0%",
                  "scaled by orpo.beta, which differs"):  # fmt: skip
        assert words in shown.text, words
    assert "output_dir" not in shown.text
    assert max(len(line["y"]) for line in shown.charts["loss-0"]["lines"]) == 30
    names = [line["n"] for line in shown.charts["loss-0"]["lines"]]
    assert len(names) == 5 and len(set(names)) == 5
    classes = [a["class"] for t, a in shown.elements if t == "g" and "data-line" in a and "solid" in str(a["class"])]
    assert classes  # one solid and one dashed, not colors alone
    assert "f00d" not in shown.text and "not trained on the same data" not in shown.text
    written(tmp_path / "c", data=facts()["data"] | {"fingerprint": "beef"})
    command([str(first), str(third)], output=tmp_path / "two.html")
    assert "not trained on the same data" in (tmp_path / "two.html").read_text("utf-8")


def test_as_json(written, tmp_path, capsys):
    folder = written(tmp_path / "run", facts(rule={"before": {"chosen": NAN}}))
    command([str(folder)], json_too=True)
    said = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    one = said["runs"][0]
    assert one["state"] == "finished" and one["facts"]["eval"]["after"]["rewards/accuracies"] == 0.9
    assert (
        len(one["margins"]["after"]) == 40
        and one["recipe"]["orpo"]["beta"] == 0.1
        and one["facts"]["rule"]["before"]["chosen"] is None
    )
    assert not (folder / "report.html").exists()


def test_where_it_cannot_be_written(written, tmp_path):
    folder = written(tmp_path / "run")
    for place in (tmp_path, tmp_path / "none" / "x.html"):
        with pytest.raises(RequestError, match="cannot be written .*--output"):
            command([str(folder)], output=place)


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028'\"><!-- \ud800 \u202e"


def test_text_stays_text_in_page_and_data(written, tmp_path):
    run = facts(name=HOSTILE, adapter=HOSTILE, device=HOSTILE)
    run["samples"]["after"][0]["answer"] = HOSTILE
    run["samples"]["before"][0]["prompt"] = run["samples"]["after"][0]["prompt"] = HOSTILE
    run["data"]["drops"]["dropped"] = {HOSTILE: 3}
    run["base_model"]["name_or_path"] = HOSTILE
    folder = written(tmp_path / "run", run)
    shown = told(folder)
    assert [a for t, a in shown.elements if t == "script"] == [{"type": "application/json", "id": "charts-data"}, {}]
    assert not [t for t, _ in shown.elements if t in ("img", "link", "iframe")]
    assert all(re.fullmatch("#part-[a-z-]+", str(a["href"])) for t, a in shown.elements if t == "a")
    command([str(folder), str(written(tmp_path / "other"))], output=tmp_path / "two.html")
    content = (tmp_path / "two.html").read_text("utf-8")
    two = Page(content)
    assert len([t for t, _ in two.elements if t == "script"]) == 2 and not [t for t, _ in two.elements if t == "img"]
    (text, _) = two.scripts
    assert json.loads(text)["charts"][0]["lines"][0]["n"].startswith(f"A · {HOSTILE[:40]}")
    assert not re.search("[<>&\u2028]", text)


def test_nothing_but_its_own_script_may_run(written, tmp_path):
    import base64
    import hashlib

    shown = told(written(tmp_path / "run"))
    policy = next(
        a["content"] for t, a in shown.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(shown.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_names_of_any_length(written, tmp_path):
    long = "x" * 5000
    shown = told(written(tmp_path / "run", facts(name=long, base_model={"name_or_path": f"org/{long}"})))
    assert long in shown.text


def test_structure_for_screen_readers(written, tmp_path):
    shown = told(written(tmp_path / "run"))
    levels = [int(tag[1]) for tag, _ in shown.headings]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(a.get("scope") in ("row", "col") for t, a in shown.elements if t == "th")
    figures = [a for t, a in shown.elements if t == "svg" and a.get("role") == "img"]
    assert len(figures) == len(shown.charts)
    for one in figures:
        assert one["tabindex"] == "0" and len(str(one["aria-label"])) > 40
    label = next(str(one["aria-label"]) for one in figures if str(one["aria-label"]).startswith("Learning rate"))
    assert "from 9.667e-05 at 1 to 0 at 30" in label
    assert dict(shown.elements)["html"] == {"lang": "en"}


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_running_mean_by_hand():
    points = [(1.0, 1.0), (2.0, NAN), (3.0, 3.0), (4.0, 8.0)]
    assert running_mean(points, 2) == [(3.0, 2.0), (4.0, 5.5)]


def test_histogram_counts_every_finite_value_once():
    values = {"a": [0.1 * i for i in range(-20, 31)] + [NAN], "b": [3.0]}
    edges, counts = histogram(values)
    assert sum(counts["a"]) == 51 and sum(counts["b"]) == 1 and any(abs(edge) < 1e-12 for edge in edges)
    edges, counts = histogram({"a": [2.0, 2.0]})
    assert sum(counts["a"]) == 2 and edges[0] < 2 < edges[-1]


def test_plain_numbers():
    assert [plain(v) for v in (0.0, 1e-5, 0.123456, 12, 1234.5, 1e9)] == [
        "0",
        "1e-05",
        "0.1235",
        "12",
        "1,234",
        "1e+09",
    ]
    assert plain(0.5, "%") == "50%" and plain(0.123, "%") == "12.3%" and plain(NAN) == "not a number"


def test_a_flat_line_has_room():
    chart = Chart("x", "X", [Line("a", [(5.0, 3.0)])])
    x0, x1, y0, y1 = chart.domain
    assert x0 < 5 < x1 and y0 < 3 < y1
