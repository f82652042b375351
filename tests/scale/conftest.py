"""Runs that the tests of several files look at."""

import pytest

from tests.scale.group import torchrun


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Folder and words of a run of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, said = torchrun(out)
    assert status == 0, said[-4000:]
    return out, said
