"""Shared by all tests: no network, one thread a worker, real data where it lies, and TRL's trainer for comparison."""

import importlib
import os
import tempfile
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# read where trackio is first imported
os.environ.setdefault("TRACKIO_DIR", str(Path(tempfile.gettempdir()) / f"orpo-trackio-{os.getpid()}"))
# bitsandbytes asks at its import for compiled CPU functions: two seconds of every process, and more at their first call
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if not os.path.exists("/dev/nvidiactl"):  # read where triton is first imported: its kernels run on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers that each take every core wait for each other; processes that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference data; tests that want it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real preference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def trl_orpo():
    """trl.experimental.orpo's trainer module, to compare with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("trl.experimental.orpo.orpo_trainer")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a ChatML template."""
    from tests.tiny import tiny_tokenizer
    from tests.training import CHATML

    return tiny_tokenizer(("<|im_start|>", "<|im_end|>"), CHATML, eos="<|im_end|>", pad="<pad>")
