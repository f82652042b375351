"""Conversations as text, in the form that the model was trained on; and as rows that train it again."""

from __future__ import annotations

from typing import Any, Literal

from orpo_lite.common.errors import RequestError
from orpo_lite.data.row_shapes import BARE_STRINGS, HH, HH_ANSWER, STRINGS
from orpo_lite.evaluate.model_source import Found
from orpo_lite.model.chat_template import TemplateRefused, render_chats

Turns = list[dict[str, Any]]
"""Messages: system or none, then user and assistant by turns."""


class Form:
    """How turns become a prompt: by the chat template, as Anthropic HH strings, or plainly the last user's words.

    Args:
        tokenizer: as trained with.
        found: whose run.json says what the rows looked like; a folder without one takes the template if it has any.
    """

    def __init__(self, tokenizer: Any, found: Found):
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = dict(found.recipe.data.template_kwargs) if found.recipe else {}
        self.kind: Literal["template", "HH", "plain"] = "template" if tokenizer.chat_template else "plain"
        sources = found.facts.get("data", {}).get("sources", {}).values()
        shapes = {one.get("shape") for one in sources if one.get("section") == "train"}
        if shapes and not (found.recipe and found.recipe.data.apply_template):
            self.kind = "HH" if shapes == {HH} else "plain" if shapes <= {HH, STRINGS, BARE_STRINGS} else self.kind

    @property
    def note(self) -> str | None:
        """What the user has to know of it."""
        if self.kind == "plain":
            return "trained on plain strings, without a chat template: what you write is the prompt, each time anew"
        return (
            "trained on Anthropic HH strings: turns are written as Human: and Assistant:" if self.kind == "HH" else None
        )

    def texts(self, conversations: list[Turns]) -> list[str]:
        """The prompt of each conversation, up to where the answer starts.

        Raises:
            RequestError: a conversation that the template refuses, or a system turn where there is no place for one.
        """
        if self.kind != "template":
            return [self.plain(turns) for turns in conversations]
        options = self.options | {"add_generation_prompt": True}
        texts = render_chats(self.tokenizer, [(turns, options) for turns in conversations])
        for text in texts:
            if isinstance(text, TemplateRefused):
                raise RequestError(f"the chat template refuses this conversation: {text}")
        return texts  # type: ignore[return-value]  # refusals are raised

    def plain(self, turns: Turns) -> str:
        if turns[0]["role"] == "system":
            raise RequestError("a system turn needs a chat template, and this model was trained without one")
        if self.kind == "plain":
            return turns[-1]["content"]
        names = {"user": "\n\nHuman: ", "assistant": HH_ANSWER + " "}
        return "".join(names[turn["role"]] + turn["content"] for turn in turns) + HH_ANSWER

    def answer(self, text: str) -> str:
        """A generated text as the content of a turn: the space around it belongs to the form, unless there is none."""
        return text if self.kind == "plain" else text.strip()

    def row(self, turns: Turns, chosen: str, rejected: str) -> dict[str, Any]:
        """A preference row that `orpo_lite.train` renders to the same prompt: conversations, or strings."""
        if self.kind == "template":
            sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            return {"prompt": turns, "chosen": sides[0], "rejected": sides[1]}
        space = " " if self.kind == "HH" else ""
        return {"prompt": self.plain(turns), "chosen": space + chosen, "rejected": space + rejected}
