"""Read messages and single keys from the terminal of a chat."""

from __future__ import annotations

import asyncio
import re

from prompt_toolkit import prompt as read_line
from prompt_toolkit.application.current import get_app, get_app_session
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

from orpo_lite.common.console import console

BLOCK = '"""'
"""Begins and ends a message of several lines."""
HISTORY = InMemoryHistory()
"""Messages of this chat, for the arrow keys."""
IN_BLOCK = Condition(
    lambda: re.fullmatch(f"\\s*{BLOCK}(?!.*{BLOCK}\\s*$).*", get_app().current_buffer.text, re.DOTALL) is not None
)
"""Whether a message of several lines is not closed yet, so that Enter begins another line of it."""


def read_message(prompt: str) -> str:
    """Read a line, or several between triple quotes.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    text = read_line(
        prompt, history=HISTORY, multiline=IN_BLOCK, prompt_continuation="...> ", enable_suspend=True
    ).strip()
    return text.removeprefix(BLOCK).removesuffix(BLOCK).strip() if text.startswith(BLOCK) else text


def read_key(question: str, answers: str) -> str:
    """Ask a question that a single key answers. Everything else that is typed is left for the next message.

    Args:
        answers: the keys that answer it.

    Returns:
        One of `answers`, with or without Enter behind it; "" for Enter alone, for any other key, or where something was
        typed before the question was there.

    Raises:
        EOFError: the terminal is gone.
        KeyboardInterrupt: Ctrl-C.
    """
    source = get_app_session().input
    with source.raw_mode():
        typed = get_typeahead(source) + source.read_keys()
    text = ""
    if not typed:
        console.print(question, end="", markup=False, soft_wrap=True)
        typed = asyncio.run(next_keys())
        text = "".join(key.data for key in typed)
    answer = text.strip() if len(text.strip()) == 1 and text.strip() in answers else ""
    console.print(answer)
    if typed[0].key == Keys.ControlC:
        raise KeyboardInterrupt
    if not answer and text not in ("\r", "\n"):
        store_typeahead(source, typed)
    return answer


async def next_keys() -> list[KeyPress]:
    """Wait until something is typed; return all of it that is there.

    Raises:
        EOFError: the terminal is gone.
    """
    source, ready, keys = get_app_session().input, asyncio.Event(), []
    with source.raw_mode(), source.attach(ready.set):
        while not keys:
            await ready.wait()
            ready.clear()
            # a terminal's late answer to a question about its cursor is no key
            keys = [key for key in source.read_keys() + source.flush_keys() if key.key != Keys.CPRResponse]
            if source.closed:
                raise EOFError
    return keys
