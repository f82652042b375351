"""A chunk of raw rows -> tokenized pairs: boundary, BOS, EOS, truncation. TRL's tokens unless asked otherwise."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orpo_lite.data.dropped_rows import (
    COMPLETION_TOO_LONG,
    EQUAL,
    NO_LABELS,
    PROMPT_TOO_LONG,
    REFUSED,
    WITHOUT_TEMPLATE,
    WRONG_TYPES,
    Dropped,
)
from orpo_lite.data.encode import Encoder, Ids, Renderer, Texts, template_text, turn_end
from orpo_lite.data.row_shapes import BARE_STRINGS, FAMILY, HH, Pair, to_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 2**31 - 1
MAX_CHARACTERS = 1000
"""The most characters of one token: the longest in use are runs of a few hundred spaces."""


@dataclass(kw_only=True)
class TokenizeOptions:
    """Rules for turning rows into tokens. The defaults are TRL's."""

    max_length: int | None = 1024
    """Tokens of prompt and completion together; None is no limit."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; None leaves it to max_length."""
    max_completion_length: int | None = None
    """Tokens of the completion; encoder-decoders take 128 if None, decoders read it only if `strict`, as in TRL."""
    overlong: Literal["drop", "truncate"] = "truncate"
    """drop: leave out pairs that do not fit; truncate: cut the completion's end and, if `strict` or with a
    max_prompt_length, the prompt's oldest content."""
    completion_end: Literal["trl", "turn"] = "trl"
    """trl: all that the template writes, then EOS if it is not last; turn: cut after the first end-of-turn token."""
    apply_template: bool = False
    """Turn plain strings into messages."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template."""
    encoder_decoder: bool = False
    """Tokenize prompt and completions separately, with special tokens added."""
    strict: bool = False
    """A recipe's rules instead of TRL's: rows with empty turns, equal sides or prompts that differ are dropped."""
    num_proc: int | None = None
    """Processes; None or 1 works in this one (fast tokenizers use several threads anyway)."""


@dataclass
class Side:
    """Prompt and one completion as one sequence."""

    ids: Ids
    start: int
    """Index of the completion's first token."""


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


