"""`orpo-lite ui`: a local page on which every button runs the command that is shown beside it."""

import contextlib
import html
import io
import itertools
import multiprocessing
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import console, run_command
from orpo_lite.common.credentials import without_secrets
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import visible
from orpo_lite.plan.gpus import CARDS
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import find_recipe, read_yaml, shipped_recipes
from orpo_lite.recipe.own_data import run_name

HERE = Path(__file__)
COLORED = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
"""Environment of the commands: rich writes colors, but nothing that moves the cursor."""
REHEARSED = ("merge", "export", "push")
"""Commands that run once their dry run has succeeded."""
HEAVY = ("train", "pairs", *REHEARSED)
"""Commands that need the memory of the compared models."""
LINES = 400
"""Lines of output that are shown."""
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
"""Content security policy: the browser asks no other host for anything."""


def filled(words: list[str], given: dict[str, Any]) -> list[str]:
    """Return a command of ui.yaml with its {names} replaced by what the page's fields hold."""
    texts = {name: value.strip() for name, value in given.items() if isinstance(value, str)}
    run, data = texts["run"].rstrip("/\\") or "RUN", texts["data"]
    gguf = texts["gguf"] or f"{run}.gguf"
    meant = {name: [text] for name, text in texts.items()} | {
        "run": [run],
        "data": [data or "PAIRS"],
        "other": [f"data.train={data}"] if data else [],
        "more": [line.strip() for line in texts["more"].splitlines() if line.strip()],
        "card": ["--gpu", texts["card"]] if texts["card"] else [],
        "new": [str(free_name(f"{run_name(data, texts['model'])}.yaml"))],
        "folder": [texts["folder"] or f"{run}-merged"],
        "gguf": [gguf],
        "part": {"merged model": ["--merged"], "GGUF file": ["--gguf", gguf]}.get(texts["part"], []),
        "sight": [f"--{texts['sight']}"],
        "blind": ["--blind"] if given["blind"] else [],
        "tokens": [f"{given['tokens'] or 1:.0f}"],
        "temperature": [f"{given['temperature'] or 0:g}"],
    }
    return [one for word in words for one in (meant[word[1:-1]] if word[0] == "{" else [word])]


def free_name(name: str) -> Path:
    """Return the first of NAME, NAME-2, NAME-3 and so on that is not there."""
    path = Path(name)
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], names) if not one.exists())


def shell(words: list[str]) -> str:
    """Return a command as it is typed."""
    return shlex.join(["orpo-lite", *words])


class Job(subprocess.Popen):
    """A command that runs in a process of its own; its output goes to a file, so that it outlives the page."""

    def __init__(self, words: list[str], log: Path, columns: int):
        self.words, self.log, self.since, self.folder = words, log, time.time(), None
        if words[0] == "train":
            with contextlib.suppress(RequestError):  # the command will say so
                self.folder = Recipe.load(words[2], [word for word in words[3:] if not word.startswith("--")]).folder
        with log.open("wb") as out:
            super().__init__(
                [sys.executable, "-m", "orpo_lite", *words], stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | COLORED | {"COLUMNS": str(columns)},
            )  # fmt: skip

    def html(self) -> str:
        """Return command, output and state as HTML."""
        status = self.poll()
        state = {None: "running", 0: "done"}.get(status, f"ended with status {status}")
        printed = as_html(self.log.read_bytes().decode("utf-8", "replace"))
        return f"<pre><b>$ {escaped(shell(self.words))}</b>\n{printed}\n<i class=status{status}>{state}</i></pre>"

    def run(self) -> Path | None:
        """Return the folder of a training, the recipe's or a numbered one, by when it was written to."""
        folders = [self.folder, *self.folder.parent.glob(f"{self.folder.name}-[0-9]*")] if self.folder else []
        times = {one.stat().st_mtime: one for one in folders if (one / "recipe.yaml").is_file()}
        return times[max(times)] if times and max(times) >= self.since - 1 else None


