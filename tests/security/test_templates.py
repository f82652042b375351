"""Chat templates that raise, loop or write without end: bounded, named, and nothing of them in this process."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from orpo_lite.common.errors import RequestError
from orpo_lite.data.encode import turn_end
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.export.ollama import find_turns
from orpo_lite.model import chat_template as rendering
from orpo_lite.model.chat_template import Rendering, TemplateRefused, TemplateUnbounded, render_chat
from orpo_lite.model.tokenizer import stop_token_ids
from orpo_lite.recipe.loading import PACKAGE
from tests.training import CHATML, rows

MODEL = PACKAGE / "quickstart" / "model"
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": LOOP,
    "a-power": "{% set n = messages | length + 7 %}{{ n ** (n ** (n ** n)) % 7 }}",
    "a-power-of-constants": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a-product": "{{ messages[0].content * 10 ** 10 }}",
    "a-product-of-constants": "{{ 'a' * 10 ** 10 }}",
    "a-list": "{% set l = [1] * 10 ** 11 %}",
    "padding": "{{ 'a' | center(10 ** 11) }}",
    "a-format": "{{ '%99999999999d' % 1 }}",
    "a-width": "{{ '{:>99999999999}'.format(1) }}",
    "doubling": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "lists-of-lists": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x | tojson }}",
    "replacing": "{% set x = 'a' * 10 ** 5 %}{{ x.replace('a', x).replace('a', x) }}",
    "much-text": "{% for a in range(99999) %}{% for b in range(9) %}{{ 'a' * 99 }}{% endfor %}{% endfor %}",
    "a-macro-that-doubles": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    monkeypatch.setattr(rendering, "MEMORY", 300_000_000)
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_stopped_and_named(name: str, tokenizer) -> None:
    tokenizer.chat_template = HOSTILE[name]
    started = time.monotonic()
    with pytest.raises(RequestError, match="model.chat_template: the chat template .*chatml, zephyr, llama-3") as said:
        render_chat(tokenizer, CHAT)
    assert time.monotonic() - started < 30
    assert str(MODEL) in str(said.value)
    assert any(words in str(said.value) for words in ("processor time", "of memory", "characters", "ended its process"))


def test_what_a_template_raises_is_passed_on(tokenizer) -> None:
    for template, words in {
        "{{ raise_exception('only two turns') }}": "only two turns",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
        "{{ ''.__class__.__mro__ }}": "unsafe",
        "{{ messages.append(1) }}": "unsafe",
        "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe",
        "{% for a in range(10 ** 9) %}{% endfor %}": "Range too big",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(TemplateRefused, match=words):
            render_chat(tokenizer, CHAT)
    tokenizer.chat_template = "one\n{% for %}"
    with pytest.raises(TemplateRefused) as said:
        render_chat(tokenizer, CHAT)
    assert said.value.lineno == 2


def test_the_text_is_that_of_transformers(tokenizer) -> None:
    for template in (tokenizer.chat_template, CHATML, CHATML + "{{ bos_token }}{{ tools }}{{ day }}"):
        tokenizer.chat_template = template
        tools = [{"type": "function", "function": {"name": "f"}}]
        given = [
            (CHAT, {"tools": None}),
            (CHAT[:1], {"tools": None, "add_generation_prompt": True}),
            (CHAT, {"tools": tools, "day": datetime.date(2026, 1, 2)}),
            (CHAT, {"continue_final_message": True}),
            *[([{"role": "user", "content": "\ud800é" * n}], {"tools": None}) for n in range(30)],
        ]
        expected = [tokenizer.apply_chat_template(chat, tokenize=False, **options) for chat, options in given]
        with Rendering(tokenizer) as rendering_:
            assert rendering_.render(given) == expected
            assert rendering_.render(given[::-1]) == expected[::-1]


def test_one_that_fails_does_not_fail_its_neighbours(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    words = ["a", "no", "b", "no", "no", "c", "d", "e", "f", "g", "no"]
    with Rendering(tokenizer) as rendering_:
        found = rendering_.render([([{"role": "user", "content": word}], {}) for word in words])
    assert [str(text) for text in found] == words
    assert [isinstance(text, TemplateRefused) for text in found] == [word == "no" for word in words]


def trap(word: str) -> str:
    return (
        "{% for m in messages %}{% if '" + word + "' in m.content %}" + LOOP + "{% endif %}{{ m.content }}{% endfor %}"
    )


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_row_that_springs_a_trap_is_named(num_proc: int | None, tokenizer, tmp_path: Path) -> None:
    data = rows(40).map(
        lambda row, n: row | {"chosen": [{"role": "assistant", "content": f"number {n}!"}]}, with_indices=True
    )
    tokenizer.chat_template = trap("number 23!")
    with pytest.raises(TemplateUnbounded, match=r"row 23: model.chat_template: .* more than 1 s of processor time"):
        tokenize_rows(data, tokenizer, TokenizeOptions(num_proc=num_proc))


def test_every_other_place_that_renders_is_bounded(tokenizer) -> None:
    tokenizer.chat_template = LOOP
    for place in (stop_token_ids, lambda t: turn_end(t, {}), lambda t: find_turns(t, False)):
        with pytest.raises(TemplateUnbounded):
            place(tokenizer)


def test_no_other_code_renders_by_itself() -> None:
    """quickstart/build.py renders its own template, which is no model's."""
    callers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if ".apply_chat_template(" in file.read_text("utf-8").replace('"inputs = tokenizer.apply_chat_template(', "")
    }
    assert callers == {"rendering.py", "quickstart/build.py"}


def test_a_template_file_is_named(tokenizer, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(TemplateUnbounded, match="base/chat_template.jinja takes more than"):
        render_chat(AutoTokenizer.from_pretrained(tmp_path / "base"), CHAT)


def test_no_child_is_left(tokenizer) -> None:
    with Rendering(tokenizer) as rendering_:
        rendering_.render([(CHAT, {})])
        os.kill(rendering_.child.pid, signal.SIGKILL)  # as the kernel does when memory runs out
        assert rendering_.render([(CHAT, {})] * 3) == [render_chat(tokenizer, CHAT)] * 3
        pid = rendering_.child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ChildProcessError):  # and it was waited for
        os.waitpid(pid, os.WNOHANG)


def test_a_pickled_one_starts_its_own_child(tokenizer) -> None:
    import pickle

    with Rendering(tokenizer) as rendering_:
        first = rendering_.render([(CHAT, {})])
        again = pickle.loads(pickle.dumps(rendering_))
        with again:
            assert again.child is None and again.render([(CHAT, {})]) == first
