"""Chat templates: programs that come with models, rendered in transformers' sandbox.

The sandbox (jinja2's ImmutableSandboxedEnvironment) keeps a template from files, modules and the objects that it is
given. It bounds neither time nor memory: a template that loops forever has to be stopped by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Job = tuple[list[dict[str, Any]], dict[str, Any]]
"""A conversation, and the options of apply_chat_template."""

MAX_CHARACTERS = 10_000_000
"""Longest text that a template may write for one conversation."""
BATCH = 8
"""Conversations per call of the tokenizer; one call for each costs a quarter more."""


class TemplateRefused(jinja2.TemplateError):
    """A conversation that the template does not take, with the reason in the template's words.

    Args:
        reason: why.
        lineno: line of the template where its syntax is wrong.
    """

    def __init__(self, reason: str, lineno: int | None = None):
        super().__init__(reason)
        self.lineno = lineno


def render_chats(tokenizer: PreTrainedTokenizerBase, jobs: list[Job]) -> list[str | TemplateRefused]:
    """Render conversations with the tokenizer's chat template: the text of each, or why the template refused it."""
    results: list[str | TemplateRefused] = []
    while len(results) < len(jobs):
        start = len(results)
        options, stop = jobs[start][1], start + 1
        while stop < min(start + BATCH, len(jobs)) and jobs[stop][1] == options:
            stop += 1
        conversations = [conversation for conversation, _ in jobs[start:stop]]
        try:
            texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
            results += [check_size(str(text)) for text in texts]
        except Exception:  # a template may raise anything: render each alone to find the one that it refuses
            results += [_render_alone(tokenizer, conversation, options) for conversation in conversations]
    return results


def render_chat(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], **options: Any) -> str:
    """Render one conversation.

    Raises:
        TemplateRefused: the template does not take it.
    """
    result = _render_alone(tokenizer, conversation, options)
    if isinstance(result, TemplateRefused):
        raise result
    return result


def _render_alone(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], options: dict[str, Any]
) -> str | TemplateRefused:
    try:
        return check_size(str(tokenizer.apply_chat_template(conversation, tokenize=False, **options)))
    except Exception as error:  # a template may raise anything, its own refusals included
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return TemplateRefused(" ".join(str(error).split())[:500] or type(error).__name__, line)


def check_size(text: str) -> str | TemplateRefused:
    """Return the text, or a refusal if it is longer than MAX_CHARACTERS."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return TemplateRefused(f"the template writes {len(text):,} characters, at most {MAX_CHARACTERS:,} are allowed")
