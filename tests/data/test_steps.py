"""Optimizer steps by token budget: the same pairs whatever the layout, balanced, deterministic, nothing lost."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orpo_lite.data.collate import PackedCollator, PaddedCollator
from orpo_lite.data.lengths import pair_costs
from orpo_lite.data.step_batches import StepDataset, StepLoader, StepPlan, deal, micro_batches
from orpo_lite.data.token_cache import TokenizeOptions, tokenize_rows
from orpo_lite.recipe.loading import PACKAGE

COSTS = st.lists(st.integers(2, 4000), max_size=40).map(lambda values: np.array(values, dtype=np.int64))


@given(COSTS, st.integers(1, 12))
def test_dealing_loses_nothing(costs, bins):
    dealt = deal(costs, bins)
    assert len(dealt) == bins and sorted(i for b in dealt for i in b) == list(range(len(costs)))
    loads = [costs[b].sum() for b in dealt]
    # Graham's bound, with the trivial lower bounds on the optimum
    assert max(loads) <= 4 / 3 * max(costs.max(initial=0), -(-costs.sum() // bins), _pair(costs, bins)) + 1


def _pair(costs, bins):
    """With more items than bins, two of the bins + 1 largest share a bin."""
    top = np.sort(costs)[::-1]
    return top[bins - 1] + top[bins] if len(costs) > bins else 0


@settings(deadline=None)
@given(COSTS, st.integers(50, 3000), st.integers(1, 6), st.booleans())
def test_micro_batches_stay_within_the_budget(costs, budget, count, padded):
    parts = micro_batches(costs, budget, count, padded)
    assert len(parts) >= count and sorted(i for part in parts for i in part) == list(range(len(costs)))
    for part in parts:
        taken = len(part) * costs[part].max(initial=0) if padded else costs[part].sum()
        assert taken <= budget or len(part) == 1


@settings(deadline=None)
@given(COSTS.filter(len), st.integers(1, 16), st.integers(100, 5000), st.integers(1, 4), st.booleans(), st.booleans())
def test_an_epoch_sees_every_pair_once(costs, step, budget, processes, padded, drop_last):
    plan = StepPlan(costs, step, budget, processes, 3, padded, drop_last)
    seen = []
    for number in range(len(plan)):
        cut = plan.step(2, number)
        assert len(cut) == processes and len({len(batches) for batches in cut}) == 1
        assert any(batches[0] for batches in cut)
        seen += [i for batches in cut for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    whole = len(costs) // step * step
    assert len(seen) == (whole if drop_last and whole else len(costs))


@settings(deadline=None)
@given(
    COSTS.filter(len),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_without_a_budget_too(costs, pairs, accumulation, processes, padded, drop_last, in_order):
    """No pair is repeated to fill a step up, and no micro-batch holds more than it should."""
    step = pairs * accumulation * processes
    plan = StepPlan(costs, step, None, processes, 3, padded, drop_last, pairs, in_order)
    order, seen = plan.order(2), []
    for number in range(len(plan)):
        cut = plan.step(2, number)
        assert len(cut) == processes and len({len(batches) for batches in cut}) == 1
        assert len(cut[0]) <= accumulation and max(len(batch) for batches in cut for batch in batches) <= pairs
        mine = [i for batches in cut for batch in batches for i in batch]
        wanted = order[number * step : (number + 1) * step].tolist()
        assert sorted(mine) == sorted(wanted[: len(mine)])
        if in_order and processes == 1:  # TRL's micro-batches
            assert cut[0] == [wanted[start : start + pairs] for start in range(0, len(wanted), pairs)]
        seen += mine
    whole = len(costs) // step * step
    assert len(seen) == len(set(seen)) == (whole if drop_last and whole else len(costs))


def test_steps_hold_the_same_pairs_whatever_else():
    random = np.random.default_rng(0)
    costs = random.integers(20, 900, 100)
    pairs = {
        (processes, budget, padded): [
            sorted(i for batches in plan.step(1, s) for batch in batches for i in batch) for s in range(len(plan))
        ]
        for processes, budget, padded in ((1, 500, False), (4, 500, False), (4, 9000, True), (3, 1200, False))
        for plan in [StepPlan(costs * (2 if padded else 1), 16, budget, processes, 7, padded)]
    }
    first = pairs.pop((1, 500, False))
    assert all(other == first for other in pairs.values())
    again = StepPlan(costs, 16, 500, 1, 7)
    assert again.step(1, 3) == StepPlan(costs, 16, 500, 1, 7).step(1, 3) != again.step(2, 3)


@pytest.fixture(scope="module")
def real(shared_data):
    rows = Dataset.from_list([json.loads(line) for line in (shared_data / "train.jsonl").open(encoding="utf-8")])
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "data" / "quickstart" / "model")
    return tokenize_rows(rows, tokenizer, TokenizeOptions(max_length=8192), "train")[0]


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_processes_share_a_step_evenly(real, layout):
    costs = pair_costs(real, layout)
    plan = StepPlan(costs, 64, 4096, 8)
    ratios = []
    for step in range(len(costs) // 64):
        loads = [sum(costs[batch].sum() for batch in batches) for batches in plan.step(0, step)]
        ratios.append(max(loads) / np.mean(loads))
    assert np.mean(ratios) <= 1.03


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_costs_are_the_tokens_that_are_computed(real, layout):
    rows = real.select(range(0, 1400, 70))
    collator = PaddedCollator(0) if layout == "padded" else PackedCollator(share=layout == "shared")
    assert pair_costs(rows, layout).tolist() == [collator([row])["input_ids"].numel() for row in rows]


def test_loader_goes_on_where_it_was_and_fillers_weigh_nothing(real):
    from accelerate import skip_first_batches

    rows = real.select(range(40))
    plan = StepPlan(pair_costs(rows, "shared"), 8, 700, 2)

    def items(loader):
        return [[batch["pair_rows"].tolist() for batch in item["micro_batches"]] for item in loader]

    processes = []
    for process in (0, 1):
        loader = StepLoader(StepDataset(rows, plan, PackedCollator(), process))
        loader.set_epoch(1)
        whole = items(loader)
        rest = skip_first_batches(loader, 3)
        rest.batch_sampler.batch_sampler.set_epoch(1)  # as transformers does on resume
        assert items(rest) == whole[3:] and len(loader) == 5
        processes.append(whole)
    assert [len(step) for step in processes[0]] == [len(step) for step in processes[1]]
    assert sorted(i for process in processes for step in process for batch in step for i in batch) == list(range(40))
    filler = StepDataset(rows, plan, PackedCollator(), 0)._collate([])
    assert len(filler["pair_rows"]) == 0 and filler["input_ids"].numel()
    assert all((filler[name] == -1).all() for name in ("chosen_pair", "rejected_pair", "nll_pair"))
