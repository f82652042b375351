"""Text from rows, answers, names and errors is shown as text: in the browser, on the model card, on the terminal."""

from __future__ import annotations

import http.server
import json
import os
import pty
import re
import select
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import orpo_lite.report
from orpo_lite.report import write_report
from orpo_lite.trainer.run_folder import RunFolder
from tests.commands import Command
from tests.security.conftest import ATTACKS, SCRIPT, quick

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
           "--disable-background-networking", "--disable-component-update", "--disable-extensions"]  # fmt: skip
PAGE_JS = Path(orpo_lite.report.__file__).with_name("page.js").read_text("utf-8").strip()
OURS = ("https://huggingface.co/", "https://arxiv.org/")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium (.ci/run does)")
ACTING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What acts on a terminal or on the order of text; a pty ends its lines in carriage return and line feed."""


@pytest.fixture
def server() -> Any:
    """An address on this machine, and every path that was asked of it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def dom(page: Path, profile: Path) -> str:
    """The page's document as a browser has it once scripts and handlers have run."""
    for attempt in range(3):  # on a busy machine it hangs now and then, and not because of the page
        words = [
            str(BROWSER),
            *WITHOUT,
            f"--user-data-dir={profile}-{attempt}",
            "--virtual-time-budget=4000",
            "--dump-dom",
        ]
        try:
            done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            continue
        assert "</html>" in done.stdout, done.stderr[-2000:]
        return done.stdout
    pytest.fail("the browser hung three times")


