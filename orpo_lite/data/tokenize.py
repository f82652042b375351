"""A chunk of raw rows -> tokenized pairs: boundary, BOS, EOS, truncation. TRL's tokens unless asked otherwise."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from orpo_lite.common import safe_yaml
from orpo_lite.common.text import counted
from orpo_lite.data.conversations import (
    Answers,
    Rendered,
    Renderer,
    last_special,
    special_tokens,
    spoken,
    template_markers,
)
from orpo_lite.data.dropped_rows import (
    COMPLETION_TOO_LONG,
    CUT_EQUAL,
    EQUAL,
    NO_LABELS,
    PROMPT_TOO_LONG,
    TEMPLATED,
    WITHOUT_TEMPLATE,
    WRONG_TYPES,
    Dropped,
)
from orpo_lite.data.lengths import answer_tokens
from orpo_lite.data.quality import COLUMNS, describe, hashed
from orpo_lite.data.row_formats import Numbered, spread
from orpo_lite.data.row_shapes import BARE_STRINGS, FAMILY, HH, SIDES, Pair, started, to_pair, without_system
from orpo_lite.recipe import DataSection, DataSource

UNLIMITED = 2**31 - 1
Ids = list[int]
NOTES: dict[str, dict[str, str]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))


class TokenizeOptions(DataSection):
    """Rules for turning rows into tokens: a recipe's `data` section, but with TRL's defaults, and without sources."""

    train: list[DataSource] = []
    overlong: Literal["drop", "truncate"] = "truncate"
    """truncate cuts the completion's end and, if `strict` or with a max_prompt_length, the prompt's oldest content."""
    completion_end: Literal["trl", "turn"] = "trl"
    strict: bool = False
    """A recipe's rules instead of TRL's: rows with empty turns, equal sides or prompts that differ are dropped, and
    max_completion_length counts."""


class Side(NamedTuple):
    """Prompt and one completion as one sequence."""

    ids: Ids
    start: int
    """Index of the completion's first token."""
    context: Ids = []
    """Tokens of the completion that are no labels: begin, end, begin, end, ..."""

    @property
    def labels(self) -> int:
        """Tokens that are trained on; the first of a sequence has none before it that could predict it."""
        return len(self.ids) - self.start - sum(self.context[1::2]) + sum(self.context[::2])

    @property
    def answer(self) -> Ids:
        """The tokens that are trained on."""
        row = {"_ids": self.ids, "_start": self.start, "_context": self.context}
        return [self.ids[place] for place in answer_tokens(row, "")] if self.context else self.ids[self.start :]

    def moved(self, by: int) -> Side:
        """Return the side with its places moved, for tokens that were put in front or taken away there."""
        return Side(self.ids, self.start + by, [place + by for place in self.context])


@dataclass
class Chunk:
    """A chunk of rows, tokenized."""

    columns: dict[str, list[Any]]
    drops: list[tuple[int, str, str]] = field(default_factory=list)
    """Row, reason, detail."""
    counts: Counter[str] = field(default_factory=Counter)
    """Cuts, tokens and whatever `PairTokenizer.notes` reports."""
    digest: str = ""
    """Hash of the rows as converted, whether kept or not."""

    @contextlib.contextmanager
    def dropping(self, row: int) -> Iterator[None]:
        """Leave a row out that turns out to be unusable."""
        try:
            yield
        except Dropped as why:
            self.drops.append((row, why.reason, why.detail))
        except RecursionError:
            self.drops.append((row, WRONG_TYPES, "the row is nested too deeply"))


