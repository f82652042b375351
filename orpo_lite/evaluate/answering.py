"""The models of a run, ready to answer conversations and to say how likely an answer is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.form import Form, Turns
from orpo_lite.evaluate.held_out import base_only
from orpo_lite.evaluate.model_source import Found, find
from orpo_lite.evaluate.score import Scorer
from orpo_lite.model import attach_adapter, autocast, load_base, load_tokenizer
from orpo_lite.recipe import AdapterSection
from orpo_lite.trainer.generate import Sampling, generate, stop_tokens


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    tokens: int
    """That were generated, the one that ends the answer included."""
    ended: bool
    """Whether the model ended it, rather than a limit or Ctrl-C."""


class Answerer:
    """One model, or two of which one is the other's base, under one tokenizer and form.

    Args:
        found: where they are.
        model: with the adapter on, or whole.
        tokenizer: as trained with.
    """

    def __init__(self, found: Found, model: Any, tokenizer: Any):
        self.found, self.model, self.tokenizer = found, model.eval(), tokenizer
        self.form = Form(tokenizer, found)
        self.names = found.names
        self.stops = stop_tokens(model, tokenizer)
        self.scorer = Scorer(tokenizer, self.form, found.recipe)
        self.other: Any = None
        """The base of a fine-tuned model, loaded when it is first asked for."""

    @contextlib.contextmanager
    def side(self, name: str) -> Iterator[Any]:
        """The model of one of `names`."""
        if name == self.names[-1]:
            yield self.model
        elif self.found.kind == "adapter":
            with base_only(self.model):
                yield self.model
        else:
            if self.other is None:
                assert self.found.base is not None
                self.other = load_base(self.found.base, self.tokenizer)[0].eval()
            yield self.other

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that the model has positions for; None where it names no limit."""
        if self.model.config.is_encoder_decoder:
            return None
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def prompts(self, conversations: list[Turns]) -> list[list[int]]:
        """Token ids of each prompt, as in training: nothing added but a BOS that the tokenizer has and the text lacks."""
        texts = self.form.texts(conversations)
        if self.model.config.is_encoder_decoder:
            return [self.tokenizer(text)["input_ids"] for text in texts]
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        bos = self.tokenizer.bos_token_id
        return [[bos, *ids] if bos is not None and ids[:1] != [bos] else ids for ids in found]

    def room(self, ids: list[int], wanted: int) -> int:
        """How many of `wanted` tokens an answer to this prompt can have; 0 or less where it does not fit."""
        return wanted if self.context is None else min(wanted, self.context - len(ids))

    def replies(
        self,
        name: str,
        prompts: list[list[int]],
        sampling: Sampling,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteria | None = None,
    ) -> list[Reply]:
        """Answers to some prompts, as a batch."""
        with self.side(name) as model, autocast(model):
            made = generate(model, self.tokenizer, prompts, sampling, self.stops, streamer, stopping)
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [
            Reply(self.form.answer(text), len(ids), bool(ids) and ids[-1] in (self.stops or ()))
            for text, ids in zip(texts, made, strict=True)
        ]

    def reply(
        self,
        name: str,
        turns: Turns,
        sampling: Sampling,
        streamer: BaseStreamer | None = None,
        stopping: StoppingCriteria | None = None,
    ) -> Reply:
        """The answer to one conversation.

        Raises:
            RequestError: it does not fit the model's context.
        """
        [ids] = self.prompts([turns])
        room = self.room(ids, sampling.max_new_tokens)
        if room < 1:
            raise RequestError(f"the conversation has {len(ids):,} tokens, and the model takes {self.context:,}")
        return self.replies(name, [ids], replace(sampling, max_new_tokens=room), streamer, stopping)[0]

    def mean_logps(self, turns: Turns, first: str, second: str) -> dict[str, tuple[float, float]]:
        """Mean log-prob a completion token, the end included, of two answers under every side, as training has it.

        Raises:
            RequestError: an answer that training would drop.
        """
        batch = self.scorer.batch(turns, first, second, self.model)
        found = {}
        for name in self.names:
            with self.side(name) as model:
                found[name] = self.scorer.score(model, batch)
        return found


def open_answerer(
    path: str,
    trust_remote_code: bool = False,
    compare: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Answerer:
    """Load what a path names.

    Args:
        compare: what asks for two sides, for the error where there is one only.
        say: told what is loaded, before it is.

    Raises:
        RequestError: nothing that can answer there.
    """
    found = find(path, trust_remote_code)
    if compare and len(found.names) < 2:
        raise RequestError(
            f"{compare}: {path} is a whole model, so there is no base beside it to compare with: give the run or adapter "
            "folder that it was merged from"
        )
    say(f"loading {describe(found)}")
    folder = Path(found.path)
    where = found.model
    if found.kind == "adapter":
        if (folder / "tokenizer_config.json").is_file():
            where = where.model_copy(update={"name_or_path": str(folder), "gguf_file": None, "revision": None})
        tokenizer = load_tokenizer(where)
        base, _ = load_base(found.model, tokenizer)
        model: Any = attach_adapter(base, AdapterSection(init_from=found.path), tokenizer=tokenizer)
    else:
        tokenizer = load_tokenizer(where)
        model, _ = load_base(found.model, tokenizer)
    return Answerer(found, model, tokenizer)


def describe(found: Found) -> str:
    """What it is, in words."""
    if found.kind == "model":
        return f"{found.path}, a whole model"
    if found.kind == "fine-tuned":
        assert found.base is not None
        return f"{found.path}, fine-tuned from {found.base.name_or_path}"
    held = "" if found.model.quantization == "none" else f", {found.model.quantization}"
    return f"{found.path}, an adapter on {found.model.name_or_path}{held}"
