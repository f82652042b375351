"""Checks of the pairs themselves: by tokens, and by the numbers that `describe` leaves beside them, without the text."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import progress
from orpo_lite.common.text import counted
from orpo_lite.data.lengths import column_batches, numbers, pair_lengths
from orpo_lite.data.messages import REASONING, Messages
from orpo_lite.data.row_shapes import SIDES, Pair

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.token_cache import Tokenized

COLUMNS = ("exact_key", "chosen_key", "rejected_key", "chosen_traits", "rejected_traits")
"""The numbers of a pair, int64 each; see `describe`."""
REPEATS = DUPLICATE, CONTRADICTION, NEAR = "exact duplicate", "contradiction", "near duplicate"
CHANCE = 2.5  # standard deviations of a fair coin up to which a difference may be chance
LONGER = 0.6  # share of pairs from which the longer answer, or the shorter, is told to win
ONE_SIDED, RARE = 0.75, 0.02  # markup is told if, of pairs where one side has it, so many agree; if so many pairs do
READ, LANGUAGE = 20_000, 16  # characters of an answer that are read; the bit from which its traits hold its language
ALIKE, GRAM = 0.7, 3  # share of common n-grams of nearly equal texts (a word exchanged in twenty); tokens of an n-gram
SHORT = 32  # tokens of both answers below which it may be chance that they are alike
BANDS, WIDTH = 8, 3  # pairs are compared where `WIDTH` minima of a band agree: 97% of those that are 70% alike

TABLES: dict[str, dict[str, str]] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
OPENINGS, MARKUP = TABLES["openings"], TABLES["markup"]
TRAITS = {name: re.compile(pattern) for name, pattern in (OPENINGS | MARKUP).items()}
"""Bit n of an answer's traits is the n-th; `OPENINGS` are matched where the answer begins, `MARKUP` is searched for."""
SCRIPTS = {name: re.compile(f"[{characters}]") for name, characters in TABLES["scripts"].items()}
WORDS = {name: frozenset(words.split()) for name, words in TABLES["words"].items()}
LANGUAGES = ("", *WORDS, *SCRIPTS)


def describe(pair: Pair) -> tuple[int, ...]:
    """Return a hash of the whole pair; hashes of the sides without differences in case and spaces; traits of the sides."""
    exact = [part if isinstance(part, str) else " \0 ".join(f"{k} \0 {turn[k]}" for turn in part for k in sorted(turn))
             for part in pair[:3]]  # fmt: skip
    prompt, *sides = (" ".join(text.casefold().split()) for text in exact)
    if sides[0] == sides[1]:  # they differ in nothing else
        sides = exact[1:]
    rest = json.dumps([pair.tools, pair.template_kwargs], sort_keys=True, default=str)
    return hashed(*exact, rest), *(hashed(prompt, rest, side) for side in sides), *map(traits, pair[1:3])


