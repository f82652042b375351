"""Answer conversations with the models of a run, in the form they were trained on, and score answers as training does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import TextStreamer

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.conversations import Forms, find_forms, formed
from orpo_lite.data.row_shapes import BARE_STRINGS, HH, HH_ANSWER, STRINGS, row_shape, without_system
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.evaluate.loading import ModelSource, Side
from orpo_lite.model import autocast, stop_token_ids
from orpo_lite.model.tokenizer import TemplateRefused, render_chats
from orpo_lite.trainer.generate import Sampling, generate, mean_logps

Turns = list[dict[str, Any]]
"""Messages: an optional system turn, then user and assistant in alternation."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    tokens: int
    """Generated tokens, including the one that ends the answer."""
    ended: bool
    """True where the model ended it, rather than a limit."""


class PromptFormat:
    """The form in which turns become a prompt: by the chat template, as Anthropic HH strings, or as the plain text of the last turn.

    Args:
        tokenizer: as trained with.
        source: its run.json says which shape the training rows had; a folder without one uses the template if it has any.
    """

    def __init__(self, tokenizer: Any, source: ModelSource):
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = dict(source.recipe.data.template_kwargs) if source.recipe else {}
        self.merges_system = bool(source.recipe) and source.recipe.data.system == "merge"
        self.kind: Literal["template", "HH", "plain"] = "template" if tokenizer.chat_template else "plain"
        shapes = source.row_shapes
        if shapes and not (source.recipe and source.recipe.data.apply_template):
            self.kind = "HH" if shapes == {HH} else "plain" if shapes <= {HH, STRINGS, BARE_STRINGS} else self.kind

    @property
    def note(self) -> str | None:
        """Tell the user how messages are turned into prompts, where that is not by the chat template."""
        return {
            "plain": "trained on plain strings, without a chat template: each message is a prompt of its own",
            "HH": "trained on Anthropic HH strings: turns are written as Human: and Assistant:",
        }.get(self.kind)

    @cached_property
    def forms(self) -> Forms:
        """Find the forms in which the chat template takes reasoning and calls, as training does."""
        return find_forms(self.tokenizer, self.options)[0]

    def texts(self, conversations: list[Turns]) -> list[str]:
        """Render the prompt of each conversation, up to where the answer starts.

        Raises:
            RequestError: a conversation that the template refuses, or a system turn where there is no place for one.
        """
        if self.kind != "template":
            return [self.plain(turns) for turns in conversations]
        options = self.options | {"add_generation_prompt": True}
        if self.merges_system:
            conversations = [without_system(turns) for turns in conversations]
        texts = render_chats(self.tokenizer, [(formed(turns, self.forms), options) for turns in conversations])
        for text in texts:
            if isinstance(text, TemplateRefused):
                raise RequestError(f"the chat template refuses this conversation: {text}")
        return texts  # type: ignore[return-value]  # refusals are raised

    def plain(self, turns: Turns) -> str:
        """Render one conversation without a template."""
        if turns[0]["role"] == "system":
            raise RequestError("a system turn needs a chat template, and this model was trained without one")
        if self.kind == "plain":
            return turns[-1]["content"]
        names = {"user": "\n\nHuman: ", "assistant": HH_ANSWER + " "}
        return "".join(names[turn["role"]] + turn["content"] for turn in turns) + HH_ANSWER

    def answer(self, text: str) -> str:
        """Strip the whitespace around a generated text, which is part of the format; plain strings have none."""
        return text if self.kind == "plain" else text.strip()

    def row(self, turns: Turns, chosen: str, rejected: str) -> dict[str, Any]:
        """Build a preference row that `orpo_lite.train` renders to the same prompt: conversations, or strings."""
        if self.kind == "template":
            sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
            return {"prompt": turns, "chosen": sides[0], "rejected": sides[1]}
        space = " " if self.kind == "HH" else ""
        return {"prompt": self.plain(turns), "chosen": space + chosen, "rejected": space + rejected}


