"""The page: its buttons are commands, it answers nobody without the token, and leads from pairs to a rated answer."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import find_recipe
from orpo_lite.train import ui
from tests.docs.blocks import parser, words_of
from tests.report.browser import CHROMIUM, Browser
from tests.report.test_browser import CONTRAST

VALUES = {"data": "", "more": "", "recipe": "quickstart", "model": "builtin:quickstart/model", "card": "",
          "run": "outputs/my run", "file": "preferences.jsonl", "tokens": 256, "temperature": 0, "message": "", "blind": False,
          "answer1": "", "answer2": "", "mine": "", "prompts": "p.txt", "must": "", "sampled": "sampled.jsonl", "folder": "", "gguf": "", "quant": "q8_0", "repo": "me/it", "part": "adapter",
          "sight": "private"}  # fmt: skip
"""What the fields hold on a page that has just trained."""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ui.Page]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    page = ui.Page(MagicMock(), tmp_path / "out")
    assert page.fields == list(VALUES)
    yield page
    page.close()


def shown(page: ui.Page, **changed: Any) -> dict[str, str]:
    """The command beside each button."""
    lines = page.lines(*(VALUES | changed).values())
    return {name: html.unescape(re.sub("<.*?>", "", line)) for name, line in zip(page.commands, lines, strict=True)}


def test_buttons_are_commands_with_what_the_fields_hold(page: ui.Page) -> None:
    lines = shown(page)
    assert lines["start"] == "orpo-lite train --recipe quickstart" and lines["resume"] == f"{lines['start']} --resume"
    assert lines["merge"] == "orpo-lite merge 'outputs/my run' --output 'outputs/my run-merged'"
    changed = {"data": "my $(touch x).jsonl", "more": "orpo.beta=0.2\n\n data.columns.prompt=q {x}", "card": "rtx-3060", "blind": True,
               "part": "GGUF file", "gguf": "it.gguf", "sight": "public", "temperature": 0.7}  # fmt: skip
    more = shown(page, **changed)
    assert more["plan"] == ("orpo-lite plan --recipe quickstart 'data.train=my $(touch x).jsonl' orpo.beta=0.2 "
                            "'data.columns.prompt=q {x}' --gpu rtx-3060")  # fmt: skip
    assert "--blind --preferences preferences.jsonl --max-new-tokens 256 --temperature 0.7" in more["ask"]
    assert more["push"] == "orpo-lite push 'outputs/my run' --repo me/it --gguf it.gguf --public"
    made = "orpo-lite pairs 'outputs/my run' --prompts p.txt --must 'thanks?' --output sampled.jsonl"
    assert shown(page, must="thanks?")["sample"] == made
    (page.folder.parent / "quickstart-train.yaml").touch()
    assert shown(page, data="builtin:quickstart/train.jsonl")["write"].endswith("--output quickstart-train-2.yaml")
    for line in [*lines.values(), *more.values(), *shown(page, part="merged model").values()]:
        name, words = words_of(line)  # type: ignore[misc]
        parser(name).make_context(name, words)
    for name in ("merge", "export", "push"):
        assert lines[f"{name}_rehearsal"] == f"{lines[name]} --dry-run"


def run(page: ui.Page, name: str, pane: str, words: list[str]) -> list[str]:
    """Press a button that runs these words; what its pane shows, in turn."""
    page.commands[name] = words
    return [changes[page.part[pane]] for changes in page.press(name, pane, 80, *VALUES.values())]


def test_what_is_shown_is_run_and_its_output_can_do_nothing(page: ui.Page) -> None:
    *_, last = run(page, "look", "data_pane", ["recipes", "--json"])
    job = page.jobs["data_pane"]
    assert [job.args[1:], job.returncode] == [["-m", "orpo_lite", *shlex.split(shown(page)["look"])[1:]], 0]
    assert (
        "$ orpo-lite recipes --json" in html.unescape(last)
        and "&quot;recipe&quot;: &quot;quickstart&quot;" in last
        and ">done<" in last
    )
    *_, last = run(page, "look", "data_pane", ["train", "--recipe", "<img src=x onerror=alert(1)>"])
    assert "ended with status 2" in last and "no recipe of this name" in last and "<img" not in last


def test_one_command_at_a_time_and_no_push_without_its_dry_run(page: ui.Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeper(words: list[str], log: Path, columns: int) -> Any:
        log.write_text("")
        job = MagicMock(words=words, log=log, since=time.time(), returncode=None)
        job.poll.side_effect = lambda: job.returncode
        job.html.return_value, job.run.return_value = "running", None
        return job

    monkeypatch.setattr(ui, "Job", sleeper)
    push, file = ["push", "run", "--repo", "me/it", "--private"], page.folder.parent / "p.jsonl"
    page.models = models = MagicMock()
    page.start("train_pane", ["train", "--recipe", "quickstart"])
    models.shutdown.assert_called_once()  # their memory is the training's
    with pytest.raises(RequestError, match="still running: orpo-lite train --recipe quickstart"):
        page.start("train_pane", ["train", "--recipe", "quickstart"])
    said, asked, *_ = page.ask("run", "Hello?", False, 8, 0)
    assert "it needs the memory" in said and asked == {}
    page.stop()
    page.jobs["train_pane"].terminate.assert_called_once()
    page.jobs["train_pane"].returncode = 0
    with pytest.raises(RequestError, match="the dry run comes first"):
        page.start("push_pane", push)
    for status, words in ((None, push), (1, push), (0, [*push, "--merged"])):
        page.jobs.pop("push_pane", None)
        page.start("push_pane", [*push, "--dry-run"])
        page.jobs["push_pane"].returncode = status
        with pytest.raises(RequestError, match="the dry run comes first|still running"):
            page.start("push_pane", words)
    page.start("push_pane", push)
    page.jobs["push_pane"].returncode = 1
    with pytest.raises(RequestError, match="the dry run comes first"):  # one dry run, one push
        page.start("push_pane", push)
    assert not file.exists()


def test_output_of_a_terminal_as_html() -> None:
    text = ui.as_html("10%\r\x1b[1;31m100%\x1b[0m\n<b>${alert(1)} {{x}}\x1b]8;;http://x\x07 \u202e\x1b[2Jend\r\n")
    assert (
        re.match('<span style="[^"]*font-weight: bold">100%</span>\n', text)
        and "color: #" in text
        and text.endswith("\\u202eend")
    )
    assert "<b>" not in text and "${" not in text and "{{" not in text and "\x1b" not in text and "\u202e" not in text
    long = ui.as_html("\n".join(map(str, range(1000))))
    assert long.startswith("(600 earlier lines are not shown)\n600\n") and long.endswith("\n999")


def test_a_recipe_is_changed_in_a_file_of_ones_own(page: ui.Page) -> None:
    text = page.opened("quickstart")
    said, recipe = page.save(text.replace("beta: 0.1", "beta: 0.3"), "quickstart")
    assert recipe == "quickstart-mine.yaml" and "good" in said and Recipe.load(recipe).orpo.beta == 0.3
    said, recipe = page.save(page.opened(recipe).replace("beta: 0.3", "betta: 0.3"), recipe)
    assert recipe == "quickstart-mine.yaml" and "bad" in said and "did you mean" in said and "betta" in said
    assert page.opened("quickstart") == text and page.opened("nothing") == ""
    dropped = page.folder / "my.jsonl"
    for name in ("my.jsonl", "my-2.jsonl"):
        dropped.write_text(name)
        assert page.take(str(dropped)) == name and Path(name).read_text() == name


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize(("place", "pair"), [(0, "first"), (1, "second"), (2, "mine")])
def test_a_choice_becomes_a_pair(
    place: int, pair: str, blind: bool, page: ui.Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [("base", "Obviously.", None), ("adapter", "Certainly.", "cut after 9 tokens: --max-new-tokens")]
    form = SimpleNamespace(row=lambda turns, chosen, rejected: {"prompt": turns, "chosen": [{"role": "assistant", "content": chosen}],
                                                                "rejected": [{"role": "assistant", "content": rejected}]})  # fmt: skip
    monkeypatch.setattr(ui, "sides_of", lambda run: [SimpleNamespace(format=form)])
    monkeypatch.setattr(page, "with_models", lambda call, *given: found if call is ui.answer_both else call(*given))
    titles: list[str] = []
    page.gr.update.side_effect = lambda value, label: titles.append(label)
    assert page.rate(place, {}, "", "p.jsonl")[0].count("nothing to choose from") == 1
    said, asked, *_ = page.ask("run", "Which?", blind, 8, 0.0)
    first, second = (text for _, text, _ in asked["found"])
    assert titles[0] in (["1", "1 (cut after 9 tokens: --max-new-tokens)"] if blind else ["1 base"]) and not said
    said, after = page.rate(place, asked, "Gladly.", "p.jsonl")
    row = json.loads(Path("p.jsonl").read_text("utf-8"))
    better, worse = {"first": (first, second), "second": (second, first), "mine": ("Gladly.", "Certainly.")}[pair]
    assert [row["chosen"][0]["content"], row["rejected"][0]["content"]] == [better, worse] and after == {}
    assert "pair 1 of p.jsonl" in said and ("1 was" in said) is blind
    if place == 2:
        assert "makes no pair" in page.rate(2, asked, " ", "p.jsonl")[0]


def test_curves_and_the_folder_of_a_run(page: ui.Page, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": 0, "eval_loss": 0.9, "eval_rewards/margins": 0.0}, {"step": 5, "loss": 0.8, "rewards/margins": 0.1, "rewards/accuracies": 0.5},
             {"step": 10, "loss": float("nan"), "rewards/margins": 0.2, "rewards/accuracies": 0.75}]  # fmt: skip
    old, new = Path("outputs/quickstart"), Path("outputs/quickstart-2")
    job = ui.Job(["train", "--recipe", "quickstart", "--help"], page.folder / "x.log", 80)
    job.wait()
    for folder, since in ((old, -1000), (new, 1)):
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_bytes(find_recipe("quickstart").read_bytes())
        os.utime(folder, (job.since + since, job.since + since))
    assert job.run() == new
    (new / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ui.curves(old, page.folder / "curves.png") == ""  # nothing is logged yet
    page.jobs["train_pane"] = job
    page.part |= {"curves": "curves", "stop_line": "stop_line"}  # a mock makes one of all HTML
    *_, last = page.follow("train_pane")
    assert last[page.part["run"]] == str(new) and last[page.part["stop_line"]] == ""
    kind, _, data = re.fullmatch('<img alt="curves of quickstart-2" src="(.*)">', last[page.part["curves"]])[
        1
    ].partition(",")
    assert kind == "data:image/png;base64" and b64decode(data) == (page.folder / "curves.png").read_bytes()


def test_the_gate() -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app, key = FastAPI(), "s3cret"
    app.add_api_route("/{path:path}", lambda path: path, methods=["GET", "POST", "HEAD"])
    with TestClient(ui.Gate(app, key, "orpo_lite_1"), base_url="http://127.0.0.1:1", follow_redirects=False) as client:
        for path in ("/", "/config", "/gradio_api/call/lines", "/?token=", "/?token=wrong", "/x?token=é"):
            assert [client.get(path).status_code, client.post(path).status_code] == [403, 403], path
        answer = client.get(f"/?token={key}")
        assert (
            answer.status_code == 303
            and answer.headers["location"] == "/"
            and "httponly" in answer.headers["set-cookie"].lower()
        )
        answer = client.post("/gradio_api/call/lines", headers={"origin": "http://127.0.0.1:1"})
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
        for origin in ("http://127.0.0.1:2", "http://evil.example", "null", "https://127.0.0.1:1.evil.example"):
            assert client.post("/gradio_api/call/lines", headers={"origin": origin}).status_code == 403


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RequestError, match=r"needs gradio.*pip install 'orpo-lite\[ui\]'"):
        ui.command()


# ---- the whole way in a browser --------------------------------------------------------------------------------------


class Screen(Browser):
    """A browser that uses the page as a person would."""

    def see(self, address: str, width: int = 1280, dark: bool = False) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])  # fmt: skip
        self.events.clear()
        self("Page.navigate", url=address)
        self._until(lambda one: one.get("method") == "Page.loadEventFired", "load")
        self.wait("document.querySelectorAll('.buttons code').length > 10")

    def wait(self, script: str, seconds: float = 240) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.3)
        return found

    def click(self, name: str) -> None:
        self.run(f"document.querySelector('#{name}').click()")

    def text(self, name: str) -> str:
        return self.run(f"document.querySelector('#{name}').innerText")

    def says(self, name: str, *words: str) -> str:
        """The text of a part, once it holds one of some words."""
        self.wait(f"{json.dumps(words)}.some(word => document.querySelector('#{name}').innerText.includes(word))")
        return self.text(name)

    def write(self, name: str, text: str) -> None:
        self.run(f"(() => {{const e = document.querySelector('#{name} textarea, #{name} input');"
                 "Object.getOwnPropertyDescriptor(Object.getPrototypeOf(e), 'value').set.call(e, "
                 f"{json.dumps(text)}); e.dispatchEvent(new Event('input', {{bubbles: true}}))}})()")  # fmt: skip

    def value(self, name: str) -> str:
        return self.run(f"document.querySelector('#{name} textarea, #{name} input').value")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The origin of a page in a folder of its own, and its token; at the end it is stopped as Ctrl-C does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_lite", "ui", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    origin, token = re.fullmatch(
        r"open (http://127\.0\.0\.1:\d+)/\?token=(\S{32})\n", process.stdout.readline()
    ).groups()  # type: ignore[union-attr]
    yield origin, token
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (.ci/run does)")
def test_from_pairs_to_a_rated_answer(served: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    origin, token = served
    refuse_strangers(origin, token)
    rows = [{"prompt": f"What is {n} plus {n}?", "chosen": f"Certainly, {2 * n}.", "rejected": "${alert(1)} {{x}} <b>2</b>"} for n in range(9)]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    screen = Screen()
    try:
        screen.see(f"{origin}/?token={token}")
        assert token not in screen.run("location.href")
        drop(screen, tmp_path / "in" / "my.jsonl")
        screen.wait("document.querySelector('#data textarea').value == 'my.jsonl'")
        screen.wait("document.querySelector('#look').parentElement.innerText.includes('data.train=my.jsonl')")
        screen.click("look")
        said = screen.says("data_pane", "\ndone", "ended with")
        assert "Certainly" in said and "9" in said and "${alert(1)} {{x}} <b>2</b>" in said
        screen.click("write")
        screen.says("recipe_pane", "\ndone", "ended with")
        screen.wait("document.querySelector('#recipe input').value == 'quickstart-my.yaml'")
        screen.wait("document.querySelector('#text').innerText.includes('written by')")
        # the quickstart's own pairs from here on
        screen.see(origin)
        screen.click("plan")
        assert "GB in tensors" in screen.says("recipe_pane", "\ndone", "ended with")
        screen.write("more", "training.max_steps=400")  # long enough to be watched and stopped
        screen.wait("document.querySelector('#start').parentElement.innerText.includes('max_steps=400')")
        screen.click("start")
        screen.wait("document.querySelector('#curves img')?.naturalWidth > 600")
        screen.see(origin)  # a page that is opened again follows what runs
        screen.wait("document.querySelector('#curves img')?.naturalWidth > 600")
        screen.says("train_pane", "step 20:")  # stopped sooner, there would be nothing to resume
        screen.click("stop")
        assert "stopping after this step, with a checkpoint" in screen.says("train_pane", "ended with status 143")
        screen.wait("document.querySelector('#resume').parentElement.innerText.includes('quickstart')")
        screen.write("more", "training.max_steps=400")  # the page was opened again
        screen.wait("document.querySelector('#resume').parentElement.innerText.includes('max_steps=400')")
        screen.click("resume")
        screen.says("train_pane", "max_steps=400 --resume")
        assert "resuming from checkpoint" in screen.says("train_pane", "\ndone", "ended with")
        screen.wait("document.querySelector('#run textarea').value == 'outputs/quickstart'")
        screen.write("message", "How much is 4 plus 5?")
        screen.click("ask")
        screen.wait("document.querySelector('#answer2 textarea').value")
        answers = [screen.value("answer1"), screen.value("answer2")]
        assert answers[0] != answers[1] and screen.text("answer1").startswith("1 base")
        screen.click("better2")
        assert "pair 1 of preferences.jsonl" in screen.says("said", "kept", "makes no")
        kept = json.loads((tmp_path / "preferences.jsonl").read_text("utf-8"))
        assert [kept["chosen"][0]["content"], kept["rejected"][0]["content"]] == answers[::-1]
        screen.write("data", "preferences.jsonl")
        screen.write("more", "data.eval_fraction=0")  # of a single pair nothing can be held out
        screen.wait(
            "document.querySelector('#look').parentElement.innerText.includes('data.train=preferences.jsonl data.eval_fraction=0')"
        )
        screen.click("look")
        assert "1 pairs to train on" in screen.says("data_pane", "\ndone", "ended with").replace(
            "1 pair to", "1 pairs to"
        )
        screen.click("merge")
        assert "the dry run comes first" in screen.says("merge_pane", "dry run")
        screen.click("merge_rehearsal")
        screen.says("merge_pane", "\ndone", "ended with")
        screen.click("merge")
        screen.wait("document.querySelector('#merge_pane').innerText.includes('merged outputs/quickstart into')")
        screen.says("merge_pane", "\ndone", "ended with")
        assert (tmp_path / "outputs" / "quickstart-merged" / "config.json").is_file()
        for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
            screen.see(origin, width, dark)
            screen.wait("document.querySelector('#curves img')?.naturalWidth > 600")
            assert screen.run("document.documentElement.scrollWidth") <= width
            worst = screen.run(CONTRAST.replace("body *", "pre, pre *, .buttons *, .note, h2"))
            assert worst["ratio"] >= 4.5, worst
            if place := os.environ.get("ORPO_LITE_SHOTS"):
                time.sleep(1)
                screen.picture(Path(place, f"page-{width}-{'dark' if dark else 'light'}.png"))
            assert not [address for address in screen.asked() if not address.startswith((origin, "data:", "blob:"))]
    finally:
        screen.close()


def drop(screen: Screen, file: Path) -> None:
    root = screen("DOM.getDocument")["root"]["nodeId"]
    node = screen("DOM.querySelector", nodeId=root, selector="#dropped input[type=file]")["nodeId"]
    screen("DOM.setFileInputFiles", files=[str(file)], nodeId=node)


def refuse_strangers(origin: str, token: str) -> None:
    """Nothing without the token, nor for other origins; no file but the page's own with it."""
    secret, get = {"token": token}, httpx.get
    for path in ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/queue/data?session_hash=x",
                 "/gradio_api/file=/etc/passwd", "/login", "/monitoring", "/static/img/logo.svg", "/assets/none.js"):  # fmt: skip
        assert get(origin + path).status_code == 403, path
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/predict"):
        assert httpx.post(origin + path, json={}).status_code == 403, path
        answer = httpx.post(origin + path, json={}, params=secret, headers={"origin": "http://127.0.0.1:1"})
        assert answer.status_code == 403 and "may not use" in answer.text
    assert get(f"{origin}/config", params=secret).status_code == 200
    for file in ("/etc/passwd", str(Path(__file__)), str(Path.cwd() / "pyproject.toml"), "/proc/self/environ"):
        assert get(f"{origin}/gradio_api/file={file}", params=secret).status_code in (403, 404), file