def as_html(printed: str) -> str:
    """Return the end of a terminal's output as HTML in the terminal's colors, whose text can do nothing."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in printed.rstrip().split("\n")]
    if len(lines) > LINES:
        lines = [f"({len(lines) - LINES:,} earlier lines are not shown)", *lines[-LINES:]]
    screen = Console(record=True, file=io.StringIO(), width=10_000)
    screen.print(Text.from_ansi("\n".join(lines)))
    return harmless(screen.export_html(theme=SVG_EXPORT_THEME, code_format="{code}", inline_styles=True).rstrip())


def harmless(text: str) -> str:
    """Return HTML without characters that gradio's templates, or the order of letters, act on."""
    return visible(text).replace("{", "&#123;").replace("$", "&#36;")


def escaped(text: str) -> str:
    """Return text as HTML."""
    return harmless(html.escape(text))


def note(text: str, mood: str = "") -> str:
    """Return a line of ours as HTML."""
    return f'<p class="note {mood}">{escaped(text)}</p>' if text else ""


def curves(run: Path, picture: Path) -> str:
    """Return the curves of what a run has logged so far, drawn into a file, as HTML; nothing before its first step."""
    from orpo_lite.report.charts import draw_card_curves
    from orpo_lite.trainer.run_record import read_run

    with contextlib.suppress(RequestError):
        if draw_card_curves(read_run(run), picture):
            return f'<img alt="curves of {escaped(run.name)}" src="data:image/png;base64,{b64encode(picture.read_bytes()).decode()}">'
    return ""


# ---- in the process that holds the compared models -------------------------------------------------------------------


def end_with_the_page() -> None:
    """End this process once its parent has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@lru_cache(1)
def sides_of(run: str) -> list[Any]:
    """Find base and adapter, which are loaded at first use: by then another run's are gone."""
    from orpo_lite.evaluate.answering import find_sides

    return find_sides(run, option="--compare")


def answer_both(run: str, message: str, tokens: int, temperature: float) -> list[tuple[str, str, str | None]]:
    """Answer with both sides and the same random draws; return name, answer and remark of each, the adapter last."""
    import torch

    from orpo_lite.evaluate.answering import Sampling

    seed, found = secrets.randbits(32), []
    for side in sides_of(run):
        torch.manual_seed(seed)
        reply = side.reply([{"role": "user", "content": message}], Sampling(tokens, temperature, 1.0))
        found.append((side.name, reply.text, reply.remark))
    return found


def keep_pair(run: str, message: str, better: str, worse: str, file: str) -> int:
    """Append a choice to a file of preferences as `chat --compare` does; return the number of pairs in it."""
    from orpo_lite.evaluate.chat import PreferenceFile

    if better == worse or not better.strip() or not worse.strip():
        raise RequestError("an empty answer, or the same one, makes no pair")
    kept = PreferenceFile(file)
    kept.append(sides_of(run)[-1].format.row([{"role": "user", "content": message}], better, worse))
    return kept.held + 1


# ---- the page --------------------------------------------------------------------------------------------------------


