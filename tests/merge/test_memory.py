"""Peak memory and bits of a merge on a model of some size, and the benchmark that states them."""

import subprocess
import sys

import pytest

from tests.benchmarks.merge import bench, differing, make_adapter, make_base

PEAK = """
import sys
from orpo_lite.common.console import peak_memory_bytes
from orpo_lite.merge.run import merge
merge(*sys.argv[1:])
print(peak_memory_bytes("cpu"))
"""


@pytest.mark.slow
def test_peak_memory_and_bits(tmp_path):
    """1 GB plus twice the largest tensor, the check of the logits included."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    parameters = make_base(base, layers=8, hidden=2048)
    make_adapter(adapter, base)
    words = [sys.executable, "-c", PEAK, adapter, merged]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    assert "top-1 agreement" in done.stdout
    peak = int(done.stdout.split()[-1])
    largest = 32000 * 2048 * 2
    assert peak < 10**9 + 2 * largest
    assert parameters * 2 > 10**9 > peak, "the model has to be larger than what the merge takes"
    assert differing(merged, base, adapter, merged) == (0, 0)


@pytest.mark.slow
def test_benchmark(tmp_path):
    found = bench(tmp_path, layers=2, hidden=512, repeats=1, verify=True)
    assert found["weights_not_rounded_once"] == found["weights_unlike_peft"] == 0
    assert all(seconds > 0 for each in found["seconds"].values() for seconds in each)
    assert 0.2 < found["ours_memory_share"] < 2
