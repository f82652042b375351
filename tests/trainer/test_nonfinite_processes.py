"""Two processes decide alike, whichever of them meets the number, and the error names the rows of both."""

import json
from pathlib import Path

import pytest

from tests.commands import processes


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_all_processes_decide_alike(spoil, tmp_path):
    processes(2, Path(__file__).with_name("ddp_poison.py"), tmp_path, spoil, cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["adapter"] == second["adapter"]
    for one in (first, second):
        assert one["kept"] and one["finite"]
        assert one["step"] == 1 and one["said"].startswith("step 2: ")
    # processes take pairs in turn: the second step of two micro-batches each has rows 4 to 7
    assert all(f"row {row} " in first["said"] for row in range(4, 8))
    if spoil == "loss":
        assert "not finite when computed alone: row 5 " in first["said"]
