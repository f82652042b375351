"""A stream's rows shared out to processes and workers: the same steps for any number of them, each row tokenised once.

Processes are threads here, which exchange at a barrier: what torch does between real ones is tested in
test_stream_processes.
"""

import json
import threading
from collections import Counter
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
from torch.utils.data import get_worker_info

from orpo_lite.common.errors import RequestError
from orpo_lite.data import file_formats as files
from orpo_lite.data import shares, streaming
from orpo_lite.data.collate import PackedCollator
from orpo_lite.data.sources import open_source
from orpo_lite.data.step_batches import StepPlan
from orpo_lite.data.stream_steps import StepStream
from orpo_lite.data.streaming import BEGINNING, PairStream, rows_of
from orpo_lite.data.tables import SKIPPED
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.data.work import pair_costs, pair_work
from orpo_lite.recipe import DataSource
from tests.load.big_file import FORMATS, write
from tests.load.test_stream_trainer import Plain, with_bad
from tests.training import rows

OPTIONS = TokenizeOptions(max_length=128)
ROWS, STEP = 97, 12
"""Rows of a pass, every fifth of them bad, and pairs of a step on all processes together."""


def steps(given, tokenizer, process=0, processes=1, **options):
    source, set_epoch = rows_of(given, "train")
    stream = PairStream([source], tokenizer, OPTIONS, set_epoch=set_epoch)
    return StepStream(stream, PackedCollator(), "shared", pairs=STEP // processes, process=process, processes=processes, weight=0.02, **options)  # fmt: skip


def told(news):
    return news.kept, news.counts, news.drops, news.cuts, news.place, news.ended


def take(stream, count, start=BEGINNING):
    """The rows of each micro-batch, and what was told, of a process's next steps."""
    stream.resume(start, 0)
    found = []
    for item in stream:
        found.append(([batch["pair_rows"].tolist() for batch in item["micro_batches"]], told(item["news"])))
        if len(found) == count:
            return found


@contextmanager
def exchange(processes, monkeypatch):
    """Lets threads be processes; gives a function that runs another one in each, and what came of it."""
    local, barrier, slots = threading.local(), threading.Barrier(processes, timeout=60), [None] * processes

    def gather(parts):
        slots[local.rank] = parts
        barrier.wait()
        every = [part for parts in slots for part in parts]
        barrier.wait()
        return every

    def run(function):
        outcome = [None] * processes

        def one(rank):
            local.rank = rank
            try:
                outcome[rank] = function(rank)
            except Exception as error:
                outcome[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcome

    run.rank = lambda: getattr(local, "rank", 0)
    monkeypatch.setattr(shares, "gather_object", gather)
    yield run


@pytest.mark.parametrize("budget", [None, 300])
def test_any_number_of_processes_takes_the_same_steps(budget, tokenizer, monkeypatch):
    """Two passes and more: the same pairs, drops and counts, each row tokenised by one process, in equal shares."""
    monkeypatch.setattr(streaming, "CHUNK", 20)
    given, count = with_bad(ROWS), 17
    whole = take(steps(given, tokenizer, budget=budget), count)
    assert sum(news[-1] for _, news in whole) == 2  # passes that ended
    seen, call = [], PairTokenizer.__call__
    for processes in (2, 3, 12):
        with exchange(processes, monkeypatch) as run:
            seen.clear()
            monkeypatch.setattr(PairTokenizer, "__call__", lambda self, rows, run=run: seen.extend((run.rank(), n) for n, _ in rows) or call(self, rows))  # fmt: skip
            found = run(lambda rank, n=processes: take(steps(given, tokenizer, rank, n, budget=budget), count))
            monkeypatch.setattr(PairTokenizer, "__call__", call)
        for number, (batches, news) in enumerate(whole):
            mine = [each[number] for each in found]
            assert all(other == news for _, other in mine)
            assert len({len(batches) for batches, _ in mine}) == 1
            assert sorted(row for batches, _ in mine for batch in batches for row in batch) == sorted(sum(batches, []))
        owners = dict(sorted({row: rank for rank, row in seen}.items()))
        assert len({*seen}) == len(owners) == ROWS  # no row by two of them
        assert max(Counter(owners.values()).values()) <= ROWS // processes + 1


def test_resuming_with_another_number_of_processes(tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 20)
    given = with_bad(ROWS)
    whole = take(steps(given, tokenizer), 16)
    for begin in (0, 2, 6, 9):
        place = whole[begin][1][-2]
        for processes in (1, 2, 3):
            with exchange(processes, monkeypatch) as run:
                found = run(lambda rank, n=processes, p=place: take(steps(given, tokenizer, rank, n), 6, p))
            for number, (batches, news) in enumerate(whole[begin + 1 : begin + 7]):
                assert all(each[number][1] == news for each in found)
                assert sorted(row for each in found for batch in each[number][0] for row in batch) == sorted(sum(batches, []))  # fmt: skip


def test_what_goes_wrong_on_one_process_is_raised_on_all(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(streaming, "CHUNK", 20)
    good = rows(60).to_list()

    def broken():
        yield from good[:50]
        raise ConnectionError("the line is dead")

    class Broken(Plain):
        def __iter__(self):
            return broken()

    lines = [json.dumps(row) for row in good] * 25
    lines[1203] = lines[1203][:-5]  # behind the rows that all processes decode
    (tmp_path / "torn.jsonl").write_text("\n".join(lines))
    source = open_source(DataSource(path=str(tmp_path / "torn.jsonl")), "train", None, streaming=True)

    def file(rank):
        return StepStream(PairStream([source], tokenizer, OPTIONS), PackedCollator(), "shared", pairs=6, process=rank, processes=2)  # fmt: skip

    other = rows(60, seed=5).to_list()
    differ = "train: the processes read different rows of the stream"
    cases = {
        "torn": (file, ["torn.jsonl:1204: broken JSON"] * 2),
        "dead": ([Broken([]), Plain(good)], ["^the line is dead", r"train: process 0 .* \(ConnectionError: the line"]),
        "split": ([Plain(good[::2]), Plain(good[1::2])], [differ] * 2),
        "shorter": ([Plain(good), Plain(good[:47])], [differ] * 2),
        "ended": ([Plain(good), Plain(good[:40])], [differ] * 2),
        "drifted": ([Plain(good * 30), Plain((good * 30)[:1400] + other * 6 + good)], [differ] * 2),
        "empty": ([Plain([]), Plain([])], ["train: holds no rows"] * 2),
        "once": ([Plain(iter(good)), Plain(iter(good))], ["the stream holds no rows on pass 2: it can be read once"] * 2),
    }  # fmt: skip
    for name, (make, words) in cases.items():
        with exchange(2, monkeypatch) as run:
            streams = make if callable(make) else lambda rank, make=make: steps(make[rank], tokenizer, rank, 2)
            found = run(lambda rank, streams=streams: take(streams(rank), 200))
        for error, said in zip(found, words, strict=True):
            assert isinstance(error, ConnectionError if said.startswith("^the line") else RequestError), (name, found)
            with pytest.raises(type(error), match=said):
                raise error


class SplitByWorker(Plain):
    """Splits itself as torch's documentation shows it."""

    def __iter__(self):
        worker = get_worker_info()
        return iter(self.given if worker is None else self.given[worker.id :: worker.num_workers])


@pytest.mark.parametrize("kind", ["datasets", "shuffled", "torch"])
def test_workers_share_a_stream_and_change_nothing(kind, tokenizer, monkeypatch):
    """Also streams that split themselves by worker, and those that datasets shuffles anew in every pass."""
    monkeypatch.setattr(streaming, "CHUNK", 20)
    given = with_bad(ROWS)
    table = datasets.Dataset.from_list(given)
    stream = SplitByWorker(given) if kind == "torch" else table.to_iterable_dataset(num_shards=4)
    stream = stream.shuffle(seed=1, buffer_size=30) if kind == "shuffled" else stream
    found = [take(steps(stream, tokenizer, workers=workers), 17) for workers in (0, 1, 3)]
    assert found[0] == found[1] == found[2]
    if kind != "shuffled":
        assert sum(sum((batches for batches, _ in found[0][:7]), []), []) == [n for n in range(ROWS) if n % 5 != 3]
    place = found[0][8][1][-2]
    assert place.passes == 1
    assert take(steps(stream, tokenizer, workers=3), 5, place) == found[0][9:14]


@pytest.mark.parametrize("kind", [*FORMATS, "saved"])
def test_a_share_decodes_its_rows_only(kind, tmp_path, monkeypatch):
    path = tmp_path / f"pairs.{kind}"
    write(path if kind != "saved" else tmp_path / "pairs.jsonl", 2300, "jsonl" if kind == "saved" else kind, characters=60)  # fmt: skip
    if kind == "saved":
        datasets.Dataset.from_json(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache")).save_to_disk(path)
    source = open_source(DataSource(path=str(path)), "train", None, streaming=True)
    every = [row for batch in source.batches() for row in batch]
    parsed, parse = [], files.parse_json
    monkeypatch.setattr(files, "parse_json", lambda *words: parsed.append(1) or parse(*words))
    wanted = [n for n in range(2300) if n < 1000 or n >= 1500 and n % 4 == 1 or n in (1500, 1900)]
    mine = streaming.mine(1500, 400, 1, 4)
    found = [row for batch in source.batches(mine) for row in batch]
    assert len(found) == len(every) == 2300
    assert [n for n, row in enumerate(found) if row is not SKIPPED] == wanted
    assert all(found[n] == every[n] for n in wanted)
    if kind.startswith("jsonl"):
        assert len(parsed) == len(wanted)


def test_steps_are_dealt_by_work_as_those_of_tables(tokenizer):
    given = rows(48)
    pairs, _ = tokenize_rows(given, tokenizer, OPTIONS)
    for layout in ("shared", "padded"):
        for budget in (None, 200):
            stream = steps(given.to_iterable_dataset(), tokenizer, 0, 4, budget=budget)
            stream.layout = layout
            work = pair_work(pairs, layout, stream.weight)
            plan = StepPlan(pair_costs(pairs, layout), STEP, budget, 4, None, layout == "padded", pairs_per_batch=3, work=work)  # fmt: skip
            window = [pair | {name: np.array(pair[name]) for name in ("chosen_ids", "rejected_ids")} for pair in pairs.select(range(STEP)).to_list()]  # fmt: skip
            assert stream.cut(window) == plan.step(0, 0)
            assert plan.step(0, 0) != StepPlan(plan.costs, STEP, budget, 4, None, plan.padded, pairs_per_batch=3).step(0, 0)  # fmt: skip
