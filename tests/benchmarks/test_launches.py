"""Ceilings on what a micro-batch launches, counted at the real width with a few layers, and that it never waits for the device."""

import functools

import pytest

from tests.benchmarks.launches import AMPERE, MODELS, T4, Launches, whole


@functools.cache
def counted(size: str, pairs: int, t4: bool = False, trl: bool = False) -> Launches:
    return whole(size, T4 if t4 else AMPERE, pairs, trl)


@pytest.mark.parametrize("t4", [False, True], ids=["sm86", "t4"])
@pytest.mark.parametrize("size", MODELS)
def test_more_pairs_launch_no_more_kernels(size, t4):
    one, eight = (counted(size, pairs, t4).counts["kernels"] for pairs in (1, 8))
    assert eight <= 1.1 * one


@pytest.mark.parametrize("size", MODELS)
def test_one_pair_launches_no_more_than_trl(size):
    assert counted(size, 1).counts["kernels"] <= 1.05 * counted(size, 1, trl=True).counts["kernels"]


@pytest.mark.parametrize("t4", [False, True], ids=["sm86", "t4"])
@pytest.mark.parametrize("size", MODELS)
def test_nothing_waits_for_the_device(size, t4):
    found = counted(size, 8, t4)
    assert found.counts["syncs"] == 0, found.syncs


@pytest.mark.parametrize("size", ["4B", "7B"])
def test_a_quantized_model_casts_less_often_than_trls(size):
    assert counted(size, 1).counts["casts"] < 0.65 * counted(size, 1, trl=True).counts["casts"]
