"""A JSON array is read row by row: the same rows and, word for word, the same errors as when parsed whole."""

import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_lite.common.errors import RequestError
from orpo_lite.data import file_formats as files
from orpo_lite.data import json_array
from orpo_lite.data.json_array import JsonArray

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def whole(text: bytes):
    """Rows or error of the document parsed at once."""
    try:
        return list(files.read_json_document("a.json", text))
    except RequestError as error:
        return str(error)


def streamed(text: bytes):
    cut = text.find(b"\n") + 1 or len(text)
    try:
        return list(files.read_json_array("a.json", text[:cut], io.BytesIO(text[cut:])))
    except RequestError as error:
        return str(error)


@settings(deadline=None, max_examples=300)
@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.sampled_from([None, 1]), st.randoms(use_true_random=False))
def test_rows_and_errors_are_those_of_the_whole_document(rows, block, indent, rng: random.Random):
    text = json.dumps(rows, indent=indent, ensure_ascii=rng.random() < 0.5).encode()
    damaged = bytearray(text)
    kind = rng.randrange(4)
    place = rng.randrange(len(text))
    if kind == 1:
        damaged = damaged[:place]
    elif kind == 2:
        damaged[place] = rng.choice(b'{}[],:"x1 \n')
    elif kind == 3:
        damaged += rng.choice([b" x", b"]", b"\n\n", b" \n[1]"])
    text = bytes(damaged)
    if not text.lstrip().startswith(b"["):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK", block)
        found, expected = streamed(text), whole(text)
    if isinstance(expected, str) and "not UTF-8" in expected:
        assert isinstance(found, str)  # of two errors, the first in the file is named
    elif isinstance(expected, list):
        assert [row for batch in found for row in batch] == [row for batch in expected for row in batch]
    else:
        assert found == expected


@pytest.mark.parametrize("text", [b"[", b"[1,]", b"[1 2]", b'[{"a": 1, "a": 2}]', b"[" * 100_000, b'["\0"]', b"[1]\0", b'[{"a": tru',
    b'["abc', b"[1e+16, -2.5E-3]", b"[1e+]", b"[]", b"[ ]  ", b"[]]", b'[\n{"a": 1},\n\n  {"b" 2}]', b"[" + b"9" * 5000 + b"]", b'["\xff"]', b'["a",\n "\xe9"]'])  # fmt: skip
@pytest.mark.parametrize("block", [1, 7, 1_000_000])
def test_damage_is_named_by_the_same_words(text, block, monkeypatch):
    monkeypatch.setattr(json_array, "BLOCK", block)
    assert streamed(text) == whole(text)


def test_what_was_read_is_forgotten(monkeypatch):
    monkeypatch.setattr(json_array, "BLOCK", 1000)
    rows = [{"prompt": f"{i}", "chosen": "x" * 50} for i in range(20_000)]
    array = JsonArray(b"[", io.BytesIO(json.dumps(rows)[1:].encode()), json.JSONDecoder())
    widest = 0
    for number, row in enumerate(array):
        assert row == rows[number]
        widest = max(widest, len(array.text))
    assert number == len(rows) - 1 and widest < 5000