class Document(HTMLParser):
    """Title, text, elements and attributes of a document."""

    def __init__(self, content: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside, self.title = "", [], ""
        self.scripts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script":
            self.scripts.append(data)
        elif self.inside and self.inside[-1] == "title":
            self.title += data
        else:
            self.text += data


def harmless(document: Document, ours: bool = False) -> None:
    """No element or attribute runs code or asks for anything, but for `ours`: a report's own script and its numbers."""
    scripts = [attributes for tag, attributes in document.elements if tag == "script"]
    if ours:
        assert scripts == [{"type": "application/json", "id": "charts-data"}, {}] and len(document.scripts) == 2
        assert json.loads(document.scripts[0])["charts"] and document.scripts[1] == PAGE_JS
    else:
        assert not scripts
    for tag, attributes in document.elements:
        if ours and (
            tag == "script" or tag == "a" and str(attributes.get("href")).startswith("#") and len(attributes) == 1
        ):
            continue  # links to the report's own sections
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "img", "a"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href", "srcset", "xlink:href"), (tag, name)
            assert "javascript:" not in str(value) and "url(" not in str(value)


@needs_browser
def test_the_browser_runs_what_is_not_escaped(tmp_path: Path, server) -> None:
    """So the tests below can fail."""
    address, asked = server
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>mine</title>{SCRIPT}<img src='{address}/asked'>", "utf-8")
    assert Document(dom(page, tmp_path / "profile")).title == "owned" and asked == ["/asked"]


@needs_browser
def test_the_report_of_a_run_on_hostile_rows(attacked, tmp_path: Path, server) -> None:
    run, _ = attacked
    address, asked = server
    held = tmp_path / "run"
    shutil.copytree(run, held)
    # every text that run.json holds attacks, and asks for something of the server
    facts = json.loads((held / "run.json").read_text("utf-8"))
    attack = f"{ATTACKS[2]}{SCRIPT}<img src={address}/asked>'\"><link rel=stylesheet href={address}/style>"
    for part in (
        facts,
        facts["base_model"],
        facts["samples"]["before"][0],
        facts["samples"]["after"][0],
        facts["versions"],
    ):
        for key, value in part.items():
            if isinstance(value, str):
                part[key] = f"{value} {attack}"
    facts["data"]["drops"]["dropped"] = {attack: 3}
    facts["data"]["fingerprint"] = attack
    (held / "run.json").write_text(json.dumps(facts), "utf-8")
    for folder in (run, held):
        page = write_report(RunFolder.open(folder))
        document = Document(dom(page, tmp_path / f"profile-{folder.parent.name}"))
        harmless(document, ours=True)
        assert document.title.startswith("ORPO run quickstart") and document.title != "owned"
    assert not asked
    for sample in facts["samples"]["after"][1:]:
        shown = re.sub(r"\s+", " ", sample["prompt"]).strip()
        assert shown[:40] in re.sub(r"\s+", " ", document.text), shown
    assert SCRIPT in document.text


def test_the_card_of_a_run_on_hostile_rows(attacked) -> None:
    run, _ = attacked
    text = (run / "README.md").read_text("utf-8")
    assert not ACTING.search(text)
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["license"] != "wtfpl" and meta["library_name"] == "peft"
    document = Document(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    assert "alert(1)" in document.text or "document.title" in document.text  # shown as text
    for tag, attributes in document.elements:
        assert tag not in ("script", "iframe", "svg", "link", "object", "b"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        for address in (attributes.get("href"), attributes.get("src")):
            assert not address or address == "curves.png" or address.startswith(OURS), address
    assert "Not a heading of ours" in document.text
    headings = [line for line in body.splitlines() if re.match("#+ ", line)]
    assert len([line for line in headings if "Not a heading" in line]) <= len(re.findall("```` *text", body))


def test_the_terminal_of_a_run_on_hostile_rows(attacked) -> None:
    _, done = attacked
    assert not ACTING.search(done.stdout)
    assert "\\x1b]52" in done.stdout or "\\x1b[31m" in done.stdout  # written out


COMMANDS = {
    "train": lambda name: [*quick(Path("run"), name), "--dry-run"],
    "data": lambda name: ["data", "--recipe", "quickstart", f"data.train={name}", "data.eval=null", "--examples", "9", "--list-drops"],
    "an-error": lambda name: ["train", "--recipe", "quickstart", f"data.train={name}/gone*.jsonl", "data.columns={prompt: \"\\e[5mx\"}"],
    "a-row-that-fails": lambda name: ["data", "--recipe", "quickstart", "data.train=bad.jsonl", "data.eval=null"],
    "a-traceback": lambda name: ["data", "--recipe", "quickstart", "data.train=bad.jsonl", "data.eval=null", "--debug"],
    "a-template-that-raises": lambda name: ["data", "--recipe", "quickstart", f"data.train={name}", "data.eval=null",
                                            "data.apply_template=true", "model.chat_template=bad.jinja"],
    "evaluate": lambda name: ["evaluate", "RUN"],
    "report": lambda name: ["report", "RUN"],
}  # fmt: skip


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_terminal_gets_no_escape_from_data(kind: str, attacked, tmp_path: Path) -> None:
    """On a real pty with colors on: every escape sequence left is one of rich's own."""
    run, _ = attacked
    name = "rows"
    shutil.copytree(run.parent / name, tmp_path / name)
    row = {"prompt": "a", "chosen": "same \x1b[5m", "rejected": "same \x1b[5m", "\x1b[5mcolumn\x9b5m": "\x1b[5m"}
    rows = [{"\x1b[5mcolumn\x9b5m\u202e": "\x1b[5m"}] if kind in ("a-row-that-fails", "a-traceback") else [row]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('\x1b[5mevil\x9b5m\x07 \u202e[red]') }}", "utf-8")
    command, *words = COMMANDS[kind](name)
    words = [str(run) if word == "RUN" else word for word in words]
    told = on_a_terminal(command, words, tmp_path)
    ours = re.sub(r"\x1b\[[0-9;]*m|\x1b\[[0-9]*[AK]|\x1b\[\?25[hl]", "", told)
    assert not ACTING.search(ours), ACTING.findall(ours)
    assert "\x1b[5m" not in told and "\x1b[31mred" not in told and "]8;" not in ours.replace("\\x1b]8;", "")
    assert len(ours) > 20
    if kind.startswith("a-"):
        assert "\\x1b[5m" in told
        assert "\x1b[1;31merror:\x1b[0m" in told or kind == "a-template-that-raises"


def on_a_terminal(name: str, words: list[str], place: Path) -> str:
    """What a command writes to a pseudo-terminal."""
    top, bottom = pty.openpty()
    started = Command(name, *words, cwd=place, tty=os.ttyname(bottom), TERM="xterm-256color", COLUMNS="200",
                      HF_DATASETS_CACHE=str(place / "cache"))  # fmt: skip
    found = b""
    while select.select([top], [], [], 0.05)[0] or started.poll() is None:
        if select.select([top], [], [], 0)[0]:
            found += os.read(top, 1 << 16)
    os.close(top)
    os.close(bottom)
    return found.decode("utf-8", "replace")
