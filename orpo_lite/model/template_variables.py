"""Variables of chat templates: which of them a template reads, and the refusal of any other."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
import jinja2.nodes

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tags, around what the assistant wrote."""
GIVEN = {"messages", "tools", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
"""Variables that every rendering sets by itself, so that a value for them would go unread or do harm."""


def check_variables(tokenizer: PreTrainedTokenizerBase, names: Collection[str], field: str) -> None:
    """Refuse variables for the chat template that it never reads.

    Args:
        tokenizer: with one template, several by name, or none.
        names: of the variables.
        field: where they were given, for the error.

    Raises:
        RequestError: it never reads one of them; the message names the nearest that it does read.
    """
    if not names:
        return
    try:
        read, known = variables(tokenizer)
    except jinja2.TemplateSyntaxError:
        return  # rendering says what is wrong
    unread = [name for name in names if name not in read]
    if not unread:
        return
    lines = []
    for name in unread:
        meant = " (YAML wants a space after the colon)" if ":" in name else nearest(name, known)
        lines.append(shown(name) + (" (a run sets it by itself)" if name in GIVEN else meant))
    there = f"the chat template reads {', '.join(known) or 'no variable'}"
    raise RequestError(
        f"{field}: found {', '.join(lines)}, which would change nothing: "
        f"{there if tokenizer.chat_template else 'there is no chat template'}; correct the name, or set {field}={{}}"
    )


def variables(tokenizer: PreTrainedTokenizerBase) -> tuple[set[str], list[str]]:
    """Return the variables that the tokenizer's templates may read from outside, and among them those that are options.

    Raises:
        jinja2.TemplateSyntaxError: a template cannot be parsed.
    """
    template: Any = tokenizer.chat_template or ""
    trees = [parse(source) for source in (template.values() if isinstance(template, dict) else [template])]
    read = set().union(*map(jinja2.meta.find_undeclared_variables, trees)) - GIVEN
    return read, sorted(name for name in set().union(*map(options, trees)) & read if not name.endswith("_token"))


def parse(source: str) -> jinja2.nodes.Template:
    """Parse a template as transformers does; nothing is rendered."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 (no page)
    return environment.parse(MARKS.sub("", source))


def options(tree: jinja2.nodes.Template) -> set[str]:
    """Return the names that a template only reads, and those for which it has a default."""
    names = list(tree.find_all(jinja2.nodes.Name))
    asked = {one.node.name for one in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
             if one.name in ("defined", "undefined", "default", "d") and isinstance(one.node, jinja2.nodes.Name)}  # fmt: skip
    return ({one.name for one in names} - {one.name for one in names if one.ctx != "load"}) | asked