class PairTokenizer:
    """Turns chunks of rows of one source into columns of token ids; `shape` is that of its rows, from `row_shapes.detect`.

    Raises:
        RequestError: the rows are conversations and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, shape: str):
        self.tokenizer, self.options, self.shape = tokenizer, options, shape
        self.chat = FAMILY[shape] == "conversations" or options.apply_template
        cut = options.completion_end == "turn"
        self.renderer = Renderer(tokenizer, options.template_kwargs, cut, options.strict) if self.chat else None
        # as text, to see which variables it mentions; a tokenizer may have several by name
        self.template = json.dumps(tokenizer.chat_template or "") if self.chat else ""
        self.special, self.markers = special_tokens(tokenizer), template_markers(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue] (set on the class)
        self.eos: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.max_length = options.max_length or UNLIMITED
        self.max_completion = (options.strict and options.max_completion_length) or UNLIMITED
        self.names = ["chosen_ids", "rejected_ids", "chosen_start", "rejected_start", "chosen_context", "rejected_context",
                      "row", "key", *(COLUMNS if options.strict else ())]  # fmt: skip

    def __call__(self, rows: list[Numbered]) -> Chunk:
        """Tokenize (index, row) tuples; a row that cannot be used goes to the chunk's drops."""
        chunk, digest = Chunk({name: [] for name in self.names}), hashlib.sha256()
        texts: list[tuple[int, Pair, Rendered]] = []
        for number, row in rows:
            pairs, content = [], "-"
            with chunk.dropping(number):
                pairs = [self._pair(one, chunk.counts) for one in spread(row, self.options.pairing)]
                content = json.dumps(pairs, sort_keys=True, default=str)
            chunk.counts["of scored rows"] += len(pairs) if len(pairs) > 1 else 0
            digest.update(content.encode())
            for pair in pairs:
                with chunk.dropping(number):
                    texts.append((number, pair, self.render(pair)))
        chunk.digest = digest.hexdigest()
        every = encode(self.tokenizer, [text for _, _, rendered in texts for text in rendered.texts])
        tokens = zip(every[0::3], every[1::3], every[2::3], strict=True)
        for (number, pair, rendered), ids in zip(texts, tokens, strict=True):
            with chunk.dropping(number):
                values = self._finish(pair, rendered, ids, chunk.counts)
                values += number, hashed(pair.prompt_text), *(describe(pair) if self.options.strict else ())
                for name, value in zip(chunk.columns, values, strict=True):
                    chunk.columns[name].append(value)
        chunk.drops.sort()
        return chunk

    def _pair(self, row: Any, counts: Counter[str]) -> Pair:
        """Convert one row.

        Raises:
            Dropped: the row cannot or should not be trained on.
        """
        pair = to_pair(row, self.shape, strict=self.options.strict, apply_template=self.options.apply_template,
                       tool_calls="tool_calls" in self.template)  # fmt: skip
        prompt: Any = pair.prompt
        if pair.chat and "developer" not in self.template and any(turn["role"] == "developer" for turn in prompt):
            counts["developer"] += 1
            prompt = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in prompt]
            pair = pair._replace(prompt=prompt)
        if self.options.system == "merge" and pair.chat and (merged := without_system(prompt)) is not prompt:
            counts["system merged"] += 1
            pair = pair._replace(prompt=merged)
        if FAMILY[self.shape] != "conversations" and (marker := self.markers.search(pair.prompt_text)):
            if self.options.apply_template:
                raise Dropped(TEMPLATED, f"{marker.group()!r} stands in the text, and data.apply_template is set")
            counts["templated"] += 1
        end, sides = self.renderer.turn_end if self.renderer else None, pair[1:3] if pair.chat else ()
        for turn in (turn for side in sides for turn in side):
            if end and isinstance(turn, dict) and spoken(turn).endswith(end):
                raise Dropped(TEMPLATED, f"an answer ends with {end!r}, which the template writes by itself")
        counts["tools unused"] += bool(pair.tools) and "tools" not in self.template
        counts["system unused"] += not pair.chat and bool(row.get("system"))
        return pair

    def render(self, pair: Pair) -> Rendered:
        """Return a pair as text, or raise Dropped where the template cannot write it."""
        if self.renderer:
            return self.renderer(pair)
        prompt, chosen, rejected, *_ = pair
        return Rendered(prompt, self._string(prompt + chosen), self._string(prompt + rejected))  # type: ignore[operator, arg-type]

    def _string(self, text: str) -> Answers:
        """Return a string as it is; one that ends as a chat template ends a turn gets no EOS behind it."""
        return Answers(text, ended=self.options.strict and bool(last_special(self.special, text)))

    def _finish(self, pair: Pair, text: Rendered, ids: tuple[Ids, Ids, Ids], counts: Counter[str]) -> tuple[Any, ...]:
        """Return the columns of one pair.

        Raises:
            Dropped: it does not fit, or no completion token is left.
        """
        whole, prompt_cut = self._fit_prompt(pair, self.sides(text, ids))
        fitted = [self._fit_completion(name, side) for name, side in zip(SIDES, whole, strict=True)]
        for name, side in zip(SIDES, fitted, strict=True):
            # the first token of a sequence has no row before it that could predict it
            if side.labels <= (not side.start):
                raise Dropped(NO_LABELS, f"{name} has no token that could be trained on")
        chosen, rejected = fitted
        if self.options.strict and chosen.answer == rejected.answer:
            equal = EQUAL if whole[0].answer == whole[1].answer else CUT_EQUAL
            raise Dropped(equal, "chosen and rejected are the same tokens")
        counts["several turns"] += bool(text.chosen.context or text.rejected.context)
        counts["unopened"] += text.unopened
        counts["started"] += started(pair.prompt)
        counts["unheard"] += bool(text.unheard)
        counts["prompt cut"] += prompt_cut
        counts["completion cut"] += any(len(a.ids) != len(b.ids) for a, b in zip(fitted, whole, strict=True))
        return chosen.ids, rejected.ids, chosen.start, rejected.start, chosen.context, rejected.context

    def sides(self, text: Rendered, ids: tuple[Ids, Ids, Ids]) -> tuple[Side, Side]:
        """Return both sequences with boundary, BOS and end."""
        prompt, *wholes = ids
        one, other = (
            self._closed(Side(whole, start, self._context(answers, whole)), answers.ended)
            for answers, whole, start in zip(text[1:3], wholes, boundaries(prompt, *wholes), strict=True)
        )
        return one, other

    def _context(self, answers: Answers, ids: Ids) -> Ids:
        """Return the places of the context in tokens."""
        before = encode(self.tokenizer, [answers.text[:place] for span in answers.context for place in span])
        return [len(os.path.commonprefix([some, ids])) for some in before]

    def _closed(self, side: Side, ended: bool) -> Side:
        if self.bos is not None and (not side.start or side.ids[0] != self.bos):
            side = side._replace(ids=[self.bos, *side.ids]).moved(1)
        if self.eos is None or ended:
            return side
        if self.options.completion_end == "turn" and not self.chat and self.eos in side.ids[side.start :]:
            return side._replace(ids=side.ids[: side.ids.index(self.eos, side.start) + 1])
        if len(side.ids) == side.start or side.ids[-1] != self.eos:
            return side._replace(ids=[*side.ids, self.eos])
        return side

    def _fit_prompt(self, pair: Pair, sides: tuple[Side, Side]) -> tuple[tuple[Side, Side], bool]:
        """Return the sides with a prompt that leaves room for a completion, and whether it was cut."""
        longest, limit = max(side.start for side in sides), self.options.max_prompt_length
        room = min(limit or UNLIMITED, self.max_length - 1)
        if longest <= room:
            return sides, False
        too_long = Dropped(PROMPT_TOO_LONG, f"the prompt has {counted(longest, 'token')}, there is room for {room}")
        if self.options.overlong == "drop" or not (self.options.strict or limit):
            raise too_long
        completion = max(len(side.ids) - side.start for side in sides)
        target = min(limit, room) if limit else max(self.max_length - completion, self.max_length // 2)
        if pair.chat:
            return self._cut_turns(pair, target, too_long), True
        kept = int(self.bos is not None)  # every sequence starts with BOS if there is one
        gone = longest - target
        if target <= kept:
            raise too_long
        one, other = (side._replace(ids=side.ids[:kept] + side.ids[kept + gone :]).moved(-gone) for side in sides)
        return (one, other), True

    def _cut_turns(self, pair: Pair, target: int, too_long: Dropped) -> tuple[Side, Side]:
        """Leave out the oldest turns, then the beginning of the oldest one left, until it fits `target` tokens."""
        turns: list[Any] = list(pair.prompt)
        system = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        # a shortened conversation begins with a user turn: templates refuse others
        starts = [n for n in range(system, len(turns)) if turns[n]["role"] == "user"] or [system]
        first, *rest = turns[starts[-1] :]
        content = first.get("content") or ""

        def attempt(cut: int) -> tuple[Side, Side]:
            """Return the sides without so many of the oldest turns, then of the characters of the last one."""
            left = turns[starts[cut] :] if cut < len(starts) else [
                first | {"content": content[cut + 1 - len(starts) :]}, *rest]  # fmt: skip
            text = self.render(pair._replace(prompt=turns[:system] + left))
            prompt, one, other = encode(self.tokenizer, list(text.texts))
            return self.sides(text, (prompt, one, other))

        # an empty turn is not an option
        cuts = range(len(starts) + max(0, len(content) - 1))
        cut = bisect.bisect_left(cuts, True, key=lambda cut: max(side.start for side in attempt(cut)) <= target)
        if cut == len(cuts):
            raise Dropped(PROMPT_TOO_LONG, f"{too_long.detail}, and the template fills that without the last turn")
        return attempt(cut)

    def _fit_completion(self, name: str, side: Side) -> Side:
        length = min(self.max_length, side.start + self.max_completion)
        if len(side.ids) <= length:
            return side
        if self.options.overlong == "drop":
            found = f"{name} has {counted(len(side.ids) - side.start, 'token')} after a prompt of {side.start}"
            raise Dropped(COMPLETION_TOO_LONG, f"{found}, there is room for {length - side.start}")
        return Side(side.ids[:length], side.start, [min(place, length) for place in side.context])

    def notes(self, counts: Counter[str]) -> list[str]:
        """Return what the counts of a whole source amount to, one sentence each."""
        options = self.options
        plain = not self.chat and self.shape != HH and options.strict
        holds = {
            "no turn end": options.completion_end == "turn" and self.renderer and not self.renderer.turn_end,
            "no eos": self.eos is None,
            "unused limit": options.max_completion_length and not options.strict,
            "dated": "strftime_now" in self.template and "date_string" not in options.template_kwargs,
            "common opening": self.shape == BARE_STRINGS,
        }
        notes = [NOTES["whole"][name] for name, true in holds.items() if true]
        if plain and not counts["templated"] and getattr(self.tokenizer, "chat_template", None):
            notes.append(WITHOUT_TEMPLATE)
        return notes + [note_on(counts[name], words) for name, words in NOTES["counted"].items() if counts[name]]


def note_on(number: int, words: str) -> str:
    """Write a note on so many of a thing, whose plural and verb begin the words."""
    noun, verb, rest = words.split(" ", 2)
    return f"{counted(number, noun[:-1])} { ({'have': 'has', 'are': 'is'}[verb] if number == 1 else verb) } {rest}"


def boundaries(prompt: Ids, chosen: Ids, rejected: Ids) -> tuple[int, int]:
    """Return where the completion starts in each whole sequence.

    TRL's rule: after the prompt's own tokens, or one before if the tokenizer merged across the boundary. Where TRL
    gives up (the tokens differ by more than that): after the tokens that the whole sequence shares with the prompt.
    """
    starts = [len(prompt) - (prompt != whole[: len(prompt)]) for whole in (chosen, rejected)]
    one, other = chosen[: starts[0]], rejected[: starts[1]]
    differ = sum(a != b for a, b in zip(one, other, strict=False)) if one != other else 0
    if differ > 1 or len(prompt) > min(len(chosen), len(rejected)):
        starts = [len(os.path.commonprefix([prompt, whole])) for whole in (chosen, rejected)]
    return starts[0], starts[1]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Return `tokenizer(text, add_special_tokens=False)` of each text."""
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None  # pyright: ignore[reportAttributeAccessIssue]
    if backend is not None and not (backend.truncation or backend.padding):
        # the same without offsets, masks and words
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
