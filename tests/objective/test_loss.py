"""The ORPO objective: hand-worked numbers, TRL's own functions, and the places where those are not finite."""

import math

import pytest
import torch

from orpo_lite.objective.loss import log1mexp, log_odds_ratio, orpo_loss, pair_statistics, window_loss


def test_log_odds_by_hand():
    # p = 1/2 has odds 1, p = 1/5 odds 1/4: the ratio is 4
    odds = log_odds_ratio(torch.tensor([0.5]).log(), torch.tensor([0.2]).log())
    assert odds.item() == pytest.approx(math.log(4), abs=1e-6)


def test_loss_by_hand():
    chosen, rejected = torch.tensor([0.5]).log(), torch.tensor([0.2]).log()
    # log sigmoid(log 4) = log(4 / 5)
    assert orpo_loss(chosen, rejected, torch.tensor(2.0), beta=0.1).item() == pytest.approx(
        2 - 0.1 * math.log(0.8), abs=1e-6
    )


@pytest.mark.parametrize("p", [-1e-6, -1e-4, -0.5, -0.6931, -0.6932, -1.0, -10.0, -80.0, -1e3, -1e4])
def test_log1mexp_against_float64(p):
    exact = math.log(-math.expm1(p)) if p > -0.69 else math.log1p(-math.exp(p))
    assert log1mexp(torch.tensor(p)).item() == pytest.approx(exact, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("p", [0.0, -1e-9, -1e-8, -1e-7, -1e-6, -1e-3, -0.7, -50.0, -1e4])
@pytest.mark.parametrize("q", [0.0, -1e-8, -0.7, -1e4])
def test_value_and_gradient_are_finite(p, q):
    chosen, rejected = torch.tensor([p], requires_grad=True), torch.tensor([q], requires_grad=True)
    loss = orpo_loss(chosen, rejected, torch.tensor(1.0), beta=1.0)
    loss.backward()
    assert loss.isfinite() and chosen.grad.isfinite() and rejected.grad.isfinite()


def test_equals_trl_where_trl_is_finite(trl_orpo):
    p = -torch.logspace(-6, 3, 60)
    torch.testing.assert_close(log1mexp(p), trl_orpo.log1mexp(p), rtol=1e-5, atol=1e-7)


def test_trl_gradient_is_not_finite_near_zero(trl_orpo):
    """Why log1mexp is our own; when this fails, TRL has mended its own."""
    p = torch.tensor([-1e-8], requires_grad=True)
    trl_orpo.log1mexp(p).backward()
    assert not p.grad.isfinite()


def test_shares_of_any_split_add_up():
    torch.manual_seed(0)
    pairs, rows = 6, 60
    logps = -torch.rand(rows) * 3
    owner = torch.arange(rows) % pairs
    chosen, rejected = torch.where(torch.arange(rows) < 30, owner, -1), torch.where(torch.arange(rows) >= 30, owner, -1)

    def stats(keep):
        local = {old: new for new, old in enumerate(keep)}
        take = torch.tensor([o in local for o in owner.tolist()])
        move = torch.tensor([local.get(o, -1) for o in range(pairs)] + [-1])
        return pair_statistics(
            logps[take], logps[take], move[chosen[take]], move[rejected[take]], move[chosen[take]], len(keep)
        )

    whole = stats(range(pairs))
    labels = whole.nll_count.sum()
    reference = orpo_loss(whole.chosen_logps, whole.rejected_logps, whole.nll_sum.sum() / labels, 0.3)
    for split in ([[0], [1, 2, 3], [4, 5]], [[i] for i in range(pairs)], [[5, 0, 3], [1, 2, 4]]):
        total = sum(window_loss(stats(part), 0.3, labels, pairs) for part in split)
        assert total.item() == pytest.approx(reference.item(), abs=1e-6)


def test_a_row_may_count_for_both_sides_and_for_none():
    logps = torch.tensor([-1.0, -2.0, -3.0])
    stats = pair_statistics(
        logps, logps, torch.tensor([0, 0, -1]), torch.tensor([0, -1, -1]), torch.tensor([0, 0, 0]), 1
    )
    assert stats.chosen_logps.item() == -1.5 and stats.rejected_logps.item() == -1.0
    assert stats.nll_sum.item() == 6.0 and stats.nll_count.item() == 3
