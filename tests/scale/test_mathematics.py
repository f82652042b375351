"""One optimizer step is the same on 1, 2 and 4 processes: gradients, logs, evaluation."""

import itertools

import pytest

from tests.scale import checks
from tests.scale.group import together

LAYOUTS, BUDGETS = ("shared", "packed", "padded"), ({}, {"tokens_per_batch": 400})
EVERY = [*itertools.product(("float", "nf4"), LAYOUTS, BUDGETS)]
SCOPE = ("float", "shared", {"nll_scope": "chosen", "max_grad_norm": 0.05})
TRAINED_HEAD = ("float", "shared", {"lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}})
ACCUMULATED = ("float", "packed", {"per_device_train_batch_size": 1})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    together(checks.save_base, 1, folder / "make", str(folder / "base"))
    return folder


def compared(base, cases, processes):
    """Hold what ranks found against one process."""
    folder, name = str(base / "base"), f"on-{processes}"
    (one,) = together(checks.trained, 1, base / f"{name}-one", folder, str(base / name), cases)
    many = together(checks.trained, processes, base / name, folder, str(base / name), cases)
    for case, expected, mine in (each for rank in many for each in zip(cases, one, rank, strict=True)):
        assert mine["layout"] == case[1]
        assert expected["engine"] != mine["engine"] == "DistributedDataParallel"
        assert len(mine["gradients"]) == len(expected["gradients"]) == 3, case
        for step, (got, right) in enumerate(zip(mine["gradients"], expected["gradients"], strict=True)):
            far = float((got - right).norm() / right.norm())
            print(f"{processes} {case} step {step}: {far:.1e}")
            assert right.norm() > 1e-3
            assert far <= 1e-6, (case, step, far)
        for got, right in zip(mine["logs"], expected["logs"], strict=True):
            assert got == pytest.approx(right, rel=1e-5, abs=2e-6), case
        for got, right in zip(mine["eval"], expected["eval"], strict=True):
            assert got == pytest.approx(right, rel=1e-5, abs=2e-6), case
        for tensor, right in expected["weights"].items():
            assert (mine["weights"][tensor] - right).abs().max() <= 1e-6, (case, tensor)


def test_two_processes_are_one(base):
    compared(base, [EVERY[0], ("nf4", "packed", BUDGETS[1])], 2)


@pytest.mark.slow
def test_four_processes_are_one(base):
    compared(base, [*EVERY, SCOPE, ACCUMULATED, TRAINED_HEAD], 4)
