"""Files, globs, folders and hub ids in; rows out, or an error that names the place."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from orpo_lite.common.errors import RequestError
from orpo_lite.data import TooManyDropped, load_pairs
from orpo_lite.data.sources import open_source
from orpo_lite.recipe import DataSection, DataSource
from tests.data.conftest import write_jsonl
from tests.tiny import base_tokenizer

TOKENIZER = base_tokenizer("Qwen/Qwen2-0.5B-Instruct")


def rows(count: int, word: str = "egg") -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {word} {n}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n}."}],
            "rejected": [{"role": "assistant", "content": "I do not know."}],
        }
        for n in range(count)
    ]


def spec(path: Any, **options: Any) -> DataSection:
    return DataSection.model_validate({"train": path if isinstance(path, list) else str(path)} | options)


def read(path: Any, split: str = "train", own_split: str | None = None) -> list[Any]:
    opened = open_source(DataSource(path=str(path), split=own_split), split, None)
    return list(opened.rows())


def lines(given: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given).encode()


def write_table(path: Path, given: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(given[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(given)
    return path


@pytest.mark.parametrize(("pack", "suffix"), [(None, ""), (gzip, ".gz"), (gzip, ".GZ")])
def test_json_lines_plain_and_compressed(pack: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.jsonl{suffix}"
    path.write_bytes(pack.compress(lines(rows(5))) if pack else lines(rows(5)))
    assert read(path) == rows(5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.json", json.dumps(rows(3))),
        ("pretty.json", json.dumps(rows(3), indent=2)),
        ("lines.json", lines(rows(3)).decode()),
        ("array.jsonl", json.dumps(rows(3))),
        ("blank.jsonl", "\n\n" + lines(rows(3)).decode().replace("\n", "\r\n\r\n")),
        ("mark.jsonl", "\ufeff" + lines(rows(3)).decode()),
        ("lines.ndjson", lines(rows(3)).decode()),
    ],
)
def test_json_by_content_whatever_the_suffix(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert read(tmp_path / name) == rows(3)


def test_one_row_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(rows(1)[0], indent=1))
    assert read(tmp_path / "one.json") == rows(1)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_with_text_and_with_messages(suffix: str, tmp_path: Path) -> None:
    delimiter = "," if suffix == "csv" else "\t"
    texts = [{"prompt": 'A "quoted",\nbroken prompt', "chosen": "[1, 2]", "rejected": "{}"}]
    assert read(write_table(tmp_path / f"texts.{suffix}", texts, delimiter)) == texts
    for dump in (json.dumps, repr):
        cells = [{key: dump(value) for key, value in row.items()} for row in rows(3)]
        assert read(write_table(tmp_path / f"messages.{suffix}", cells, delimiter)) == rows(3)


def test_parquet(tmp_path: Path) -> None:
    given = rows(3)
    given[1]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    datasets.Dataset.from_list(given).to_parquet(str(tmp_path / "pairs.parquet"))
    assert read(tmp_path / "pairs.parquet") == given


def test_globs_and_folders_read_every_file_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(2, name))
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path / "*.jsonl") == rows(2, "a") + rows(2, "b") == read(tmp_path)
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "deep" / "c.jsonl", rows(1, "c"))
    assert len(read(tmp_path / "**" / "*.jsonl")) == 5


def test_folders_by_split(tmp_path: Path) -> None:
    for name in ("train-00000", "test-00000"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(2, name))
    assert read(tmp_path) == rows(2, "train-00000")
    assert read(tmp_path, "test") == rows(2, "test-00000") == read(tmp_path, own_split="test")
    with pytest.raises(RequestError, match='Unknown split "validation".*train.*test'):
        read(tmp_path, "validation")


# ---- several sources, limits, held-out pairs ---------------------------------------------------------------------


def test_sources_with_weights(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{word}.jsonl", rows(20, word)) for word in ("egg", "fox", "dog")]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 0.5, 2), strict=True)]
    pairs = load_pairs(spec(sources, eval_fraction=0, seed=3), TOKENIZER)
    assert [pairs.train["source"][:].count(n) for n in range(3)] == [20, 10, 40]
    assert sorted(pairs.train["row"][30:]) == sorted([*range(20)] * 2)
    again = load_pairs(spec(sources, eval_fraction=0, seed=3), TOKENIZER)
    other = load_pairs(spec(sources, eval_fraction=0, seed=4), TOKENIZER)
    assert again.train[:] == pairs.train[:] and again.fingerprint == pairs.fingerprint
    assert other.train[:] != pairs.train[:] and other.fingerprint != pairs.fingerprint
    assert [about["weight"] for about in pairs.shapes.values()] == [1, 0.5, 2]


def test_eval_fraction_holds_out_whole_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "twice.jsonl", rows(50) + rows(50))
    pairs = load_pairs(spec(path, eval_fraction=0.2), TOKENIZER)
    assert pairs.eval is not None and (len(pairs.train), len(pairs.eval)) == (80, 20)
    held, trained = ({row % 50 for row in part["row"]} for part in (pairs.eval, pairs.train))
    assert not held & trained and held | trained == set(range(50))
    again = load_pairs(spec(path, eval_fraction=0.2), TOKENIZER)
    assert again.eval is not None and again.eval["row"][:] == pairs.eval["row"][:]
    assert "key" not in pairs.train.column_names


def test_one_prompt_only_cannot_be_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", rows(1) * 4)
    with pytest.raises(RequestError, match="one prompt only: set data.eval_fraction=0"):
        load_pairs(spec(path, eval_fraction=0.5), TOKENIZER)


def test_row_limits_are_over_all_sources_and_said(tmp_path: Path) -> None:
    paths = [{"path": write_jsonl(tmp_path / f"{word}.jsonl", rows(10, word))} for word in ("egg", "fox", "dog")]
    held = write_jsonl(tmp_path / "held.jsonl", rows(10, "held"))
    pairs = load_pairs(spec(paths, eval=held, max_rows=14, max_eval_rows=3), TOKENIZER)
    assert pairs.eval is not None and (len(pairs.train), len(pairs.eval)) == (14, 3)
    assert pairs.report.rows == 17
    pairs = load_pairs(spec(paths, eval=held, max_rows=10), TOKENIZER)
    assert len(pairs.train) == 10 and "left" in pairs.report.notes[0] and "fox.jsonl" in pairs.report.notes[0]
    pairs = load_pairs(spec(paths, eval_fraction=0.5, max_eval_rows=4), TOKENIZER)
    assert pairs.eval is not None and (len(pairs.train), len(pairs.eval)) == (26, 4)


def test_prompts_on_both_sides_are_said(tmp_path: Path) -> None:
    train, held = write_jsonl(tmp_path / "a.jsonl", rows(9)), write_jsonl(tmp_path / "b.jsonl", rows(12)[6:])
    assert (
        "3 of 6 held-out pairs have a prompt that is trained on"
        in load_pairs(spec(train, eval=held), TOKENIZER).report.notes[0]
    )


def test_columns_of_one_source(tmp_path: Path) -> None:
    renamed = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows(4)]
    sources = [
        {"path": write_jsonl(tmp_path / "a.jsonl", rows(4))},
        {"path": write_jsonl(tmp_path / "b.jsonl", renamed),
         "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
    ]  # fmt: skip
    ids = load_pairs(spec(sources, eval_fraction=0), TOKENIZER).train["chosen_ids"][:]
    assert ids[:4] == ids[4:]
    with pytest.raises(ValueError, match="chosn"):
        spec([{"path": "a.jsonl", "columns": {"chosn": "good"}}])


def test_an_error_of_one_source_counts_all_of_its_section(tmp_path: Path) -> None:
    bad = [row | {"chosen": None} for row in rows(12)] + rows(1)
    sources = [{"path": write_jsonl(tmp_path / "good.jsonl", rows(10))},
               {"path": write_jsonl(tmp_path / "bad.jsonl", bad)}]  # fmt: skip
    with pytest.raises(TooManyDropped, match="data.train: 12 of 23 rows dropped .12 empty or missing side") as caught:
        load_pairs(spec(sources, eval_fraction=0), TOKENIZER)
    assert "row 0 of" in str(caught.value) and "bad.jsonl" in str(caught.value)
    assert [about["kept"] for about in caught.value.shapes.values()] == [10, 1]
    sources[0]["path"] = write_jsonl(tmp_path / "more.jsonl", rows(30))
    assert load_pairs(spec(sources, eval_fraction=0), TOKENIZER).report.kept == 31


# ---- what is wrong, and where ------------------------------------------------------------------------------------

BROKEN: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("lines.jsonl", lines(rows(2)) + b'{"prompt": \n' + lines(rows(1)), ("lines.jsonl:3", "broken JSON", "fix")),
    ("cut.json", json.dumps(rows(2), indent=1).encode()[:-30], ("cut.json", "broken JSON at line", "array of rows")),
    ("empty.jsonl", b"", ("empty.jsonl", "holds no rows")),
    ("empty.json", b"\n \n", ("empty.json", "holds no rows")),
    ("empty.csv", b"", ("empty.csv", "holds no rows")),
    ("header.csv", b"prompt,chosen,rejected\n", ("header.csv", "holds no rows")),
    ("none.json", b"[]", ("none.json", "holds no rows")),
    ("number.json", b"5", ("number.json", "found a number", "array of rows")),
    ("text.json", b'"rows"', ("text.json", "found text", "array of rows")),
    ("latin.jsonl", '{"prompt": "café"}\n'.encode("latin-1"), ("latin.jsonl:1", "not UTF-8", "convert")),
    ("latin.csv", "prompt,chosen\ncafé,b\n".encode("latin-1"), ("latin.csv", "not UTF-8", "convert")),
    ("cells.csv", b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", ("cells.csv:3", "found 4 cells", "3 columns")),
    ("names.jsonl", lines([{"question": "a", "good": "b", "bad": "c"}]),
     ("names.jsonl", "question, good, bad", "data.columns")),
    ("numbers.jsonl", b"1\n2\n", ("numbers.jsonl", "rows that are int")),
    ("fake.parquet", b"PAR1 is not enough", ("fake.parquet", "not a whole parquet file")),
    ("fake.jsonl.gz", b"plain text", ("fake.jsonl.gz", "cannot be read")),
    ("cut.jsonl.gz", gzip.compress(lines(rows(50)))[:-20], ("cut.jsonl.gz", "cannot be read")),
    ("fake.jsonl.gz", b"plain text", ("fake.jsonl.gz", "cannot be read")),
    ("fake.jsonl.xz", b"plain text", ("fake.jsonl.xz", "not a data file by its name")),
    ("deep.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ("deep.jsonl:1", "nested too deeply")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_broken_files_are_named_with_the_place(
    name: str, content: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        load_pairs(spec(tmp_path / name, eval_fraction=0), TOKENIZER)
    for word in words:
        assert word in str(caught.value)
    assert not isinstance(caught.value, TooManyDropped)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere/pairs.jsonl", ("no such file or folder", "jsonl")),
        ("pairs.csv", ("no such file or folder",)),
        ("./here", ("no such file or folder",)),
        ("nowhere/*.jsonl", ("the pattern matches no file",)),
        ("notes.txt", ("not a data file by its name", ".parquet")),
        ("folder", ("doesn't contain any data files",)),
    ],
)
def test_missing_files(path: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError) as caught:
        load_pairs(spec(path), TOKENIZER)
    for word in (path, *words):
        assert word in str(caught.value)


def test_a_mapped_column_that_is_not_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"question": "a", "good": "b", "bad": "c"}])
    with pytest.raises(RequestError, match="maps chosen to 'best', which is no column.*bad, good, question"):
        load_pairs(spec(path, columns={"chosen": "best"}), TOKENIZER)


def test_a_split_of_a_local_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(1))
    with pytest.raises(RequestError, match="split is 'test', but .* has no splits; leave it out"):
        read(path, own_split="test")
    for asked in ("validation", "train[:4]"):
        with pytest.raises(RequestError, match="data.split is .*, but .* has no splits; leave it out"):
            read(path, asked)
    with pytest.raises(RequestError, match='Unknown split "validation"'):
        read(tmp_path, "validation")
    assert read(tmp_path / "pairs.jsonl", own_split="train") == rows(1) == read(tmp_path)


# ---- hub ---------------------------------------------------------------------------------------------------------


def test_hub_offline_says_what_to_do() -> None:
    with pytest.raises(RequestError) as caught:
        load_pairs(spec("owner/no-such-preferences"), TOKENIZER)
    text = str(caught.value)
    assert "owner/no-such-preferences" in text and ("Connect once" in text or "hf auth login" in text)


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(rows(30))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "owner/preferences", "name": "en", "split": "train_prefs", "revision": "abc"}
    pairs = load_pairs(spec([source, {"path": "owner/other"}], split="test", eval_fraction=0), TOKENIZER)
    assert asked == [("owner/preferences", "en", "train_prefs", "abc"), ("owner/other", None, "test", None)]
    assert len(pairs.train) == 60


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is gated."), ("https://huggingface.co/datasets/a/b", "hf auth login")),
        (ConnectionError("Couldn't reach the hub"), ("cannot be reached", "Connect once")),
        (ValueError('Unknown split "x". Should be one of ["train"].'), ("a/b", "Unknown split")),
        (RuntimeError("Dataset scripts are no longer supported"), ("a/b", "scripts are no longer supported")),
    ],
)
def test_hub_errors_name_the_page_and_the_remedy(
    error: Exception, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RequestError) as caught:
        load_pairs(spec("a/b"), TOKENIZER)
    for word in words:
        assert word in str(caught.value)


def test_the_fingerprint_is_by_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(20))
    first, second = load_pairs(spec(path), TOKENIZER), load_pairs(spec(path), TOKENIZER)
    assert second.train[:] == first.train[:] and second.fingerprint == first.fingerprint
    write_jsonl(tmp_path / "pairs.jsonl", rows(21))
    assert load_pairs(spec(path), TOKENIZER).fingerprint != first.fingerprint
