"""Plans for the CPU against real training steps, as torch's profiler saw them."""

import pytest

from tests.benchmarks.plan_accuracy import CASES, TOLERANCE, UNDER, Case, compare

QUICK = [
    Case("llama", "nf4", "all", "shared", length=96),
    Case("qwen2", "none", "none", "padded", length=96),
    # autocast, and 16-bit weights under float32 norms and adapters
    Case("llama", "nf4", dtype="bfloat16", length=32),
]


def check(case: Case) -> None:
    held = compare(case)
    assert -UNDER <= held.error <= TOLERANCE, held
    # what the model holds all the time must not hide an error in the step
    assert -UNDER <= held.step_error <= TOLERANCE, held


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_plan_is_what_a_step_takes(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plan_is_what_a_step_takes_everywhere(case):
    check(case)
