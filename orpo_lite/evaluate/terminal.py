"""Read messages and choices from the terminal of a chat, so that nothing typed is lost or taken for something else."""

import contextlib
import itertools
import re
import sys
import threading
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app, get_app_session
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.utils import is_dumb_terminal

from orpo_lite.common.console import errors

BLOCK = '"""'
"""Begins and ends a message of several lines."""
OPEN_BLOCK = re.compile(f"\\s*{BLOCK}(?!.*{BLOCK}\\s*$).*", re.DOTALL)
"""A message of several lines that is not closed yet, so that Enter begins another line of it."""
HISTORY = InMemoryHistory()
"""Messages of this chat, for the arrow keys."""
ARROWS = {"left": "1", "right": "2"}
"""Keys that choose an answer at once: no message begins with them."""


def edits() -> bool:
    """Return True where lines can be edited: keys come from a terminal that can move its cursor, and go to one."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb_terminal()


def read(prompt: str, history: InMemoryHistory, keys: KeyBindings | None = None) -> str:
    """Read a line, or several between triple quotes; one that is pasted stays whole.

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    if edits():
        opened = Condition(lambda: OPEN_BLOCK.fullmatch(get_app().current_buffer.text) is not None)
        session: PromptSession[str] = PromptSession(history=history, key_bindings=keys)
        text = session.prompt(prompt, multiline=opened, prompt_continuation="...> ", enable_suspend=True)
    else:
        text = ""
        while not text or OPEN_BLOCK.fullmatch(text):
            errors.print("...> " if text else prompt, end="", markup=False, soft_wrap=True)
            if not (line := sys.stdin.readline()):
                raise EOFError
            text += line
    text = text.strip()
    return text.removeprefix(BLOCK).removesuffix(BLOCK).strip() if text.startswith(BLOCK) else text


def read_message(prompt: str) -> str:
    """Read a message; raises as `read`."""
    return read(prompt, HISTORY)


def read_choice(prompt: str, answers: tuple[str, ...]) -> str:
    """Read a choice or, where anything else is typed, the next message; raises as `read`.

    Returns:
        One of `answers`; or a message; "" for Enter alone, or where a whole message was typed before the question was
        there, which `read_message` then finds.
    """
    keys, source = KeyBindings(), get_app_session().input
    if edits():
        with source.raw_mode():
            typed = get_typeahead(source) + source.read_keys()
        # an arrow key before the question was there chose nothing
        typed = list(itertools.dropwhile(lambda one: one.key in ARROWS, typed))
        store_typeahead(source, typed)
        if any(one.key in (Keys.ControlM, Keys.ControlJ) for one in typed):
            return ""

    @keys.add("left", filter=Condition(lambda: not get_app().current_buffer.text))
    @keys.add("right", filter=Condition(lambda: not get_app().current_buffer.text))
    def choose(event: KeyPressEvent) -> None:
        event.current_buffer.text = ARROWS[event.key_sequence[0].key]
        event.current_buffer.validate_and_handle()

    text = read(prompt, InMemoryHistory(), keys)
    if text and text not in answers:
        HISTORY.append_string(text)
    return text


@contextlib.contextmanager
def typing_kept() -> Iterator[None]:
    """Keep what is typed or pasted meanwhile for the next message, unseen; Ctrl-C still interrupts."""
    if sys.platform == "win32" or not edits():
        yield
        return
    import termios

    before, mode = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
    source, output, ended = get_app_session().input, get_app_session().output, threading.Event()

    def gather() -> None:
        # the system itself keeps 4096 characters, and heeds no Ctrl-C behind them
        while not ended.wait(0.03):
            store_typeahead(source, get_typeahead(source) + source.read_keys())

    thread = threading.Thread(target=gather, daemon=True)
    mode[3] = mode[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # NOFLSH: Ctrl-C takes nothing away
    termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
    output.enable_bracketed_paste()
    output.flush()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        output.disable_bracketed_paste()
        output.flush()
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