class PairTokenizer:
    """Turns chunks of rows of one source into columns of token ids.

    Args:
        tokenizer: any transformers tokenizer.
        options: lengths, ends and template.
        shape: the shape of the source's rows, from `row_shapes.detect`.

    Raises:
        RequestError: the rows are conversations and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions, shape: str):
        self.tokenizer, self.options, self.shape = tokenizer, options, shape
        self.chat = FAMILY[shape] == "conversations" or options.apply_template
        self.renderer = Renderer(tokenizer, options.template_kwargs) if self.chat else None
        self.template = template_text(tokenizer) if self.chat else ""
        self.encoder = Encoder(tokenizer)
        self.bos: int | None = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue] (set on the class)
        self.eos: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.turn_end = turn_end(tokenizer, options.template_kwargs) if self.chat else None
        self.ends = {token for token in (self.eos, self.turn_end) if token is not None}
        self.max_length = options.max_length or UNLIMITED
        # TRL 1.16 reads max_completion_length for encoder-decoders only
        self.max_completion = (options.strict and options.max_completion_length) or UNLIMITED
        self.names = ["prompt_ids", "chosen_ids", "rejected_ids"] if options.encoder_decoder else [
            "chosen_ids", "rejected_ids", "chosen_start", "rejected_start"]  # fmt: skip

    def __call__(self, rows: list[tuple[int, Any]]) -> Chunk:
        """Tokenize (index, row) tuples; a row that cannot be used goes to the chunk's drops."""
        chunk = Chunk({name: [] for name in [*self.names, "row", "key"]})
        numbered = self._convert(rows, chunk)
        texts = [self._bounded(readable(triple)) for triple in self.render([pair for _, pair in numbered])]
        tokens = iter(self.encode([triple for triple in texts if not isinstance(triple, Dropped)]))
        for (number, pair), triple in zip(numbered, texts, strict=True):
            if isinstance(triple, Dropped):
                chunk.drops.append((number, triple.reason, triple.detail))
                continue
            try:
                values = self._finish(pair, triple, next(tokens), chunk.counts)
            except Dropped as drop:
                chunk.drops.append((number, drop.reason, drop.detail))
                continue
            key = hashlib.blake2b(pair.prompt_text.encode(), digest_size=8).digest()
            for name, value in zip(chunk.columns, (*values, number, int.from_bytes(key, signed=True)), strict=True):
                chunk.columns[name].append(value)
        chunk.drops.sort()
        return chunk

    def _convert(self, rows: list[tuple[int, Any]], chunk: Chunk) -> list[tuple[int, Pair]]:
        """Return the rows as pairs with their index; counts, drops and digest go to the chunk."""
        digest, pairs = hashlib.sha256(), []
        for number, row in rows:
            try:
                pair = to_pair(row, self.shape, strict=self.options.strict, apply_template=self.options.apply_template,
                               tool_calls="tool_calls" in self.template)  # fmt: skip
                digest.update(json.dumps(pair, sort_keys=True, default=str).encode())
            except (Dropped, RecursionError) as error:
                # no name may keep the error: its traceback holds this frame, and that holds all of the chunk
                deep = isinstance(error, RecursionError)
                reason, detail = (WRONG_TYPES, "the row is nested too deeply") if deep else (error.reason, error.detail)
                chunk.drops.append((number, reason, detail))
                digest.update(b"-")
                continue
            chunk.counts["tools unused"] += bool(pair.tools) and "tools" not in self.template
            chunk.counts["system unused"] += not pair.chat and bool(row.get("system"))
            pairs.append((number, pair))
        chunk.digest = digest.hexdigest()
        return pairs

    def render(self, pairs: list[Pair]) -> list[Texts | Dropped]:
        """Return each pair's texts, or why the template refuses it."""
        if self.renderer:
            return self.renderer.triples(pairs)
        return [(pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]  # pyright: ignore

    def encode(self, texts: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        """Return the ids of prompt, chosen and rejected: whole texts for decoders, three parts for encoder-decoders."""
        if not self.options.encoder_decoder:
            return self.encoder.triples(texts)
        parts = [part for prompt, *sides in texts for part in (prompt, *(side[len(prompt) :] for side in sides))]
        ids = self.tokenizer(parts, verbose=False)["input_ids"] if parts else []
        return list(zip(ids[0::3], ids[1::3], ids[2::3], strict=True))  # pyright: ignore[reportReturnType]

    def _bounded(self, texts: Texts | Dropped) -> Texts | Dropped:
        """Return Dropped for texts that are certainly too long: tokenizing takes a second per megabyte."""
        limit = self.max_length * MAX_CHARACTERS
        if isinstance(texts, Dropped) or self.options.overlong != "drop" or self.options.encoder_decoder:
            return texts
        for name, text in zip(("the prompt", "chosen", "rejected"), texts, strict=True):
            if len(text) > limit:
                reason = PROMPT_TOO_LONG if name == "the prompt" else COMPLETION_TOO_LONG
                whole = f"{name} has" if name == "the prompt" else f"{name} and its prompt have"
                return Dropped(reason, f"{whole} {len(text):,} characters, for {self.max_length} tokens")
        return texts

    def _finish(self, pair: Pair, texts: Texts, ids: tuple[Ids, Ids, Ids], counts: Counter[str]) -> tuple[Any, ...]:
        """Return the columns of one pair.

        Raises:
            Dropped: it does not fit, or no completion token is left.
        """
        if self.options.strict and pair.chat and texts[0] in texts[1:]:
            raise Dropped(REFUSED, "the template writes nothing for the answer")
        finish = self._finish_encoder_decoder if self.options.encoder_decoder else self._finish_decoder
        return finish(pair, texts, ids, counts)

    # ---- decoders: prompt and completion in one sequence -------------------------------------------------------------

    def _finish_decoder(
        self, pair: Pair, _: Texts, ids: tuple[Ids, Ids, Ids], counts: Counter[str]
    ) -> tuple[Ids, Ids, int, int]:
        sides, prompt_cut = self._fit_prompt(pair, self.sides(ids))
        fitted = [self._fit_completion(name, side) for name, side in zip(("chosen", "rejected"), sides, strict=True)]
        for name, side in zip(("chosen", "rejected"), fitted, strict=True):
            # the first token of a sequence has no row before it that could predict it
            if len(side.ids) <= max(side.start, 1):
                raise Dropped(NO_LABELS, f"{name} has no token that could be trained on")
        chosen, rejected = fitted
        if self.options.strict and chosen.ids == rejected.ids:
            raise Dropped(EQUAL, "chosen and rejected are the same tokens")
        counts["prompt cut"] += prompt_cut
        counts["completion cut"] += any(len(a.ids) != len(b.ids) for a, b in zip(fitted, sides, strict=True))
        if self.options.completion_end == "turn" and max(len(pair.chosen), len(pair.rejected)) > 1 and pair.chat:
            counts["several turns"] += 1
        counts["labels"] += len(chosen.ids) - chosen.start + len(rejected.ids) - rejected.start
        counts["tokens"] += len(chosen.ids) + len(rejected.ids)
        if not self.chat and self.shape == HH:
            shared = os.path.commonprefix([chosen.ids[chosen.start :], rejected.ids[rejected.start :]])
            counts["moved"] += 2 * len(shared)
        elif self.shape == BARE_STRINGS:
            counts["moved"] += chosen.start + rejected.start - 2 * (self.bos is not None)
        return chosen.ids, rejected.ids, chosen.start, rejected.start

    def sides(self, ids: tuple[Ids, Ids, Ids]) -> tuple[Side, Side]:
        """Return both sequences with boundary, BOS and end."""
        prompt, *wholes = ids
        return tuple(self._closed(Side(w, s)) for w, s in zip(wholes, boundaries(prompt, *wholes), strict=True))  # pyright: ignore

    def _closed(self, side: Side) -> Side:
        ids, start = side.ids, side.start
        if self.bos is not None and (not start or ids[0] != self.bos):
            ids, start = [self.bos, *ids], start + 1
        if self.options.completion_end == "turn":
            for place in range(start, len(ids)):
                if ids[place] in self.ends:
                    return Side(ids[: place + 1], start)
        if self.eos is not None and (len(ids) == start or ids[-1] != self.eos):
            ids = [*ids, self.eos]
        return Side(ids, start)

    def _fit_prompt(self, pair: Pair, sides: tuple[Side, Side]) -> tuple[tuple[Side, Side], bool]:
        """Return the sides with a prompt that leaves room for a completion, and whether it was cut."""
        longest, limit = max(side.start for side in sides), self.options.max_prompt_length
        room = min(limit or UNLIMITED, self.max_length - 1)
        if longest <= room:
            return sides, False
        too_long = Dropped(PROMPT_TOO_LONG, f"the prompt has {longest} tokens, there is room for {room}")
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
        return tuple(Side(s.ids[:kept] + s.ids[kept + gone :], s.start - gone) for s in sides), True  # pyright: ignore

    def _cut_turns(self, pair: Pair, target: int, too_long: Dropped) -> tuple[Side, Side]:
        """Leave out the oldest turns, then the beginning of the oldest one left, until it fits `target` tokens."""
        turns: list[Any] = list(pair.prompt)
        system = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        # a shortened conversation begins with a user turn: templates refuse others
        starts = [n for n in range(system, len(turns)) if turns[n]["role"] == "user"] or [system]

        def attempt(prompt: list[Any]) -> tuple[Side, Side] | None:
            texts = self.render([pair._replace(prompt=prompt)])[0]
            if isinstance(texts, Dropped):
                raise texts
            sides = self.sides(self.encode([texts])[0])
            return sides if max(side.start for side in sides) <= target else None

        def shortest(options: int, build: Any) -> tuple[Side, Side] | None:
            """Return the first of the options, each shorter than the one before, that fits."""
            low, high, best = 0, options - 1, None
            while low <= high:
                middle = (low + high) // 2
                if fits := attempt(build(middle)):
                    best, high = fits, middle - 1
                else:
                    low = middle + 1
            return best

        if best := shortest(len(starts), lambda n: turns[:system] + turns[starts[n] :]):
            return best
        rest: Any = turns[starts[-1] :]
        content = rest[0].get("content") or ""
        # the whole content failed already, and an empty turn is not one
        best = shortest(
            len(content) - 1, lambda n: [*turns[:system], rest[0] | {"content": content[n + 1 :]}, *rest[1:]]
        )
        if not best:
            raise Dropped(PROMPT_TOO_LONG, f"{too_long.detail}, and the template fills that without the last turn")
        return best

    def _fit_completion(self, name: str, side: Side) -> Side:
        length = min(self.max_length, side.start + self.max_completion)
        if len(side.ids) <= length:
            return side
        if self.options.overlong == "drop":
            found = f"{name} has {len(side.ids) - side.start} tokens after a prompt of {side.start}"
            raise Dropped(COMPLETION_TOO_LONG, f"{found}, there is room for {length - side.start}")
        return Side(side.ids[:length], side.start)

    # ---- encoder-decoders: the prompt's ids for the encoder, the completions' as labels, as in TRL --------------------

    def _finish_encoder_decoder(
        self, _: Pair, texts: Texts, ids: tuple[Ids, Ids, Ids], counts: Counter[str]
    ) -> tuple[Ids, Ids, Ids]:
        prompt, *answers = ids
        room = self.options.max_prompt_length or (self.options.max_length if self.options.strict else None) or UNLIMITED
        if len(prompt) > room:
            if self.options.overlong == "drop":
                raise Dropped(PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens, there is room for {room}")
            opening = int(self.bos is not None and prompt[0] == self.bos)
            prompt = prompt[:opening] + prompt[len(prompt) - room + opening :]
            counts["prompt cut"] += 1
        limit = self.options.max_completion_length or 128
        fitted = []
        for name, answer, text in zip(("chosen", "rejected"), answers, texts[1:], strict=True):
            if len(answer) > limit:
                if self.options.overlong == "drop":
                    raise Dropped(COMPLETION_TOO_LONG, f"{name} has {len(answer)} tokens, there is room for {limit}")
                # the tokenizer's own truncation: it knows which special tokens stay
                answer = self.tokenizer(text[len(texts[0]) :], truncation=True, max_length=limit)["input_ids"]
            if not answer:
                raise Dropped(NO_LABELS, f"{name} has no token that could be trained on")
            fitted.append(answer)
        counts["completion cut"] += any(len(a) != len(b) for a, b in zip(fitted, answers, strict=True))
        if self.options.strict and fitted[0] == fitted[1]:
            raise Dropped(EQUAL, "chosen and rejected are the same tokens")
        counts["labels"] += len(fitted[0]) + len(fitted[1])
        counts["tokens"] += len(prompt) + len(fitted[0]) + len(fitted[1])
        return prompt, fitted[0], fitted[1]

    def notes(self, counts: Counter[str]) -> list[str]:
        """Return what the counts of a whole source amount to, one sentence each."""
        options, notes = self.options, []
        if options.completion_end == "turn" and self.chat and self.turn_end is None:
            notes.append(
                "completion_end is turn, but the template writes no end-of-turn token that the tokenizer knows: "
                "completions end with EOS, as with trl"
            )
        if self.eos is None and not options.encoder_decoder:
            notes.append("the tokenizer has no EOS token: completions end as the template writes them")
        if options.max_completion_length and not options.strict and not options.encoder_decoder:
            notes.append("max_completion_length is for encoder-decoder models and not used here, as in TRL")
        if counts["several turns"]:
            notes.append(f"{counts['several turns']} pairs have answers of several turns; only the first is trained")
        if counts["tools unused"]:
            notes.append(f"{counts['tools unused']} rows have tools, which the chat template does not mention")
        if not self.chat and self.shape != HH and options.strict and getattr(self.tokenizer, "chat_template", None):
            notes.append(WITHOUT_TEMPLATE)
        if counts["system unused"]:
            notes.append(
                f"{counts['system unused']} rows have a system text, which is left out: plain strings have no place for it "
                "without data.apply_template=true"
            )
        if "strftime_now" in self.template and not {"date_string"} & options.template_kwargs.keys():
            notes.append(
                "the chat template may write today's date: set a fixed one in data.template_kwargs.date_string"
            )
        if counts["moved"] and self.shape == HH:
            share = counts["moved"] / counts["labels"]
            notes.append(
                f"split at the last 'Assistant:': {share:.1%} of label tokens would be prompt under TRL's rule"
            )
        elif counts["moved"]:
            share = counts["moved"] / counts["tokens"]
            notes.append(f"no prompt column: the texts' common opening, {share:.1%} of all tokens, became the prompt")
        return notes


def readable(texts: Texts | Dropped) -> Texts | Dropped:
    """Return the texts, or Dropped where a template added half a character, which no tokenizer accepts."""
    try:
        if not isinstance(texts, Dropped):
            "".join(texts).encode()
        return texts
    except UnicodeEncodeError as error:
        return Dropped(
            WRONG_TYPES, f"the row holds half a character ({error.object[error.start]!a}), not valid Unicode"
        )


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
