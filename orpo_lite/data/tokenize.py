"""One chunk of raw rows -> tokenised pairs: boundary, BOS, EOS, truncation. TRL's tokens unless asked otherwise."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from orpo_lite.data.encode import Encoder, Ids, Renderer, Texts, common_prefix, template_text, turn_end
from orpo_lite.data.row_shapes import BARE_STRINGS, FAMILY, HH, Pair, to_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.token_cache import TokenizeOptions

UNLIMITED = 2**31 - 1
MOST_CHARACTERS = 1000
"""Of a token: the longest in use are runs of some hundred spaces."""


@dataclass
class Side:
    """Prompt and one completion as one sequence."""

    ids: Ids
    start: int
    """Index of the completion's first token."""


@dataclass
class Chunk:
    """What a chunk of rows became."""

    columns: dict[str, list[Any]]
    drops: list[tuple[int, str, str]] = field(default_factory=list)
    """Row, reason, detail."""
    row_counts: dict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """What was counted of each row."""
    digest: str = ""
    """Hash of the rows as converted, whether kept or not."""

    @property
    def counts(self) -> Counter[str]:
        """Sum over the rows."""
        total = Counter[str]()
        for counts in self.row_counts.values():
            total.update(counts)
        return total


class PairTokenizer:
    """Turns chunks of rows of one source into columns of token ids.

    Args:
        tokenizer: any transformers tokenizer.
        options: lengths, ends and template, as in TokenizeOptions.
        shape: the shape of the source's rows, from `formats.detect`.

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
        """Tokenise (index, row) tuples; whatever is wrong with a row ends in the chunk's drops."""
        chunk = Chunk({name: [] for name in [*self.names, "row", "key"]})
        digest = hashlib.sha256()
        numbers, pairs = [], []
        for number, row in rows:
            try:
                pair = self.convert(row)
                digest.update(json.dumps(pair, sort_keys=True, default=str).encode())
            except (Dropped, RecursionError) as error:
                # no name may keep the error: its traceback holds this frame, and that all of the chunk
                nested = isinstance(error, RecursionError)
                reason, detail = (
                    (WRONG_TYPES, "the row is nested too deeply") if nested else (error.reason, error.detail)
                )
                chunk.drops.append((number, reason, detail))
                digest.update(b"-")
                continue
            chunk.row_counts[number]["tools unused"] += bool(pair.tools) and "tools" not in self.template
            chunk.row_counts[number]["system unused"] += not pair.chat and bool(row.get("system"))
            numbers.append(number)
            pairs.append(pair)
        chunk.digest = digest.hexdigest()
        texts = [self.bounded(readable(triple)) for triple in self.render(pairs)]
        tokens = iter(self.encode([triple for triple in texts if not isinstance(triple, Dropped)]))
        for number, pair, triple in zip(numbers, pairs, texts, strict=True):
            if isinstance(triple, Dropped):
                chunk.drops.append((number, triple.reason, triple.detail))
                continue
            try:
                ids = next(tokens)
                if self.options.strict and pair.chat and triple[0] in triple[1:]:
                    raise Dropped(REFUSED, "the template writes nothing for the answer")
                if self.options.encoder_decoder:
                    values = self.finish_encoder_decoder(triple, ids, chunk.row_counts[number])
                else:
                    values = self.finish(pair, ids, chunk.row_counts[number])
            except Dropped as drop:
                chunk.drops.append((number, drop.reason, drop.detail))
                continue
            key = hashlib.blake2b(pair.prompt_text.encode(), digest_size=8).digest()
            for name, value in zip(chunk.columns, (*values, number, int.from_bytes(key, signed=True)), strict=True):
                chunk.columns[name].append(value)
        chunk.drops.sort()
        return chunk

    def convert(self, row: Any) -> Pair:
        return to_pair(row, self.shape, strict=self.options.strict, apply_template=self.options.apply_template,
                       tool_calls="tool_calls" in self.template)  # fmt: skip

    def render(self, pairs: list[Pair]) -> list[Texts | Dropped]:
        if self.renderer:
            return self.renderer.triples(pairs)
        return [(pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) for pair in pairs]  # pyright: ignore

    def encode(self, texts: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        """Ids of prompt, chosen and rejected: whole texts for decoders, the three parts for encoder-decoders."""
        if not self.options.encoder_decoder:
            return self.encoder.triples(texts)
        parts = [part for prompt, *sides in texts for part in (prompt, *(side[len(prompt) :] for side in sides))]
        ids = self.tokenizer(parts, verbose=False)["input_ids"] if parts else []
        return list(zip(ids[0::3], ids[1::3], ids[2::3], strict=True))  # pyright: ignore[reportReturnType]

    def bounded(self, texts: Texts | Dropped) -> Texts | Dropped:
        """The texts, or Dropped where they are so long that tokenising them, at a second a megabyte, is for nothing."""
        limit = self.max_length * MOST_CHARACTERS
        if isinstance(texts, Dropped) or self.options.overlong != "drop" or self.options.encoder_decoder:
            return texts
        for name, text in zip(("the prompt", "chosen", "rejected"), texts, strict=True):
            if len(text) > limit:
                reason = PROMPT_TOO_LONG if name == "the prompt" else COMPLETION_TOO_LONG
                whole = f"{name} has" if name == "the prompt" else f"{name} and its prompt have"
                return Dropped(reason, f"{whole} {len(text):,} characters, for {self.max_length} tokens")
        return texts

    def finish(self, pair: Pair, ids: tuple[Ids, Ids, Ids], counts: Counter[str]) -> tuple[Ids, Ids, int, int]:
        """Columns of one pair.

        Raises:
            Dropped: it does not fit, or no completion token is left.
        """
        sides = self.sides(ids)
        sides, prompt_cut = self.fit_prompt(pair, sides)
        fitted = [self.fit_completion(name, side) for name, side in zip(("chosen", "rejected"), sides, strict=True)]
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
            counts["moved"] += 2 * len(common_prefix((chosen.ids[chosen.start :], rejected.ids[rejected.start :])))
        elif self.shape == BARE_STRINGS:
            counts["moved"] += chosen.start + rejected.start - 2 * (self.bos is not None)
        return chosen.ids, rejected.ids, chosen.start, rejected.start

    def sides(self, ids: tuple[Ids, Ids, Ids]) -> tuple[Side, Side]:
        """Boundary, BOS and end of both sequences."""
        prompt, *wholes = ids
        return tuple(self.closed(Side(w, s)) for w, s in zip(wholes, boundaries(prompt, *wholes), strict=True))  # pyright: ignore

    def closed(self, side: Side) -> Side:
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

    def fit_prompt(self, pair: Pair, sides: tuple[Side, Side]) -> tuple[tuple[Side, Side], bool]:
        """The sides with a prompt that leaves room for a completion, and whether it was cut for that."""
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
            return self.cut_turns(pair, target, too_long), True
        kept = int(self.bos is not None)  # every sequence starts with BOS if there is one
        gone = longest - target
        if target <= kept:
            raise too_long
        return tuple(Side(s.ids[:kept] + s.ids[kept + gone :], s.start - gone) for s in sides), True  # pyright: ignore

    def cut_turns(self, pair: Pair, target: int, too_long: Dropped) -> tuple[Side, Side]:
        """Leave out the oldest turns, then the beginning of the oldest one left, until it fits `target` tokens."""
        turns = list(pair.prompt)
        system = 0
        while system < len(turns) and turns[system]["role"] == "system":  # pyright: ignore
            system += 1
        # a conversation goes on from a user turn: templates refuse others
        starts = [n for n in range(system, len(turns)) if turns[n]["role"] == "user"] or [system]  # pyright: ignore

        def attempt(prompt: list[Any]) -> tuple[Side, Side] | None:
            texts = self.render([pair._replace(prompt=prompt)])[0]
            if isinstance(texts, Dropped):
                raise texts
            sides = self.sides(self.encode([texts])[0])
            return sides if max(side.start for side in sides) <= target else None

        def shortest(options: int, build: Any) -> tuple[Side, Side] | None:
            """The first of the options, each shorter than the one before, that fits."""
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

    def fit_completion(self, name: str, side: Side) -> Side:
        length = min(self.max_length, side.start + self.max_completion)
        if len(side.ids) <= length:
            return side
        if self.options.overlong == "drop":
            found = f"{name} has {len(side.ids) - side.start} tokens after a prompt of {side.start}"
            raise Dropped(COMPLETION_TOO_LONG, f"{found}, there is room for {length - side.start}")
        return Side(side.ids[:length], side.start)

    def finish_encoder_decoder(
        self, texts: Texts, ids: tuple[Ids, Ids, Ids], counts: Counter[str]
    ) -> tuple[Ids, Ids, Ids]:
        """Encoder ids of the prompt and labels of both completions, special tokens added, as in TRL."""
        prompt, *answers = ids
        room = self.options.max_prompt_length or (self.options.max_length if self.options.strict else None) or UNLIMITED
        if len(prompt) > room:
            if self.options.overlong == "drop":
                raise Dropped(PROMPT_TOO_LONG, f"the prompt has {len(prompt)} tokens, there is room for {room}")
            prompt = self.cut_encoder_prompt(prompt, room)
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

    def cut_encoder_prompt(self, ids: Ids, room: int) -> Ids:
        opening = int(self.bos is not None and ids[0] == self.bos)
        return ids[:opening] + ids[len(ids) - room + opening :]

    def notes(self, counts: Counter[str]) -> list[str]:
        """What the counts of a whole source amount to, in words."""
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
            notes.append(
                f"{counts['several turns']} pairs have answers of several turns, of which the first is trained"
            )
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
            notes.append("the chat template may write today's date: fix it with data.template_kwargs.date_string")
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
    """The texts, or Dropped where a template brought in half a character that no tokenizer takes."""
    try:
        if not isinstance(texts, Dropped):
            "".join(texts).encode()
        return texts
    except UnicodeEncodeError as error:
        return Dropped(
            WRONG_TYPES, f"the row holds half a character ({error.object[error.start]!a}), not valid Unicode"
        )


def boundaries(prompt: Ids, chosen: Ids, rejected: Ids) -> tuple[int, int]:
    """Where the completion starts in each whole sequence.

    TRL's rule: after the prompt's own tokens, or one before if the tokenizer merged across the boundary. Where TRL
    gives up (the tokens differ by more than that), after the tokens that the whole shares with the prompt.
    """
    starts = [len(prompt) - (prompt != whole[: len(prompt)]) for whole in (chosen, rejected)]
    one, other = chosen[: starts[0]], rejected[: starts[1]]
    differ = sum(a != b for a, b in zip(one, other, strict=False)) if one != other else 0
    if differ > 1 or len(prompt) > min(len(chosen), len(rejected)):
        starts = [len(common_prefix((prompt, whole))) for whole in (chosen, rejected)]
    return starts[0], starts[1]