def hashed(*texts: str) -> int:
    """Return a hash of the texts that fits an int64."""
    digest = hashlib.blake2b("\0\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def without_numbers(pairs: datasets.Dataset) -> datasets.Dataset:
    """Return pairs without the columns that only this package reads."""
    return pairs.remove_columns([name for name in ("key", *COLUMNS) if name in pairs.column_names])


def traits(side: Messages | str) -> int:
    """Return the bits of `TRAITS` that an answer has, and its language."""
    turns = [{"content": side}] if isinstance(side, str) else [turn for turn in side if turn["role"] == "assistant"]
    thought = "<think></think>" * any(turn.get(REASONING) for turn in turns)
    said = "\n".join(str(turn.get("content") or turn.get("tool_calls") or "") for turn in turns)[:READ].strip()
    opening = said.rpartition("</think>")[2].strip()[:200].casefold().replace("’", "'")
    begins = next((name for name in OPENINGS if TRAITS[name].match(opening)), None)
    has = (name == begins if name in OPENINGS else bool(TRAITS[name].search(f"\n{thought}{said}")) for name in TRAITS)
    return sum(there << place for place, there in enumerate(has)) | language(said[:1000]) << LANGUAGE


def language(text: str) -> int:
    """Return the index in `LANGUAGES` of what most of a text is written in; 0 where that cannot be told."""
    start = "" if text[:200].isascii() else text[:200]
    letters = sum(map(str.isalpha, start))
    for name, block in SCRIPTS.items():
        if 2 * len(block.findall(start)) > letters:
            return LANGUAGES.index(name)
    words = set(text.lower().split())
    (second, _), (most, name) = sorted((len(words & known), name) for name, known in WORDS.items())[-2:]
    return LANGUAGES.index(name) if most >= 3 and most >= 2 * second else 0


def repeats(rows: datasets.Dataset, near: bool = False) -> dict[int, tuple[str, int]]:
    """Return position -> why and the other's position, of duplicates beyond the first and both sides of contradictions."""
    exact, chosen, rejected = (numbers(rows, name) for name in COLUMNS[:3])
    ways, turned = chosen * 3 + rejected, rejected * 3 + chosen
    known, first = np.unique(ways, return_index=True)
    nearest = np.searchsorted(known, turned).clip(max=len(known) - 1)
    found = {int(n): (CONTRADICTION, int(first[nearest[n]])) for n in np.flatnonzero(known[nearest] == turned)}
    found |= {place: (DUPLICATE, other) for place, other in later(exact) if place not in found}
    if near:
        found |= {place: (NEAR, other) for place, other in later(ways) if place not in found}
        left = np.delete(np.arange(len(rows)), list(found))
        found |= {place: (NEAR, other) for place, other in near_duplicates(rows, left)}
    row, source = numbers(rows, "row"), numbers(rows, "source")
    # answers of one row that are paired with each other say nothing about other rows
    apart = {place: (why, other) for place, (why, other) in found.items()
             if row[place] != row[other] or source[place] != source[other]}  # fmt: skip
    return dict(sorted(apart.items()))


def later(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the position of each key that came before, and of the first that equals it."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    places = np.flatnonzero(first[group] != np.arange(len(keys)))
    yield from zip(places.tolist(), first[group[places]].tolist(), strict=True)


def near_duplicates(rows: datasets.Dataset, places: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield positions of pairs and of the earlier pair that each nearly repeats in prompt, chosen and rejected."""
    lengths = pair_lengths(rows)
    places = places[(lengths["chosen"] + lengths["rejected"])[places] >= SHORT]
    minima = answer_minima(rows)[places]
    tokens = rows.select_columns([name for name in rows.column_names if name.endswith(("_ids", "_start"))])
    parts = functools.lru_cache(1000)(lambda place: parts_of(tokens[place]))
    found: set[int] = set()
    for band in range(0, BANDS * WIDTH, WIDTH):
        for pair in later(minima[:, band : band + WIDTH] @ np.int64(1_000_003) ** np.arange(WIDTH)):
            one, other = places[list(pair)].tolist()
            close = not found & {one, other} and np.equal(*minima[list(pair)]).mean() >= ALIKE - 0.2
            if close and alike(parts(one), parts(other)):
                found.add(one)
                yield one, other


def answer_minima(rows: datasets.Dataset) -> np.ndarray:
    """Return the minima of hash functions over the n-grams of each pair's answers, (N, `BANDS` * `WIDTH`) int64."""
    factors = np.random.default_rng(0).integers(2**31, size=BANDS * WIDTH, dtype=np.uint32) * 2 + 1
    sizes = [pair_lengths(rows)[side] for side in SIDES]
    sides = (two for batch in column_batches(rows, "chosen_ids", "rejected_ids") for two in zip(*batch, strict=True))
    minima = np.zeros((len(rows), len(factors)), np.int64)
    for place, (two, *lengths) in enumerate(zip(sides, *sizes, strict=True)):
        ids = np.concatenate([ids.values.to_numpy()[-length:] for ids, length in zip(two, lengths, strict=True)])
        grams = np.zeros(max(1, len(ids) - GRAM + 1), np.uint32)
        for token in range(min(GRAM, len(ids))):
            grams = (grams ^ ids[token : token + len(grams)].astype(np.uint32)) * 0x9E3779B1
        minima[place] = ((grams ^ grams >> 15)[:, None] * factors).min(0)
    return minima


def parts_of(row: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of both answers and of the prompt."""
    sides = [row[f"{side}_ids"][row[f"{side}_start"] :] for side in SIDES]
    return [*sides, row["chosen_ids"][: row["chosen_start"]]]


def alike(one: list[list[int]], other: list[list[int]]) -> bool:
    """Return whether two pairs are nearly the same in all parts."""
    for parts in zip(one, other, strict=True):
        first, second = (set(zip(*(ids[place:] for place in range(GRAM)), strict=False)) for ids in parts)
        if parts[0] != parts[1] and len(first & second) <= ALIKE * len(first | second):
            return False
    return True


class Finding(NamedTuple):
    """Result of one check; `pairs` is 0 where that is not worth telling."""

    name: str
    pairs: int
    of: int
    says: str
    examples: list[str]

    def __str__(self) -> str:
        details = "; ".join(part for part in (self.says, ", ".join(self.examples)) if part)
        return f"{self.name}: {counted(self.pairs, 'pair')} ({self.pairs / self.of:.1%}): {details}"


def end_to_end(done: list[Tokenized]) -> datasets.Dataset:
    """Return the pairs of all sources, one source after the other."""
    import datasets

    return datasets.concatenate_datasets([one.rows for one in done]) if len(done) > 1 else done[0].rows


def namer(done: list[Tokenized]) -> Callable[[int], str]:
    """Return a function that names the pair at a position by its row and, of several sources, the source."""
    source, row = (numbers(end_to_end(done), name) for name in ("source", "row"))
    return lambda place: f"row {row[place]}" + (f" of {done[source[place]].label}" if len(done) > 1 else "")


@progress("checking the pairs")
def inspect(done: list[Tokenized], tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Return what each check found in the pairs of all sources."""
    rows, name, count = end_to_end(done), namer(done), sum(len(one.rows) for one in done)

    def example(place: int, side: int) -> str:
        ids = parts_of(rows[int(place)])[side][:40]
        text = " ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split())
        return f"{name(place)} {SIDES[side]}: {text if len(text) < 44 else f'{text[:40]} ...'!r}"

    findings, found = [], repeats(rows, near=True).items()
    for reason in REPEATS:
        there = [(place, other) for place, (why, other) in found if why == reason]
        two = [f"{name(place)} and {name(other)}" for place, other in there if place > other]
        findings.append(Finding(f"{reason}s", len(there), count, "", two[:6]))
    findings.append(length_bias(rows))
    sides = [numbers(rows, f"{side}_traits") for side in SIDES]
    for number, trait in enumerate(TRAITS):
        one, other = (side >> number & 1 for side in sides)
        alone = [np.flatnonzero(one > other), np.flatnonzero(other > one)]
        only, both = [len(places) for places in alone], int((one & other).sum())
        one_sided = max(only) >= max(
            ONE_SIDED * sum(only), RARE * count, (sum(only) + CHANCE * sum(only) ** 0.5) / 2, 1
        )
        says = f"only in chosen {only[0]:,}, only in rejected {only[1]:,}, in both {both:,}"
        examples = [example(place, side) for side in (0, 1) for place in alone[side][:2]]
        findings.append(Finding(trait, (sum(only) + both) * (trait in OPENINGS or one_sided), count, says, examples))
    one, other = (side >> LANGUAGE for side in sides)
    differ = np.flatnonzero((one != other) & (one > 0) & (other > 0))
    kinds = Counter(f"{LANGUAGES[one[n]]} chosen and {LANGUAGES[other[n]]} rejected" for n in differ)
    says = ", ".join(f"{kind} {pairs:,}" for kind, pairs in kinds.most_common(3))
    examples = [example(place, side) for place in differ[:1] for side in (0, 1)]
    return [*findings, Finding("different languages", len(differ), count, says, examples)]


def length_bias(rows: datasets.Dataset) -> Finding:
    """Return the finding for the longer answer, or the shorter, being the chosen one more often than chance."""
    chosen, rejected = (pair_lengths(rows)[side] for side in SIDES)
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    wins, name = max((longer, "longer"), (shorter, "shorter"))
    known = max(1, longer + shorter)
    says = (
        f"chosen is longer in {longer / len(rows):.0%} of all pairs ({chosen.mean():,.0f} and {rejected.mean():,.0f} tokens on "
        f"average); '{name} wins' is right in {wins / known:.0%} of those that differ, where chance is 50% ± "
        f"{50 * CHANCE / known**0.5:.0f}%: such a difference is learned first"
    )
    biased = wins > max(LONGER * known, (known + CHANCE * known**0.5) / 2)
    return Finding("length", wins * biased, len(rows), says, [])