class Answerer:
    """A side that answers and scores answers, under its own tokenizer and prompt format; loaded at first use."""

    def __init__(self, side: Side):
        self.side, self.name, self.source = side, side.name, side.source

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as trained with."""
        return self.side.weights.tokenizer

    @cached_property
    def format(self) -> PromptFormat:
        """The form of its prompts."""
        return PromptFormat(self.tokenizer, self.source)

    @cached_property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_token_ids(self.tokenizer, self.side.weights.loaded[0].generation_config)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that the model has positions for; None where it names no limit."""
        config = self.side.weights.loaded[0].config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def prompts(self, conversations: list[Turns]) -> list[list[int]]:
        """Tokenize each prompt as training does: nothing is added but a BOS that the tokenizer has and the text lacks."""
        texts = self.format.texts(conversations)
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        bos = self.tokenizer.bos_token_id
        return [[bos, *ids] if bos is not None and ids[:1] != [bos] else ids for ids in found]

    def room(self, ids: list[int], wanted: int) -> int:
        """Compute how many of `wanted` tokens an answer to this prompt can have; 0 or less where it does not fit."""
        return wanted if self.context is None else min(wanted, self.context - len(ids))

    def replies(self, prompts: list[list[int]], sampling: Sampling, streamer: Stream | None = None) -> list[Reply]:
        """Answer prompts as one batch; a streamer takes a single one."""
        with self.side.model() as model, autocast(model):
            made = generate(model, self.tokenizer, prompts, sampling, self.stops, streamer)
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [
            Reply(self.format.answer(text), len(ids), bool(ids) and ids[-1] in self.stops)
            for text, ids in zip(texts, made, strict=True)
        ]

    def reply(self, turns: Turns, sampling: Sampling, streamer: Stream | None = None) -> Reply:
        """Answer one conversation.

        Raises:
            RequestError: it does not fit the model's context.
        """
        [ids] = self.prompts([turns])
        room = self.room(ids, sampling.max_new_tokens)
        if room < 1:
            raise RequestError(f"the conversation has {len(ids):,} tokens, and the model takes {self.context:,}")
        return self.replies([ids], replace(sampling, max_new_tokens=room), streamer)[0]

    def stream(self) -> Stream:
        """Make a streamer that writes an answer to the terminal."""
        return Stream(self.tokenizer, strip=self.format.kind != "plain")

    def mean_logps(self, turns: Turns, first: str, second: str) -> torch.Tensor:
        """Compute the mean log-prob per completion token, the end included, of two answers in the form of training, (2,).

        Raises:
            RequestError: an answer that training would drop.
        """
        recipe = self.source.recipe
        options = TokenizeOptions(
            max_length=None,
            completion_end=recipe.data.completion_end if recipe else "turn",
            template_kwargs=self.format.options,
        )
        row = self.format.row(turns, first, second)
        shape = row_shape(row)
        assert shape is not None
        chunk = PairTokenizer(self.tokenizer, options, shape)([(0, row)])
        if chunk.drops:
            _, reason, detail = chunk.drops[0]
            raise RequestError(f"training would drop this pair: {reason} ({detail})")
        with self.side.model() as model, autocast(model):
            return mean_logps(model, {name: values[0] for name, values in chunk.columns.items()}, model.device)


def write(text: str) -> None:
    """Write a model's text to the terminal at once, every control character escaped by itself, so that no sequence can
    be assembled from parts."""
    console.file.write(visible(text))
    console.file.flush()


class Stream(TextStreamer):
    """A streamer for transformers' generate that writes an answer, word by word, while it is generated.

    Args:
        strip: leave out the whitespace before the first word.
    """

    def __init__(self, tokenizer: Any, out: Callable[[str], None] = write, strip: bool = True):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out, self.strip = out, strip
        self.text = ""
        """The part of the answer that is written."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the words that are complete, and a line break at the end."""
        if self.strip and not self.text:
            text = text.lstrip()
        self.text += text
        self.out(text + "\n" * stream_end)
