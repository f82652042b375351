"""Mutated recipes and data: `python -m tests.malformed.fuzz --seconds 60`. Whatever comes is read or refused in words.

Every input is a valid file changed byte by byte or value by value. Anything but RequestError, five seconds for one of
them, or a number that is not finite in what was accepted is a finding, printed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import io
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import DataSource, ModelSection, Recipe
from orpo_lite.recipe.loading import shipped_recipes
from tests.malformed.data import rows, table, talk

SECONDS = 5.0
ODD: list[Any] = [None, True, -1, 0, 10**30, -(2**63), 0.5, float("nan"), float("inf"), 1e308, "", " ", "nan", "1e999",
                  "\ud83d", "\0", "a" * 5000, "\u202e", "👩\u200d👩", "no", "=", "<<", "~x/y", "../..", [], {}, [[]], {"a": {}},
                  [None], {"role": "user"}, {"": 1}, {"role": 5, "content": []}]  # fmt: skip
BYTES = [b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b'"', b"'", b"{", b"}", b"[", b"]", b",", b";",
         b":", b"&a ", b"*a ", b"!!python/name:os.system ", b"<<: *a\n", b"NaN", b"-Infinity", b"1e999", b"\\ud83d", b"\\u0000",
         b"\xf0\x9f", b"---\n", b"? ", b"|", b">", b"%", b"@", b"`", b"#", b"0x", b"0o8", b"1:1:1", b"2001-13-45"]  # fmt: skip


def mutate(content: bytes, random: random.Random) -> bytes:
    """A few bytes changed, put in, taken out, doubled or cut off."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        start = random.randrange(len(content) + 1)
        stop = min(len(content), start + random.choice((0, 1, 1, 2, 8, 64)))
        kind = random.randrange(5)
        if kind == 0:
            content = content[:start] + random.choice(BYTES) + content[stop:]
        elif kind == 1:
            content = content[:start] + random.randbytes(stop - start) + content[stop:]
        elif kind == 2:
            content = content[:start] + content[start:stop] * random.choice((2, 3, 50)) + content[stop:]
        elif kind == 3:
            content = content[:start] + content[stop:]
        elif random.random() < 0.3:
            content = content[:start]
    return content


