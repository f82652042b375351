"""The scaling benchmark: its ratios by hand, its command on two real processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.benchmarks.scaling import results


def test_ratios_are_of_the_same_round_and_of_what_the_machine_gives():
    seconds = {"products alone": [1.0, 2.0, 1.0], "products": [1.0, 2.0, 1.25], "ours alone": [8.0, 8.0, 9.0],
               "ours": [4.0, 5.0, 6.0], "trl": [12.0, 10.0, 18.0]}  # fmt: skip
    found = results(seconds, processes=2, pairs=8)
    assert found["pairs_per_second"] == 8 / 5
    assert found["gain"] == {"median": 1.6, "min": 1.5, "max": 2.0}
    # both processes multiply as much as the one did alone: 2 for as long means twice the work
    assert found["gain_of_products"] == {"median": 2.0, "min": 1.6, "max": 2.0}
    assert found["share_of_what_is_possible"]["median"] == pytest.approx(1.5 / 1.6)
    assert found["times_as_fast_as_trl"] == {"median": 3.0, "min": 2.0, "max": 3.0}


@pytest.mark.slow
def test_two_processes_race_one_and_trl():
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.scaling",
        "--recipe",
        "quickstart",
        "--pairs",
        "4",
        "--repeats",
        "1",
    ]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["processes"] == 2 and set(found["seconds"]) == {
        "products alone",
        "products",
        "ours alone",
        "ours",
        "trl",
    }
    assert found["gain"]["median"] > 0 and found["share_of_what_is_possible"]["median"] > 0


def test_what_cannot_be_shared_is_refused():
    import typer
    from typer.testing import CliRunner

    from orpo_lite.common.errors import RequestError
    from tests.benchmarks.scaling import command

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--recipe", "quickstart", "--pairs", "3"])
    assert isinstance(done.exception, RequestError) and "--pairs" in str(done.exception)
