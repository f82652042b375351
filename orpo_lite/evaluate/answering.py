"""Answer conversations with the models of a run, in the form they were trained on, and score answers as training does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.collate import PaddedCollator
from orpo_lite.data.row_shapes import BARE_STRINGS, HH, HH_ANSWER, STRINGS, row_shape
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.evaluate.held_out import base_only
from orpo_lite.evaluate.loading import ModelSource, load_model, resolve_model
from orpo_lite.model import autocast, load_base
from orpo_lite.model.chat_template import TemplateRefused, render_chats
from orpo_lite.objective.head import HeadTransform, LabelRows, head_transform, score_labels, score_logits
from orpo_lite.objective.loss import pair_statistics
from orpo_lite.trainer.generate import Sampling, generate, stop_tokens
from orpo_lite.trainer.model_setup import decoder_start
from orpo_lite.trainer.run_folder import tokenizer_of

Turns = list[dict[str, Any]]
"""Messages: an optional system turn, then user and assistant in alternation."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    tokens: int
    """Generated tokens, including the one that ends the answer."""
    ended: bool
    """True where the model ended it, rather than a limit or Ctrl-C."""


class PromptFormat:
    """The form in which turns become a prompt: by the chat template, as Anthropic HH strings, or as the plain text of the last turn.

    Args:
        tokenizer: as trained with.
        source: its run.json says which shape the training rows had; a folder without one uses the template if it has any.
    """

    def __init__(self, tokenizer: Any, source: ModelSource):
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = dict(source.recipe.data.template_kwargs) if source.recipe else {}
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

    def texts(self, conversations: list[Turns]) -> list[str]:
        """Render the prompt of each conversation, up to where the answer starts.

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
    """One model, or two of which one is the other's base, under one tokenizer and prompt format.

    Args:
        source: where they come from.
        model: with the adapter on, or whole.
        tokenizer: as trained with.
    """

    def __init__(self, source: ModelSource, model: Any, tokenizer: Any):
        self.source, self.model, self.tokenizer = source, model.eval(), tokenizer
        self.format = PromptFormat(tokenizer, source)
        self.names = source.names
        self.stops = stop_tokens(model, tokenizer)
        self.transforms: dict[int, HeadTransform | None] = {}
        self.other: Any = None
        """The base of a fine-tuned model, loaded at its first use."""

    @contextlib.contextmanager
    def side(self, name: str) -> Iterator[Any]:
        """Provide the model of one of `names`."""
        if name == self.names[-1]:
            yield self.model
        elif self.source.kind == "adapter":
            with base_only(self.model):
                yield self.model
        else:
            if self.other is None:
                assert self.source.base is not None
                self.other = load_base(self.source.base, self.tokenizer)[0].eval()
            yield self.other

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together that the model has positions for; None where it names no limit."""
        if self.model.config.is_encoder_decoder:
            return None
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def prompts(self, conversations: list[Turns]) -> list[list[int]]:
        """Tokenize each prompt as training does: nothing is added but a BOS that the tokenizer has and the text lacks."""
        texts = self.format.texts(conversations)
        if self.model.config.is_encoder_decoder:
            return [self.tokenizer(text)["input_ids"] for text in texts]
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        bos = self.tokenizer.bos_token_id
        return [[bos, *ids] if bos is not None and ids[:1] != [bos] else ids for ids in found]

    def room(self, ids: list[int], wanted: int) -> int:
        """Compute how many of `wanted` tokens an answer to this prompt can have; 0 or less where it does not fit."""
        return wanted if self.context is None else min(wanted, self.context - len(ids))

    def replies(
        self,
        name: str,
        prompts: list[list[int]],
        sampling: Sampling,
        streamer: Any = None,
        stopping: Any = None,
    ) -> list[Reply]:
        """Answer prompts as one batch."""
        with self.side(name) as model, autocast(model):
            made = generate(model, self.tokenizer, prompts, sampling, self.stops, streamer, stopping)
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [
            Reply(self.format.answer(text), len(ids), bool(ids) and ids[-1] in (self.stops or ()))
            for text, ids in zip(texts, made, strict=True)
        ]

    def reply(
        self,
        name: str,
        turns: Turns,
        sampling: Sampling,
        streamer: Any = None,
        stopping: Any = None,
    ) -> Reply:
        """Answer one conversation.

        Raises:
            RequestError: it does not fit the model's context.
        """
        [ids] = self.prompts([turns])
        room = self.room(ids, sampling.max_new_tokens)
        if room < 1:
            raise RequestError(f"the conversation has {len(ids):,} tokens, and the model takes {self.context:,}")
        return self.replies(name, [ids], replace(sampling, max_new_tokens=room), streamer, stopping)[0]

    def mean_logps(self, turns: Turns, first: str, second: str) -> dict[str, tuple[float, float]]:
        """Compute the mean log-prob per completion token, the end included, of two answers under every side.

        Raises:
            RequestError: an answer that training would drop.
        """
        batch = self.pair_batch(turns, first, second)
        found = {}
        for name in self.names:
            with self.side(name) as model:
                found[name] = self.score(model, batch)
        return found

    def pair_batch(self, turns: Turns, first: str, second: str) -> dict[str, Any]:
        """Tokenize two answers as a row of training data would be, as a batch on the model's device.

        Raises:
            RequestError: the template refuses it, or an answer has no token.
        """
        encoder_decoder, recipe = bool(self.model.config.is_encoder_decoder), self.source.recipe
        options = TokenizeOptions(
            max_length=None,
            max_completion_length=2**20 if encoder_decoder else None,
            completion_end=recipe.data.completion_end if recipe else "turn",
            template_kwargs=self.format.options,
            encoder_decoder=encoder_decoder,
        )
        row = self.format.row(turns, first, second)
        shape = row_shape(row)
        assert shape is not None
        chunk = PairTokenizer(self.tokenizer, options, shape)([(0, row)])
        if chunk.drops:
            _, reason, detail = chunk.drops[0]
            raise RequestError(f"training would drop this pair: {reason} ({detail})")
        start = decoder_start(self.model.config) if encoder_decoder else None
        collate = PaddedCollator(self.tokenizer.pad_token_id or 0, "chosen", start)
        pair = {name: values[0] for name, values in chunk.columns.items()}
        return {key: value.to(self.model.device) for key, value in collate([pair]).items()}

    @torch.no_grad()
    def score(self, model: Any, batch: dict[str, Any]) -> tuple[float, float]:
        """Compute the mean log-prob of the first and of the second answer under a model as it stands."""
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        target = LabelRows(batch["label_rows"], batch["label_ids"])
        with autocast(model):
            if id(model) not in self.transforms:
                tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
                self.transforms[id(model)] = head_transform(model, model.device, tolerance)
            transform = self.transforms[id(model)]
            with contextlib.nullcontext() if transform is None else score_labels(model, target, transform, None):
                logits = model(**inputs, use_cache=False).logits
        logps, means = score_logits(logits, target) if transform is None else (logits.float(), target.means)
        assert means is not None
        stats = pair_statistics(logps, means, batch["chosen_pair"], batch["rejected_pair"], batch["nll_pair"], 1)
        return stats.chosen_logps.item(), stats.rejected_logps.item()