def rearrange(value: Any, random: random.Random) -> Any:
    """A value somewhere inside of another replaced, taken out, moved or wrapped."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.2:
        return random.choice((random.choice(ODD), [value], {"a": value}, str(value)))
    if isinstance(value, dict):
        value = dict(value)
        key = random.choice(list(value))
        if random.random() < 0.15:
            value[random.choice(("x", "prompt", "chosen", "", "tools", 5, "conversations", key * 2 if isinstance(key, str) else 1))] = (
                value.pop(key))  # fmt: skip
        elif random.random() < 0.1:
            del value[key]
        else:
            value[key] = rearrange(value[key], random)
        return value
    value = list(value)
    place = random.randrange(len(value))
    if random.random() < 0.1:
        value *= 2
    value[place] = rearrange(value[place], random)
    return value


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@functools.cache
def recipe_texts() -> list[str]:
    """The shipped recipes, without the comments in which most changes would be lost."""
    texts = [path.read_text("utf-8") for path in shipped_recipes().values()]
    return ["".join(line for line in text.splitlines(True) if not line.startswith("#")) for text in texts]


def fuzz_recipe(random: random.Random, folder: Path) -> None:
    """One mutated recipe, now and then with a mutated override."""
    text = random.choice(recipe_texts())
    if random.random() < 0.5:
        content = rearrange(yaml.safe_load(text), random)
        raw = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    else:
        raw = mutate(text.encode(), random)
    path = folder / "mine.yaml"
    path.write_bytes(raw)
    words = [
        "training.learning_rate=1e-5",
        "data.train=[{path: a.jsonl, weight: 2}]",
        "data.template_kwargs={enable_thinking: false}",
    ]
    overrides = [mutate(random.choice(words).encode(), random).decode("utf-8", "surrogateescape")] * (
        random.random() < 0.3
    )
    recipe = Recipe.load(path, overrides)
    assert finite(recipe.model_dump()), "a number that is not finite was accepted"
    recipe.save(folder / "saved.yaml")
    assert Recipe.load(folder / "saved.yaml") == recipe, "a recipe is another once saved"


def as_csv(given: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "chosen", "rejected"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows([{key: str(value) for key, value in row.items()} for row in given])
    return text.getvalue().encode("utf-8", "surrogatepass")


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": lambda given: "".join(json.dumps(row) + "\n" for row in given).encode(),
    ".json": lambda given: json.dumps(given, indent=1).encode(),
    ".csv": lambda given: as_csv([row for row in given if isinstance(row, dict)]),
    ".parquet": lambda given: table({key: [str(row.get(key)) for row in given if isinstance(row, dict)]
                                     for key in ("prompt", "chosen", "rejected")}),
}  # fmt: skip
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
}


@functools.cache
def tokenizer() -> Any:
    from orpo_lite.model import load_tokenizer

    return load_tokenizer(ModelSection(name_or_path="builtin:quickstart/model"))


def fuzz_data(random: random.Random, folder: Path) -> None:
    """One mutated data file, read and tokenized to the end."""
    from orpo_lite.data.row_shapes import source_shape
    from orpo_lite.data.sources import open_source
    from orpo_lite.data.tokenize import PairTokenizer, TokenizeOptions

    given: list[Any] = rows(3) if random.random() < 0.5 else [talk(n) for n in range(3)]
    if random.random() < 0.5:
        given = [rearrange(row, random) if random.random() < 0.5 else row for row in given]
    suffix, packing = random.choice(list(WRITERS)), random.choice(("", "", "", *PACKERS))
    try:
        raw = WRITERS[suffix](given)
    except (UnicodeEncodeError, ValueError):  # what no writer takes
        raw = repr(given).encode("utf-8", "surrogatepass")
    if random.random() < 0.6:
        raw = mutate(raw, random)
    raw = PACKERS[packing](raw)
    if packing and random.random() < 0.5:
        raw = mutate(raw, random)
    path = folder / f"rows{suffix}{packing}"
    path.write_bytes(raw)
    try:
        options = TokenizeOptions(max_length=64, strict=random.random() < 0.7, overlong=random.choice(("drop", "truncate")),
                                  completion_end=random.choice(("trl", "turn")), apply_template=random.random() < 0.3)  # fmt: skip
        given = list(open_source(DataSource(path=str(path)), "train", None).rows())
        work = PairTokenizer(tokenizer(), options, source_shape(given[:250], str(path), options.apply_template))
        chunk = work(list(enumerate(given)))
        read, kept = len(given), len(chunk.columns["row"])
        assert kept + len(chunk.drops) == read, "a row is neither kept nor counted"
        for start, ids in zip(chunk.columns["chosen_start"], chunk.columns["chosen_ids"], strict=True):
            assert 0 <= start < len(ids) <= 64, "no answer in a pair"
    finally:
        path.unlink()


TARGETS = {"recipe": fuzz_recipe, "data": fuzz_data}


def generated(target: str, seed: int, folder: Path) -> tuple[str, float]:
    """Outcome (read or refused) and seconds of the input that this seed makes; AssertionError names a finding."""
    started = time.process_time()
    try:
        TARGETS[target](random.Random(f"{target} {seed}"), folder)
        outcome = "read"
    except RequestError as error:
        outcome = "refused"
        assert str(error) and len(str(error)) < 5000, f"{target} {seed}: a message of {len(str(error))} characters"
    except Exception as error:
        raise AssertionError(f"{target} {seed}: {type(error).__name__}: {error}") from error
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"{target} {seed}: took {seconds:.1f} s"
    return outcome, seconds


def seeds(seconds: float, first: int) -> Iterator[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield first
        first += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first one; inputs are numbered from it")
    parser.add_argument("--target", choices=[*TARGETS, "both"], default="both")
    words = parser.parse_args()
    tokenizer()  # imports take longer than any input may
    outcomes: Counter[str] = Counter()
    findings, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds(words.seconds, words.seed):
            for target in TARGETS if words.target == "both" else [words.target]:
                try:
                    outcome, seconds = generated(target, seed, Path(folder))
                    outcomes[f"{target} {outcome}"] += 1
                    slowest = max(slowest, seconds)
                except AssertionError as error:
                    findings += 1
                    print(str(error)[:500], file=sys.stderr)
                    if "DEBUG" in os.environ:
                        traceback.print_exc()
    print(f"{sum(outcomes.values()):,} inputs, {findings} findings, slowest {slowest:.2f} s: {dict(outcomes)}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
