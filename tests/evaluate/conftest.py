"""The chat's runs, and a server that judges over HTTP."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tests.chat.conftest import babbling, trained

__all__ = ["babbling", "trained"]

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