class Page:
    """The page of ui.yaml, and what is done by it: one command at a time for each pane of output."""

    def __init__(self, gr: Any, folder: Path):
        self.gr, self.folder, self.lock = gr, folder, threading.Lock()
        self.models: ProcessPoolExecutor | None = None
        self.jobs: dict[str, Job] = {}
        """The last command of each pane."""
        self.fields: list[str] = []
        self.commands: dict[str, list[str]] = {}
        """Words by the names of the buttons."""
        shipped = {name: read_yaml(path)["model"]["name_or_path"] for name, path in shipped_recipes().items()}
        choices = {"recipes": [*shipped], "models": sorted({*shipped.values()}), "cards": ["", *CARDS]}
        panes, calls, quiet = {}, [], {"show_progress": "hidden", "concurrency_limit": None}
        with gr.Blocks(title="orpo-lite", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# orpo-lite\nEvery button runs the command beside it, in `{Path.cwd()}`.")
            part = self.part = {"asked": gr.State({}), "width": gr.Number(100, visible="hidden")}
            for title, rows in safe_yaml.read(HERE.with_suffix(".yaml")).items():
                gr.Markdown(f"## {title}")
                for row in rows:
                    with gr.Row(elem_classes="buttons" if row[0]["kind"] == "Button" else None):
                        for spec in row:
                            name, kind, words, pane = (spec.pop(key, None) for key in ("name", "kind", "words", "pane"))
                            calls += [(name, *call) for call in spec.pop("calls", ())]
                            if isinstance(spec.get("choices"), str):
                                spec["choices"] = choices[spec["choices"]]
                            part[name] = getattr(gr, kind)(**spec, elem_id=name.replace("/", "-"))
                            if kind in ("Textbox", "Dropdown", "Number", "Checkbox"):
                                self.fields.append(name)
                            if words:
                                self.commands[name], panes[name], part[f"{name}_line"] = words, pane, gr.HTML()
            fields, lines = [part[name] for name in self.fields], [part[f"{name}_line"] for name in self.commands]
            changed = [one for name, one in part.items() if name.endswith("_pane")]
            changed += [part[name] for name in ("stop_line", "run", "recipe", "curves")]
            load = self.blocks.load
            load(None, None, part["width"], js="() => Math.floor((Math.min(innerWidth, 1240) - 90) / 7.9)")
            load(partial(self.follow, "train_pane"), None, changed, **quiet)
            load(self.opened, part["recipe"], part["text"], **quiet)
            # every change in turn, so that the last is shown: what is shown is what a press runs
            in_turn = quiet | {"trigger_mode": "multiple", "concurrency_limit": 1}
            gr.on([load, *(one.change for one in fields)], self.lines, fields, lines, **in_turn)
            for name, pane in panes.items():
                if pane:
                    part[name].click(partial(self.press, name, pane), [part["width"], *fields], changed, **quiet)
            for name, event, method, inputs, outputs, *first in calls:
                named = ([part[one] for one in names] for names in (inputs, outputs))
                getattr(part[name], event)(partial(getattr(self, method), *first), *named)

    def lines(self, *values: Any) -> list[str]:
        """Return the command of each button, for the values of all fields."""
        given = dict(zip(self.fields, values, strict=True))
        return [f"<code>{escaped(shell(filled(words, given)))}</code>" for words in self.commands.values()]

    def press(self, name: str, pane: str, width: float, *values: Any) -> Iterator[dict[Any, Any]]:
        """Run the command of a button, and yield what changes on the page until it has ended."""
        problem = ""
        try:
            self.start(pane, filled(self.commands[name], dict(zip(self.fields, values, strict=True))), int(width))
        except RequestError as error:
            problem = note(str(error), "bad")
        yield from self.follow(pane, problem)

    def start(self, pane: str, words: list[str], columns: int = 100) -> None:
        """Start a command.

        Raises:
            RequestError: one of this pane is running, or its dry run has to come first.
        """
        with self.lock:
            last, rehearsal = self.jobs.get(pane), [*words, "--dry-run"]
            if last and last.poll() is None:
                raise RequestError(f"still running: {shell(last.words)}: wait for it, or stop it")
            rehearsed = last and last.words == rehearsal and last.poll() == 0
            if words[0] in REHEARSED and words[-1] != "--dry-run" and not rehearsed:
                raise RequestError(f"the dry run comes first, and has to succeed: {shell(rehearsal)}")
            if words[0] in HEAVY:
                self.free()
            self.jobs[pane] = Job(words, self.folder / f"{pane}.log", max(60, columns))

    def follow(self, pane: str, problem: str = "") -> Iterator[dict[Any, Any]]:
        """Yield what a command changes on the page until it has ended: its output, and what it writes."""
        job, part, before, drawn = self.jobs.get(pane), self.part, None, ""
        while job:
            status, folder = job.poll(), job.run()
            files = [job.log, *([folder / "metrics.jsonl"] if folder else [])]
            now = [status, *(file.stat().st_mtime_ns for file in files if file.is_file())]
            if now != before:
                changes = {part[pane]: problem + job.html()}
                if pane == "train_pane":
                    changes[part["stop_line"]] = f"<code>kill {job.pid}</code>" if status is None else ""
                    if now[2:] and now[2:] != (before or [])[2:] and folder:
                        drawn = curves(folder, self.folder / "curves.png")
                    changes[part["curves"]] = drawn  # each time: a slow browser skips all changes but the last
                if status is not None and folder:
                    changes[part["run"]] = str(folder)
                if status == 0 and job.words[0] == "new":
                    changes[part["recipe"]] = job.words[job.words.index("--output") + 1]
                yield changes
            if status is not None:
                return
            before = now
            time.sleep(0.5)
        yield {part[pane]: problem}

    def stop(self) -> None:
        """Ask a training to stop, as `kill` does: after its step, with a checkpoint; asked again, at once."""
        if "train_pane" in self.jobs:
            self.jobs["train_pane"].terminate()

    def take(self, dropped: str) -> str:
        """Move a dropped file to this folder; return its name."""
        return str(shutil.move(dropped, free_name(Path(dropped).name)))

    def opened(self, recipe: str) -> str:
        """Return the text of a recipe."""
        with contextlib.suppress(RequestError):
            return find_recipe(recipe).read_text("utf-8")
        return ""

    def save(self, text: str, recipe: str) -> tuple[str, str]:
        """Save the text of a recipe, to another file where it is a shipped one's or a run's; say what is wrong with it."""
        path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else free_name(f"{Path(recipe).name}-mine.yaml")
        try:
            write_atomically(path, text)
            Recipe.load(path)
        except (RequestError, OSError) as error:
            return note(f"saved, but it cannot be used: {error}", "bad"), str(path)
        return note(f"saved as {path}, and complete", "good"), str(path)

    def free(self) -> None:
        """End the process that holds the compared models, and with it all of their memory."""
        if self.models:
            self.models.shutdown(cancel_futures=True)
        self.models = None

    def with_models(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process that holds the compared models.

        Raises:
            RequestError: it failed; or a command is running that needs the memory.
        """
        with self.lock:
            for job in self.jobs.values():
                if job.words[0] in HEAVY and job.poll() is None:
                    raise RequestError(f"running, and it needs the memory: {shell(job.words)}: wait for it, or stop it")
            spawn = multiprocessing.get_context("spawn")
            self.models = self.models or ProcessPoolExecutor(1, spawn, end_with_the_page)
        try:
            return self.models.submit(function, *arguments).result()
        except RequestError:
            raise
        except Exception as error:
            self.free()
            raise RequestError(without_secrets(f"{type(error).__name__}: {error}")) from error

    def ask(self, run: str, message: str, blind: bool, tokens: int, temperature: float) -> tuple[Any, ...]:
        """Answer with both sides; return what to say, what was asked, and the answers."""
        try:
            if not message.strip() or not run.strip():
                raise RequestError("the folder of a run, and a message, have to be given first")
            found = self.with_models(answer_both, run, message, tokens, temperature)
        except RequestError as error:
            return note(str(error), "bad"), {}, self.gr.skip(), self.gr.skip()
        order = secrets.SystemRandom().sample([0, 1], 2) if blind else [0, 1]
        boxes = []
        for place, (name, text, remark) in enumerate((found[one] for one in order), 1):
            title = f"{place}" if blind else f"{place} {name}"
            boxes.append(self.gr.update(value=text, label=f"{title} ({remark})" if remark else title))
        same = "both answers are the same, so they make no pair" if found[0][1] == found[1][1] else ""
        return note(same), {"of": (run, message), "found": [found[one] for one in order], "blind": blind}, *boxes

    def rate(self, place: int, asked: dict[str, Any], mine: str, file: str) -> tuple[str, dict[str, Any]]:
        """Keep a choice: the first answer is better (0), the second (1), or the user's own than the adapter's (2)."""
        if not asked:
            return note("there is nothing to choose from: let both answer first", "bad"), asked
        (run, message), ((one, first, _), (two, second, _)) = asked["of"], asked["found"]
        better, worse = (first, second, mine)[place], (second, first, second if one == "base" else first)[place]
        try:
            count = self.with_models(keep_pair, run, message, better, worse, file)
        except RequestError as error:
            return note(str(error), "bad"), asked
        which = f"; 1 was {one}, 2 was {two}" if asked["blind"] else ""
        train = shell(["train", "--recipe", run, f"adapter.init_from={run}", f"data.train={file}"])
        return note(f"kept, as pair {count} of {file}{which}. To train on it: {train}", "good"), {}

    def close(self) -> None:
        """Stop what runs, a training with a checkpoint, and free the models."""
        self.free()
        for job in self.jobs.values():
            if job.poll() is None:
                console.print(f"stopping {shell(job.words)}", markup=False, soft_wrap=True)
                job.terminate()
                job.wait()


# ---- the command -----------------------------------------------------------------------------------------------------


class Gate:
    """ASGI middleware that answers nothing without the token, nor to the page of another origin.

    The address that is opened first holds the token; a cookie holds it from then on.
    """

    def __init__(self, app: Any, token: str, cookie: str):
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        asked, answer = HTTPConnection(scope), self.app
        given, origin = asked.query_params.get("token"), asked.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != asked.headers.get("host"):
            answer = PlainTextResponse(f"a page of {origin} may not use this one\n", 403)
        elif not secrets.compare_digest((given or asked.cookies.get(self.cookie) or "").encode(), self.token.encode()):
            answer = PlainTextResponse("open the address that `orpo-lite ui` has printed: it holds the token\n", 403)
        elif given and scope["path"] == "/":
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await answer(scope, receive, guarded)


def command(
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="a public https address as well, through gradio's servers")] = False,
) -> None:  # fmt: skip
    """Open a page in the browser that does what the commands do, from pairs to a published adapter."""
    with tempfile.TemporaryDirectory(prefix="orpo-lite-ui-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        try:
            import gradio
            import uvicorn
            from fastapi import FastAPI
            from gradio.networking import setup_tunnel
            from gradio.themes import Default
        except ImportError as error:
            raise RequestError(f"the page needs gradio ({error}): pip install 'orpo-lite[ui]'") from error
        try:
            listener = socket.create_server((host, port))
        except OSError as error:
            why = f"--host {host}, --port {port}: {error.strerror}: choose others, such as --port 0"
            raise RequestError(why) from None
        token, page, app = secrets.token_urlsafe(24), Page(gradio, Path(folder)), FastAPI(openapi_url=None)
        number = listener.getsockname()[1]
        theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        blocks = page.blocks.queue(default_concurrency_limit=8)
        gradio.mount_gradio_app(app, blocks, "/", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
                                enable_monitoring=False, theme=theme, css_paths=HERE.with_suffix(".css"))  # fmt: skip
        gate = Gate(app, token, f"orpo_lite_{number}")
        addresses = [f"http://{host}:{number}"]
        if share:
            addresses.append(setup_tunnel("127.0.0.1", number, secrets.token_urlsafe(32), None, None))
        for address in addresses:
            console.print(f"open {address}/?token={token}", markup=False, soft_wrap=True)
        reach = "through gradio's servers, from anywhere" if share else "not made public (--share does)"
        console.print(f"The page is {reach}; whoever has its address can run commands here.\nCtrl-C ends it, and stops what "
                      "runs, a training with a checkpoint.", soft_wrap=True)  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is stopped
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(page):  # Ctrl-C is the way to end it
            uvicorn.Server(uvicorn.Config(gate, log_level="warning", timeout_graceful_shutdown=1)).run([listener])


if __name__ == "__main__":
    run_command(command)
