"""Chat templates of models from anywhere: what they raise, reach for or write is a refusal of that conversation."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.model.tokenizer import MAX_CHARACTERS, TemplateRefused, render_chat
from orpo_lite.recipe.loading import PACKAGE, resolve_path
from tests.training import CHATML, rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_path("builtin:quickstart/model"))


def test_what_a_template_raises_is_passed_on(tokenizer) -> None:
    for template, words in {
        "{{ raise_exception('only two turns') }}": "only two turns",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
        "{{ ''.__class__.__mro__ }}": "unsafe",
        "{{ messages.append(1) }}": "unsafe",
        "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe",
        "{% for a in range(10 ** 9) %}{% endfor %}": "Range too big",
        "{{ messages[0].content * 10 ** 15 }}": "MemoryError",
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
        assert [render_chat(tokenizer, chat, **options) for chat, options in given] == expected


def test_a_row_for_which_the_template_writes_too_much_is_dropped_by_name(tokenizer) -> None:
    answers = [[{"role": "assistant", "content": f"number {n}!"}] for n in range(40)]
    data = rows(40).remove_columns("chosen").add_column("chosen", answers)
    flood = f"{{{{ 'a' * {MAX_CHARACTERS + 1} }}}}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'number 23!' in m.content %}" + flood + "{% endif %}{{ m.content }}{% endfor %}"
    )
    _, report = tokenize_rows(data, tokenizer, TokenizeOptions())
    [drop] = report.drops
    assert drop.row == 23 and "the template writes 10,000,0" in drop.detail


def test_no_other_code_renders_by_itself() -> None:
    callers = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if ".apply_chat_template(" in file.read_text("utf-8").replace('"inputs = tokenizer.apply_chat_template(', "")
    }
    assert callers == {"model/tokenizer.py"}


def test_a_template_that_is_a_file_of_the_model_is_sandboxed_too(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('true') }}")
    with pytest.raises(TemplateRefused, match="unsafe"):
        render_chat(AutoTokenizer.from_pretrained(tmp_path), CHAT)
