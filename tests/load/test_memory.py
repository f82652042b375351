"""Memory does not grow with the rows: of readers (fast), of whole commands and of long runs (slow)."""

import os
import sys
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from orpo_lite.data import lengths as columns
from orpo_lite.data import pair_lengths
from orpo_lite.data.file_formats import read_file
from tests.load.big_file import FORMATS, measure, words, write
from tests.soak import KINDS, growth, soak


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "json"])  # which is held as a whole
def test_reading_holds_a_batch_at_a_time(kind, tmp_path):
    import pyarrow as pa

    def peak(count):
        path = tmp_path / f"{count}.{kind}"
        write(path, count, kind, characters=1000)
        tracemalloc.start()
        before, seen = pa.total_allocated_bytes(), 0
        most = 0
        for _ in read_file(str(path)):
            seen += 1
            most = max(most, pa.total_allocated_bytes() - before)
        held = tracemalloc.get_traced_memory()[1] + most
        tracemalloc.stop()
        assert seen == count
        return held

    small, large = peak(4000), peak(16_000)
    # of parquet, a page of each column of the row group is open, whose size follows that of the group
    assert large < (4 if kind == "parquet" else 1.3) * small and large < 30e6


def table(random, count):
    def ids(n):
        return random.integers(0, 3, n).tolist()

    return Dataset.from_list([{"chosen_ids": ids(random.integers(1, 9)), "rejected_ids": ids(random.integers(1, 9)), "chosen_start": 1, "rejected_start": 1, "row": i} for i in range(count)])  # fmt: skip


def test_numbers_of_rows_are_those_of_the_rows():
    random = np.random.default_rng(0)
    whole = concatenate_datasets([table(random, 40), table(random, 1), table(random, 60)])
    picks = [whole, whole.select(random.permutation(101)), whole.select([3, 3, 99]), whole.select(range(17, 50)),
             whole.select(range(17, 50)).select([4, 2]), whole.select([]), whole.select(range(3))]  # fmt: skip
    for rows in picks:
        expected = [
            (len(r["chosen_ids"]), r["row"], len(os.path.commonprefix([r["chosen_ids"], r["rejected_ids"]])))
            for r in rows
        ]
        found = zip(columns.list_lengths(rows, "chosen_ids"), columns.numbers(rows, "row"), columns.common_prefixes(rows, "chosen_ids", "rejected_ids"), strict=True)  # fmt: skip
        assert [tuple(map(int, one)) for one in found] == expected
        assert pair_lengths(rows)["total"].tolist() == [len(r["chosen_ids"]) + len(r["rejected_ids"]) - 1 for r in rows]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_short_soak_is_flat(tmp_path):
    found = growth(soak(tmp_path, 120, every=12))
    assert found["resident_mb"] < 15 and found["files"] == found["threads"] == found["children"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_long_soak_is_flat(kind, tmp_path):
    """`python -m tests.soak` is longer still."""
    found = growth(soak(tmp_path, 600, kind))
    assert found["resident_mb"] < 15 and found["files"] <= 0 and found["threads"] <= 0 and found["children"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "data"])
def test_memory_of_a_command_does_not_grow_with_the_rows(command, tmp_path):
    """Of JSON lines; `python -m tests.load.big_file --format` measures the others."""
    peaks, many, kind = [], 60_000, "jsonl"
    for count in (20_000, many):
        folder = tmp_path / str(count)
        folder.mkdir()
        write(folder / f"pairs.{kind}", count, kind, characters=400)
        peaks.append(measure(words(command, folder / f"pairs.{kind}", []), folder)[1])
    # some 60 bytes a row for keys and permutations, and what the allocator keeps
    assert peaks[1]["private and shared"] < peaks[0]["private and shared"] + 40e6 + 110 * (many - 20_000)
    assert peaks[1]["resident"] < 1.5e9
