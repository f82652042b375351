"""Variables given to a chat template: those that it reads are taken, any other is refused with the nearest."""

import re

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.model.tokenizer import check_variables, render_chat
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import chat_templates
from orpo_lite.train.pipeline import run
from tests.tiny import tiny_tokenizer

READ = {
    "gptoss": {"reasoning_effort": "high", "model_identity": "me", "builtin_tools": ["python"]},
    "qwen3": {"enable_thinking": False},
    "llama3_2": {"date_string": "26 Jul 2024", "tools_in_user_message": False},
    "zephyr": {"eos_token": "</s>"},
}
"""Variables by template: each changes what it writes."""


def tokenizer(name):
    if name not in chat_templates():
        pytest.skip(f"no template {name} without TRL")
    return tiny_tokenizer(bos="<s>", chat_template=chat_templates()[name].read_text("utf-8"))


def refusal(tokenizer, *names):
    with pytest.raises(RequestError) as caught:
        check_variables(tokenizer, names, "data.template_kwargs")
    return str(caught.value)


@pytest.mark.parametrize("name", READ)
def test_variables_that_a_template_reads_are_taken(name):
    check_variables(tokenizer(name), READ[name], "data.template_kwargs")


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("gptoss", "reasoning_efort", "found 'reasoning_efort' (did you mean reasoning_effort?)"),
        ("gptoss", "enable_thinking", "reads builtin_tools, model_identity, reasoning_effort"),
        ("qwen3", "enable_thinkin", "(did you mean enable_thinking?)"),
        ("qwen3", "enable_thinking:false", "'enable_thinking:false' (YAML wants a space after the colon)"),
        ("llama3_2", "date", "reads custom_tools, date_string, tools_in_user_message"),
        ("chatml", "enable_thinking", "the chat template reads no variable; correct the name, or set data.template_kwargs={}"),
        ("chatml", "messages", "'messages' (a run sets it by itself)"),
        ("qwen3", "add_generation_prompt", "'add_generation_prompt' (a run sets it by itself)"),
    ],
)  # fmt: skip
def test_a_variable_that_it_never_reads_is_refused_with_the_nearest(name, given, told):
    assert told in refusal(tokenizer(name), given)


@pytest.mark.parametrize("name", chat_templates())
def test_no_template_reads_nonsense_and_every_variable_it_is_said_to_read_is_taken(name):
    said = refusal(tokenizer(name), "no_such_name", "neither_this")
    assert "'no_such_name'" in said and "'neither_this'" in said
    [listed] = re.findall(r"template reads (.*?);", said)
    check_variables(tokenizer(name), [] if listed == "no variable" else listed.split(", "), "")


def test_several_templates_generation_marks_and_templates_that_cannot_be_parsed():
    both = tiny_tokenizer()
    both.chat_template = {"default": "{{ a }}", "tool_use": "{%- generation -%}{{ b }}{% endgeneration %}"}
    check_variables(both, ["a", "b"], "")
    assert "reads a, b" in refusal(both, "c")
    both.chat_template = "{% for %}"  # rendering says so
    check_variables(both, ["c"], "")
    both.chat_template = None
    check_variables(both, [], "")
    assert "there is no chat template" in refusal(both, "c")


@pytest.mark.parametrize(
    "source",
    [
        "{% set mode = mode or 'plain' %}{{ mode }}",
        "{% if mode is not defined %}{% set mode = 'plain' %}{% endif %}{{ mode }}",
        "{% macro system() %}{{ mode | default('plain') }}{% endmacro %}{{ system() }}",
        "{%- set ns = namespace(mode=mode if mode is defined else 'plain') %}{{ ns.mode }}",
        "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{{ mode }}{% break %}{% endfor %}",
    ],
)
def test_however_a_template_reads_a_variable_it_is_taken(source):
    made = tiny_tokenizer(chat_template=source)
    assert render_chat(made, [{"role": "user", "content": "Hi"}], mode="fancy") == "fancy"
    check_variables(made, ["mode"], "")


def test_a_run_refuses_it_before_the_model_is_loaded():
    with pytest.raises(RequestError, match=r"data\.template_kwargs: found 'enable_thinking', .* reads no variable"):
        run(Recipe.load("quickstart", ["data.template_kwargs={enable_thinking: false}"]))
