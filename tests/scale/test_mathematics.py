"""One optimizer step is the same on 1, 2 and 4 processes, whatever engine joins them: gradients, logs, evaluation."""

import itertools

import pytest

from tests.scale import checks
from tests.scale.group import together

LAYOUTS, BUDGETS = ("shared", "packed", "padded"), ({}, {"tokens_per_batch": 400})
EVERY = [*itertools.product(("float", "nf4"), LAYOUTS, BUDGETS)]
MICRO = ("float", "padded", {"nll_mean": "micro", "per_device_train_batch_size": 2})
SCOPE = ("float", "shared", {"nll_scope": "chosen", "max_grad_norm": 0.05})
ACCUMULATED = ("float", "packed", {"per_device_train_batch_size": 1})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    together(checks.save_base, 1, folder / "make", str(folder / "base"))
    return folder


def compared(base, cases, processes, engine):
    """What ranks found, after it was held against one process."""
    folder, name = str(base / "base"), f"{engine}-{processes}"
    (one,) = together(checks.trained, 1, base / f"{name}-one", folder, str(base / name), cases)
    many = together(checks.trained, processes, base / name, folder, str(base / name), cases, engine)
    for case, expected, mine in (each for rank in many for each in zip(cases, one, rank, strict=True)):
        assert mine["layout"] == case[1]
        assert len(mine["gradients"]) == len(expected["gradients"]) == 3, case
        for step, (got, right) in enumerate(zip(mine["gradients"], expected["gradients"], strict=True)):
            far = float((got - right).norm() / right.norm())
            print(f"{engine} {processes} {case} step {step}: {far:.1e}")
            assert right.norm() > 1e-3
            assert far <= 1e-6, (case, step, far)
        for got, right in zip(mine["logs"], expected["logs"], strict=True):
            assert got == pytest.approx(right, rel=1e-5, abs=2e-6), case
        for got, right in zip(mine["eval"], expected["eval"], strict=True):
            assert got == pytest.approx(right, rel=1e-5, abs=2e-6), case
        for tensor, right in expected["weights"].items():
            assert (mine["weights"][tensor] - right).abs().max() <= 1e-6, (case, tensor)
    return many[0]


def test_two_processes_are_one(base):
    for found in compared(base, [EVERY[0], ("nf4", "packed", BUDGETS[1]), MICRO], 2, "ddp"):
        assert found["engine"] == "DistributedDataParallel"


def test_parameters_of_fsdp2_are_sharded_and_their_step_is_the_same(base):
    """accelerate takes FSDP on a CPU for DDP, so that nothing would be tested without a look at the parameters."""
    for found in compared(base, [("nf4", "shared", {})], 2, "accelerate-fsdp2"):
        assert found["kinds"] == {"DTensor"}
        assert found["engine"].startswith("FSDP")


@pytest.mark.slow
def test_four_processes_are_one(base):
    for found in compared(base, [*EVERY, MICRO, SCOPE, ACCUMULATED], 4, "ddp"):
        assert found["engine"] == "DistributedDataParallel"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("fsdp2", 4), ("accelerate-fsdp2", 2)])
def test_fsdp2(base, engine, processes):
    cases = [("float", "shared", {}), ("nf4", "packed", BUDGETS[1]), ("float", "padded", {}), MICRO,
             ("float", "shared", {"lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}})]  # fmt: skip
    for found in compared(base, cases, processes, engine):
        assert found["kinds"] == {"DTensor"}


@pytest.mark.slow
def test_a_16_bit_base_with_float32_adapters(base):
    """As on a GPU, where a layer holds both: FSDP2 cuts, gathers and sums them in 16 bits, and so comes near one process only."""
    cases, folder = [("nf4", "packed", {"bf16": True})], str(base / "base")
    ((one,),) = together(checks.trained, 1, base / "bf16-one", folder, str(base / "bf16"), cases)
    (many,), _ = together(checks.trained, 2, base / "bf16", folder, str(base / "bf16"), cases, "accelerate-fsdp2")
    assert {str(w.dtype) for w in one["weights"].values()} == {"torch.float32"}
    assert {str(w.dtype) for w in many["weights"].values()} == {"torch.float32"}
    for got, right in zip(many["gradients"], one["gradients"], strict=True):
        assert 1e-5 < float((got.float() - right).norm() / right.norm()) < 0.05
    for got, right in zip(many["eval"], one["eval"], strict=True):
        assert got == pytest.approx(right, rel=0.01, abs=0.005)
