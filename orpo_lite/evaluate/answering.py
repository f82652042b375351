"""Models that are compared: each answers in the form that it was trained on, and scores answers as training does."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.conversations import Forms, find_forms, formed
from orpo_lite.data.row_shapes import BARE_STRINGS, HH, HH_ANSWER, STRINGS, row_shape, without_system
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.evaluate.loading import ModelSource, resolve_model, writes_to_base
from orpo_lite.model import BaseFacts, attach_adapter, autocast, load_base, stop_token_ids
from orpo_lite.model.adapter import lora_config, vocabulary_rows
from orpo_lite.model.base import resize_embeddings
from orpo_lite.model.tokenizer import TemplateRefused, render_chat
from orpo_lite.model.untrusted_files import ADAPTER_WEIGHTS
from orpo_lite.recipe import AdapterSection
from orpo_lite.trainer.generate import Sampling, generate, mean_logps
from orpo_lite.trainer.run_folder import check_tokens_have_rows, naming_base, tokenizer_of

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

    @property
    def remark(self) -> str | None:
        """Say what the text alone does not show."""
        if not self.ended:
            return f"cut after {self.tokens:,} tokens: --max-new-tokens"
        return None if self.text.strip() else "ended at once"


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
        try:
            return [render_chat(self.tokenizer, formed(turns, self.forms), **options) for turns in conversations]
        except TemplateRefused as refusal:
            raise RequestError(f"the chat template refuses this conversation: {refusal}") from None

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


class Side:
    """A model that answers and scores answers: its weights, tokenizer and prompt format, loaded at first use.

    Args:
        name: as tables and rows call it.
        adapted: the side whose adapter is switched off for this one.
    """

    def __init__(self, name: str, source: ModelSource, adapted: Side | None = None):
        self.name, self.source, self.adapted = name, source, adapted

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as trained with."""
        if self.adapted:
            return self.adapted.tokenizer
        with contextlib.redirect_stdout(sys.stderr), self.naming_base():  # what is said about it is no answer
            return tokenizer_of(Path(self.source.path), self.source.model)

    @cached_property
    def loaded(self) -> tuple[Any, BaseFacts]:
        """The model in evaluation mode, with the adapter on where there is one."""
        if self.adapted:
            return self.adapted.loaded
        errors.print(f"loading {self.source}", soft_wrap=True, markup=False)
        model: Any
        gc.collect()  # models that are no longer used hold themselves in cycles
        with self.naming_base():
            model, facts = load_base(self.source.model, self.tokenizer)
        folder, spec = Path(self.source.path), self.source.model
        if self.source.kind == "adapter":
            model = attach_adapter(model, AdapterSection(init_from=self.source.path), tokenizer=self.tokenizer)
        elif self.source.kind == "base" and (folder / "adapter_config.json").is_file():
            held = len(model.get_input_embeddings().weight)
            if (rows := vocabulary_rows(model, folder, lora_config(str(folder)))) > held:
                resize_embeddings(model, rows)
                errors.print(f"base: tokens from {held} on, which the adapter adds, have the mean of its embeddings")
        check_tokens_have_rows(self.tokenizer, len(model.get_input_embeddings().weight), folder, spec)
        return model.eval(), facts

    def naming_base(self) -> contextlib.AbstractContextManager[None]:
        """Report errors about the base of an adapter by what names it."""
        folder = Path(self.source.path)
        adapter = (folder / "adapter_config.json").is_file()
        return naming_base(folder, self.source.model) if adapter else contextlib.nullcontext()

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """Provide its model, as long as no other side is in use."""
        with self.loaded[0].disable_adapter() if self.adapted else contextlib.nullcontext():
            yield self.loaded[0]

    def identity(self) -> dict[str, Any]:
        """Say which weights it has, so that another's answers are not taken for its own."""
        named = {"model": "/".join(filter(None, (self.source.model.name_or_path, self.source.model.gguf_file)))}
        if self.adapted or self.source.kind != "adapter":
            return named
        weights = (Path(self.source.path) / ADAPTER_WEIGHTS).read_bytes()
        return named | {"adapter": self.source.path, "weights": hashlib.sha256(weights).hexdigest()[:16]}

    @cached_property
    def format(self) -> PromptFormat:
        """The form of its prompts."""
        return PromptFormat(self.tokenizer, self.source)

    @cached_property
    def stops(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_token_ids(self.tokenizer, self.loaded[0].generation_config)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that the model has positions for; None where it names no limit."""
        config = self.loaded[0].config.get_text_config(decoder=True)
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
        with self.model() as model, autocast(model):
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
        with self.model() as model, autocast(model):
            return mean_logps(model, {name: values[0] for name, values in chunk.columns.items()}, model.device)


def find_sides(
    path: str,
    trust_remote_code: bool = False,
    base: str | None = None,
    against: str | None = None,
    option: str | None = None,
) -> list[Side]:
    """Find what a path names and what it is compared with: `against`, else its own base; a whole model has none.

    Args:
        base: another base for the adapter at `path`.
        option: the option that needs two sides.

    Returns:
        One or two sides; that of `path` is the last.

    Raises:
        RequestError: as `resolve_model`; another base for a whole model; nothing to compare with, or the same.
    """
    source = resolve_model(path, trust_remote_code, base)
    if base is not None and source.kind != "adapter":
        raise RequestError(f"--base: {path} is a whole model, which has no other base: leave --base out")
    if against is None:
        trained = Side(source.kind, source)
        if source.kind == "adapter" and not writes_to_base(source):
            return [Side("base", replace(source, kind="base"), adapted=trained), trained]
        if before := source.model if source.kind == "adapter" else source.base:
            return [Side("base", replace(source, kind="base", model=before)), trained]
        if option:
            raise RequestError(
                f"{option}: {path} is a whole model, so there is no base to compare it with: name what to compare it with "
                "by --against, or give the run or adapter folder that it was merged from"
            )
        return [trained]
    other = resolve_model(against, trust_remote_code)
    if (source.path, source.model) == (other.path, other.model):
        raise RequestError(f"--against: {against} is the model that it would be compared with: name another one")
    names = [against.rstrip("/"), path.rstrip("/")]
    if names[0] == names[1]:
        names = [f"{names[0]} on {one.model.name_or_path}" for one in (other, source)]
    elif os.path.basename(names[0]) != os.path.basename(names[1]):
        names = [*map(os.path.basename, names)]
    return [Side(names[0], other), Side(names[1], source)]


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
