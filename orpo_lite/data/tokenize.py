"""A chunk of raw rows -> tokenized pairs: boundary, BOS, EOS, truncation. TRL's tokens unless asked otherwise."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
from orpo_lite.data.row_shapes import BARE_STRINGS, FAMILY, HH, SIDES, Pair, to_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 2**31 - 1
NO_TURN_END = (
    "completion_end is turn, but the template writes no end-of-turn token that the tokenizer knows: completions end with "
    "EOS, as with trl"
)
NO_EOS = "the tokenizer has no EOS token: completions end as the template writes them"
UNUSED_LIMIT = "max_completion_length is for encoder-decoder models and not used here, as in TRL"
SEVERAL_TURNS = "have answers of several turns; only the first is trained"
TOOLS_UNUSED = "have tools, which the chat template does not mention"
SYSTEM_UNUSED = (
    "have a system text, which is left out: plain strings have no place for it without data.apply_template=true"
)
DATED = "the chat template may write today's date: set a fixed one in data.template_kwargs.date_string"
COMMON_OPENING = "no prompt column: the texts' common opening became the prompt"


@dataclass(kw_only=True)
class TokenizeOptions:
    """Rules for turning rows into tokens, as in a recipe's `data` section. The defaults are TRL's."""

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    """Tokens of the completion; encoder-decoders take 128 if None, decoders read it only if `strict`, as in TRL."""
    overlong: Literal["drop", "truncate"] = "truncate"
    """truncate cuts the completion's end and, if `strict` or with a max_prompt_length, the prompt's oldest content."""
    completion_end: Literal["trl", "turn"] = "trl"
    apply_template: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    encoder_decoder: bool = False
    """Tokenize prompt and completions separately, with special tokens added."""
    strict: bool = False
    """A recipe's rules instead of TRL's: rows with empty turns, equal sides or prompts that differ are dropped."""
    num_proc: int | None = None
    """Processes; None or 1 works in this one (fast tokenizers use several threads anyway)."""


class Side(NamedTuple):
    """Prompt and one completion as one sequence; of encoder-decoders the completion alone."""

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

    def drop(self, row: int, why: Dropped) -> None:
        """Leave a row out."""
        self.drops.append((row, why.reason, why.detail))


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
        texts: list[tuple[int, Pair, Texts]] = []
        pairs = self._convert(rows, chunk)
        for (number, pair), triple in zip(pairs, self.render([pair for _, pair in pairs]), strict=True):
            if isinstance(triple, Dropped):
                chunk.drop(number, triple)
            else:
                texts.append((number, pair, triple))
        tokens = self.encode([triple for _, _, triple in texts])
        for (number, pair, triple), ids in zip(texts, tokens, strict=True):
            try:
                values = self._finish(pair, triple, ids, chunk.counts)
            except Dropped as drop:
                chunk.drop(number, drop)
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
                content = json.dumps(pair, sort_keys=True, default=str)
            except Dropped as drop:
                chunk.drop(number, drop)
                content = "-"
            except RecursionError:
                chunk.drop(number, Dropped(WRONG_TYPES, "the row is nested too deeply"))
                content = "-"
            else:
                chunk.counts["tools unused"] += bool(pair.tools) and "tools" not in self.template
                chunk.counts["system unused"] += not pair.chat and bool(row.get("system"))
                pairs.append((number, pair))
            digest.update(content.encode())
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

    def _finish(self, pair: Pair, texts: Texts, ids: tuple[Ids, Ids, Ids], counts: Counter[str]) -> tuple[Any, ...]:
        """Return the columns of one pair.

        Raises:
            Dropped: it does not fit, or no completion token is left.
        """
        options, split = self.options, self.options.encoder_decoder
        if options.strict and pair.chat and texts[0] in texts[1:]:
            raise Dropped(REFUSED, "the template writes nothing for the answer")
        prompt = self._fit_encoder_prompt(ids[0]) if split else ids[0]
        if split:
            prompt_cut = len(prompt) < len(ids[0])
            whole = Side(ids[1], 0), Side(ids[2], 0)
            fitted = [
                self._fit_answer(n, s, t[len(texts[0]) :]) for n, s, t in zip(SIDES, whole, texts[1:], strict=True)
            ]
        else:
            whole, prompt_cut = self._fit_prompt(pair, self.sides(ids))
            fitted = [self._fit_completion(name, side) for name, side in zip(SIDES, whole, strict=True)]
        for name, side in zip(SIDES, fitted, strict=True):
            # the first token of a decoder's sequence has no row before it that could predict it
            if len(side.ids) <= (0 if split else max(side.start, 1)):
                raise Dropped(NO_LABELS, f"{name} has no token that could be trained on")
        chosen, rejected = fitted
        if options.strict and chosen.ids == rejected.ids:
            raise Dropped(EQUAL, "chosen and rejected are the same tokens")
        several = options.completion_end == "turn" and pair.chat and max(len(pair.chosen), len(pair.rejected)) > 1
        counts["several turns"] += several and not split
        counts["prompt cut"] += prompt_cut
        counts["completion cut"] += any(len(a.ids) != len(b.ids) for a, b in zip(fitted, whole, strict=True))
        if split:
            return prompt, chosen.ids, rejected.ids
        return chosen.ids, rejected.ids, chosen.start, rejected.start

    # ---- decoders: prompt and completion in one sequence -------------------------------------------------------------

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
        first, *rest = turns[starts[-1] :]
        content = first.get("content") or ""

        def attempt(cut: int) -> tuple[Side, Side]:
            """Return the sides without so many of the oldest turns, then of the characters of the last one."""
            left = turns[starts[cut] :] if cut < len(starts) else [
                first | {"content": content[cut + 1 - len(starts) :]}, *rest]  # fmt: skip
            texts = self.render([pair._replace(prompt=turns[:system] + left)])[0]
            if isinstance(texts, Dropped):
                raise texts
            return self.sides(self.encode([texts])[0])

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
            found = f"{name} has {len(side.ids) - side.start} tokens after a prompt of {side.start}"
            raise Dropped(COMPLETION_TOO_LONG, f"{found}, there is room for {length - side.start}")
        return Side(side.ids[:length], side.start)

    # ---- encoder-decoders: the prompt's ids for the encoder, the completions' as labels, as in TRL --------------------

    def _fit_encoder_prompt(self, prompt: Ids) -> Ids:
        room = self.options.max_prompt_length or (self.options.max_length if self.options.strict else None) or UNLIMITED
        if len(prompt) <= room:
            return prompt
        if self.options.overlong == "drop":
            raise Dropped(PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens, there is room for {room}")
        opening = int(self.bos is not None and prompt[0] == self.bos)
        return prompt[:opening] + prompt[len(prompt) - room + opening :]

    def _fit_answer(self, name: str, side: Side, text: str) -> Side:
        limit = self.options.max_completion_length or 128
        if len(side.ids) <= limit:
            return side
        if self.options.overlong == "drop":
            raise Dropped(COMPLETION_TOO_LONG, f"{name} has {len(side.ids)} tokens, there is room for {limit}")
        # the tokenizer's own truncation: it knows which special tokens stay
        return Side(self.tokenizer(text, truncation=True, max_length=limit)["input_ids"], 0)  # pyright: ignore

    def notes(self, counts: Counter[str]) -> list[str]:
        """Return what the counts of a whole source amount to, one sentence each."""
        options = self.options
        dated = "strftime_now" in self.template and "date_string" not in options.template_kwargs
        plain = not self.chat and self.shape != HH and options.strict
        told = {
            NO_TURN_END: options.completion_end == "turn" and self.chat and self.turn_end is None,
            NO_EOS: self.eos is None and not options.encoder_decoder,
            UNUSED_LIMIT: options.max_completion_length and not options.strict and not options.encoder_decoder,
            f"{counts['several turns']} pairs {SEVERAL_TURNS}": counts["several turns"],
            f"{counts['tools unused']} rows {TOOLS_UNUSED}": counts["tools unused"],
            WITHOUT_TEMPLATE: plain and getattr(self.tokenizer, "chat_template", None),
            f"{counts['system unused']} rows {SYSTEM_UNUSED}": counts["system unused"],
            DATED: dated,
            COMMON_OPENING: self.shape == BARE_STRINGS,
        }
        return [note for note, holds in told.items() if holds]


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
