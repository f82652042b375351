"""Generated malformed recipes and data: read or refused in words, see `fuzz`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.malformed import fuzz


@pytest.mark.parametrize(
    "count", [120, pytest.param(1500, marks=pytest.mark.slow)], ids=["a few", "three thousand together"]
)
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_generated_inputs_are_read_or_refused_in_words(target: str, count: int, tmp_path: Path) -> None:
    fuzz.tokenizer()  # imports take longer than any input may
    outcomes = Counter(fuzz.generated(target, seed, tmp_path)[0] for seed in range(count))
    # both happen, so neither the inputs nor the reader are broken through and through
    assert outcomes["read"] > count / 10 and outcomes["refused"] > count / 10