def write(text: str) -> None:
    """Write a model's text to the terminal at once, every control character escaped by itself, so that no sequence can
    be assembled from parts."""
    console.file.write(visible(text))
    console.file.flush()


class Stream:
    """A streamer for transformers' generate that writes an answer while it is generated.

    Args:
        strip: leave out the whitespace before the first word.
    """

    def __init__(self, tokenizer: Any, out: Callable[[str], None] = write, strip: bool = True):
        self.tokenizer, self.out, self.strip = tokenizer, out, strip
        self.ids: list[int] = []
        self.written = ""
        """The part of the text of `ids` that is written already."""
        self.prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt, then one token at a time."""
        if self.prompt:
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self._write(text.rstrip("\ufffd"))  # the first bytes of a character, whose others are in the next tokens
        if text.endswith("\n"):
            self.ids, self.written = [], ""

    def end(self) -> None:
        """Write what was held back."""
        self._write(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        new, self.written = text[len(self.written) :], max(text, self.written, key=len)
        if self.strip:
            new = new.lstrip()
        if new:
            self.strip = False
            self.out(new)


class Interruptible:
    """A stopping criterion: while open, Ctrl-C ends an answer at its next token; pressed again it does not wait for that.

    Attributes:
        asked: whether it was pressed.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruptible:
        self.before = signal.signal(signal.SIGINT, self._on)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _on(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Tell generate, after each token, which rows to stop: (batch,) bool."""
        return (input_ids[:, 0] == input_ids[:, 0]) & self.asked


def load_answerer(
    path: str,
    trust_remote_code: bool = False,
    compare: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Answerer:
    """Load what a path names.

    Args:
        compare: the option that needs two sides, for the error where there is only one.
        say: prints what is about to be loaded.

    Raises:
        RequestError: no model that can answer there.
    """
    source = resolve_model(path, trust_remote_code)
    if compare and len(source.names) < 2:
        raise RequestError(
            f"{compare}: {path} is a whole model, so there is no base to compare it with: give the run or adapter folder "
            "that it was merged from"
        )
    say(f"loading {source}")
    tokenizer = tokenizer_of(Path(source.path), source.model)
    model, _ = load_model(source, source.recipe, tokenizer)
    return Answerer(source, model, tokenizer)
