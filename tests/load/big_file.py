"""What training on a file larger than memory takes: a file of synthetic pairs through `python -m orpo_lite.train`.

    python -m tests.load.big_file --pairs 2000000                    # 3 GB of JSON lines, the first optimizer steps
    python -m tests.load.big_file --pairs 200000 --format parquet    # jsonl, jsonl.gz, csv, parquet, json
    python -m tests.load.big_file --pairs 100000 --command data      # the data check instead

Memory is that of the whole process tree, several times a second: `resident`, the sum of VmRSS as the kernel counts it
(pages of memory-mapped files and pages that processes share included, these once a process); `private and shared`, the
sum of RssAnon and RssShmem, which is what cannot be dropped; and `proportional` (PSS), where a shared page counts once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORMATS = ("jsonl", "jsonl.gz", "csv", "parquet", "json")
WRONG = 0.02
"""Share of rows that have to be dropped and counted."""


def pairs(count: int, seed: int = 0, characters: int = 1500) -> Iterator[dict[str, str]]:
    """Pairs of about so many characters; every fiftieth cannot be used."""
    source = (ROOT / "orpo_lite" / "data" / "quickstart" / "train.jsonl").read_text("utf-8")
    words = sorted(set(re.findall(r"[A-Za-z]{2,}[,.?!]?", source)))
    rng = random.Random(seed)
    text = " ".join(rng.choices(words, k=400_000))
    part = characters // 5

    def piece(length: int) -> str:
        start = rng.randrange(len(text) - 2 * length)
        return text[start : start + rng.randrange(length // 2, length + length // 2)]

    for number in range(count):
        row = {"prompt": f"{number}: {piece(part)}", "chosen": piece(2 * part), "rejected": piece(2 * part)}
        if number % round(1 / WRONG) == 7:
            row["rejected"] = row["chosen"] if number % 2 else ""
        yield row


def write(path: Path, count: int, kind: str, characters: int = 1500) -> None:
    """A file of pairs in one of `FORMATS`."""
    rows = pairs(count, characters=characters)
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        names = ("prompt", "chosen", "rejected")
        with parquet.ParquetWriter(path, pa.schema([(name, pa.string()) for name in names])) as writer:
            while batch := [row for _, row in zip(range(50_000), rows, strict=False)]:
                writer.write_table(pa.table({name: [row[name] for row in batch] for name in names}))
        return
    with gzip.open(path, "wt", 1) if kind == "jsonl.gz" else path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            import csv

            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            for number, row in enumerate(rows):
                file.write(("[\n" if not number else ",\n") + json.dumps(row))
            file.write("\n]\n" if count else "[]\n")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@dataclass
class Memory:
    """Largest memory of a process and all its children, in bytes, while `watch` runs."""

    peaks: dict[str, int] = field(default_factory=dict)
    samples: int = 0

    def sample(self, root: int) -> None:
        sums = dict.fromkeys(("resident", "private and shared", "proportional"), 0)
        for pid in tree(root):
            try:
                found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text()))
            except (OSError, ProcessLookupError):
                continue  # it has just ended
            sizes = {name: int(value) * 1024 for name, value in found.items()}
            sums["resident"] += sizes.get("Rss", 0)
            # by shares: what a fork has not written to is there once
            sums["private and shared"] += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
            sums["proportional"] += sizes.get("Pss", 0)
        self.peaks = {name: max(value, self.peaks.get(name, 0)) for name, value in sums.items()}
        self.samples += 1

    def watch(self, root: int, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            self.sample(root)


def tree(root: int) -> list[int]:
    """A process and all that it started."""
    found = [root]
    for pid in found:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def measure(words: list[str], folder: Path, shown: bool = False) -> tuple[float, dict[str, int], str]:
    """Seconds, peaks of memory and the output of a command in its own process tree, caches in `folder`."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    memory, stop, started = Memory(), threading.Event(), time.monotonic()
    with (folder / "output.txt").open("w+b") as out:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, env=environment, stdout=out, stderr=None if shown else out)  # fmt: skip
        watcher = threading.Thread(target=memory.watch, args=(process.pid, stop))
        watcher.start()
        status = process.wait()
        stop.set()
        watcher.join()
        out.seek(0)
        text = out.read().decode("utf-8", "replace")
    if status:
        raise SystemExit(f"exit status {status}:\n{text[-3000:]}")
    return time.monotonic() - started, memory.peaks, text


def words(command: str, path: Path, extra: list[str]) -> list[str]:
    """The command line: quickstart's model on the file, five optimizer steps, 50 held-out pairs."""
    train = ["training.max_steps=5", "evaluation.samples=2", "evaluation.max_new_tokens=8", "training.logging_steps=1",
             "training.eval_strategy=no", "training.output_dir=run"]  # fmt: skip
    return [
        f"orpo_lite.{command}", "--recipe", "quickstart", f"data.train={path}", "data.eval=null",
        "data.max_eval_rows=50", "data.max_length=1024", *(train if command == "train" else []), *extra,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=1500, help="of a pair")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--command", choices=("train", "data"), default="train")
    parser.add_argument("--folder", type=Path, help="where the file goes (deleted afterwards); a temporary folder")
    parser.add_argument("--show", action="store_true", help="let the command's progress through")
    parser.add_argument("overrides", nargs="*", help="key=value for the recipe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        path = folder / f"pairs.{given.format}"
        started = time.monotonic()
        write(path, given.pairs, given.format, given.characters)
        print(f"{given.pairs:,} pairs, {path.stat().st_size / 1e9:.2f} GB of {given.format}, written in {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        seconds, peaks, text = measure(words(given.command, path, given.overrides), folder, given.show)
        print(f"{seconds:.0f} s, {given.pairs / seconds:,.0f} rows/s over all")
        print("peak memory of the process tree: " + ", ".join(f"{value / 1e9:.2f} GB {name}" for name, value in peaks.items()))  # fmt: skip
        print("\n".join(text.strip().splitlines()[-40:]))


if __name__ == "__main__":
    main()
