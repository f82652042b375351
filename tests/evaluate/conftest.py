"""A short run whose adapter answers differently from its base, a terminal to drive, and a server that judges over HTTP."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import CHATML, SIZES

ROOT = Path(__file__).parents[2]
WORDS = ["model.quantization=none", "data.max_eval_rows=8", "evaluation.samples=0", "training.max_steps=12",
         "training.learning_rate=2e-2", "training.eval_strategy=no", "training.logging_steps=4"]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of a few seconds; the base is not quantized, so that a merge says the same."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    done = run(Recipe.load("quickstart", [*WORDS, f"training.output_dir={output}"]))
    assert done is not None
    return done.folder


@pytest.fixture(scope="session")
def babbling(tmp_path_factory) -> Path:
    """A random model that writes bytes of any kind without end."""
    from transformers import PhiConfig

    folder = tmp_path_factory.mktemp("models") / "babbling"
    tokenizer = tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="</s>", pad="<pad>")
    config = PhiConfig(**SIZES | {"vocab_size": len(tokenizer)}, max_position_embeddings=4096, pad_token_id=None)
    model: Any = tiny_model(config)
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids(["</s>", "<|im_start|>", "<|im_end|>", "<pad>"])] = -1e4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Terminal:
    """A command on a pseudo-terminal of its own.

    Args:
        columns: its width.
        term: its kind.
    """

    def __init__(self, words: list[str], place: Path, columns: int = 80, term: str = "xterm-256color"):
        import fcntl
        import struct
        import termios

        self.top, bottom = pty.openpty()
        fcntl.ioctl(bottom, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "TERM": term,
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", f"orpo_lite.{words[0]}", *words[1:]]

        def owns() -> None:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, as tests may be, ignores it
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to it

        self.process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=bottom, stdout=bottom, stderr=bottom, preexec_fn=owns
        )
        os.close(bottom)
        self.told, self.read = "", 0

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Wait for text that was not waited for yet; what came before it."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.DOTALL).search(self.told, self.read)):
            assert self.hears(end), f"it ended before {pattern!r}; it said:\n{self.told[self.read :]}"
        before, self.read = self.told[self.read : found.start()], found.end()
        return before

    def hears(self, end: float) -> bool:
        """Wait for more of what it says; False once it has ended."""
        left = end - time.monotonic()
        ready = left > 0 and select.select([self.top], [], [], left)[0]
        assert ready, f"it does not end, or says nothing more; so far:\n{self.told[self.read :]}"
        try:
            part = os.read(self.top, 1 << 16)
        except OSError:
            return False
        self.told += part.decode("utf-8", "replace")
        return bool(part)

    def send(self, text: str) -> None:
        """Keys."""
        os.write(self.top, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C at a prompt, until it is answered: readline waits on for a key where one comes just before it waits."""
        for _ in range(20):
            self.send("\x03")
            try:
                self.expect(pattern, 6)
                return
            except AssertionError as error:
                if "it ended before" in str(error):
                    raise
        raise AssertionError(f"no {pattern!r} after Ctrl-C; it said:\n{self.told[self.read :]}")

    def end(self) -> int:
        """Its exit status, once all it says is read."""
        end = time.monotonic() + 60
        while self.hears(end):
            pass
        os.close(self.top)
        return self.process.wait(30)


@pytest.fixture
def terminal(tmp_path):
    """terminal(words, options) -> Terminal; ended with the test."""
    opened: list[Terminal] = []

    def start(*words: str, **options: Any) -> Terminal:
        opened.append(Terminal([*map(str, words)], tmp_path, **options))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait(10)


KIND = re.compile(r"certainly|pleasure|thank you|my friend|happy to help|wonderful|of course", re.IGNORECASE)


def kindest(text: str) -> str:
    """A judge that likes courtesy, wherever it stands."""
    first, second = (len(KIND.findall(part)) for part in text.partition("[answer B begins")[::2])
    return "One is kinder.\nVerdict: " + ("A" if first > second else "B" if second > first else "tie")


class Server:
    """An OpenAI-compatible server, as far as chat completions go. `plan` answers first, `judge` from then on."""

    def __init__(self) -> None:
        self.judge: Callable[[str], Any] = kindest
        self.plan: list[Any] = []
        """Responses to come, one a request: (status, body, headers), seconds to wait, or a text."""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            self.headers.append(dict(request.headers))
            planned = self.plan.pop(0) if self.plan else None
            if isinstance(planned, float):
                await asyncio.sleep(planned)
                planned = None
            if isinstance(planned, tuple):
                return JSONResponse(planned[1], planned[0], headers=planned[2] if len(planned) > 2 else None)
            if isinstance(planned, bytes):
                return Response(planned, media_type="application/json")
            text = planned or self.judge(body["messages"][-1]["content"])
            return JSONResponse({"choices": [{"message": {"role": "assistant", "content": text}}]})

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Server:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def server() -> Any:
    with Server() as running:
        yield running
