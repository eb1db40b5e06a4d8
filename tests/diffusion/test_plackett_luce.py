"""Orders by weights against their definition, counted and added up over all permutations."""

import itertools
import math

import pytest
import torch

from hf_diffusion.diffusion.orders import NEVER
from hf_diffusion.diffusion.plackett_luce import draw_ranks, log_prob_of_first, next_pick_entropy


WEIGHTS = torch.tensor([0.3, 2.0, 0.9, 1.1], dtype=torch.float64)
ALL = torch.ones(4, dtype=torch.bool)


def by_definition(order, k):
    left, log_prob = list(range(4)), 0.0
    for n in order[:k]:
        log_prob += math.log(WEIGHTS[n] / sum(WEIGHTS[m] for m in left))
        left.remove(n)
    return log_prob


@pytest.mark.parametrize("k", range(5))
def test_log_probability_is_that_of_its_definition(k):
    for order in itertools.permutations(range(4)):
        ranks = torch.tensor([order.index(n) for n in range(4)])
        log_prob = log_prob_of_first(WEIGHTS, ranks, torch.tensor(k), ALL)
        assert float(log_prob) == pytest.approx(by_definition(order, k), abs=1e-12)


def test_orders_are_drawn_with_their_probability():
    draws = 200_000
    ranks = draw_ranks(WEIGHTS, torch.rand(draws, 4, dtype=torch.float64), ALL)
    number = (ranks * torch.tensor([1, 4, 16, 64])).sum(-1)
    for order in itertools.permutations(range(4)):
        expected = math.exp(by_definition(order, 4))
        drawn = float((number == sum(order.index(n) * 4**n for n in range(4))).double().mean())
        assert abs(drawn - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_what_is_not_eligible_is_in_no_order():
    eligible = torch.tensor([[False, True, True, False], [True, True, True, True], [False] * 4])
    weights = torch.where(eligible, WEIGHTS, torch.nan).requires_grad_()
    ranks = draw_ranks(weights, torch.rand(3, 4, dtype=torch.float64), eligible)
    assert bool((ranks[~eligible] == NEVER).all())
    assert ranks[0, 1:3].sort().values.tolist() == [0, 1]
    assert ranks[1].sort().values.tolist() == [0, 1, 2, 3]
    log_prob = log_prob_of_first(
        weights, torch.tensor([[-1, 1, 0, -1], [0, 1, 2, 3], [-1] * 4]), eligible.sum(-1), eligible
    )
    expected = [math.log(0.9 / 2.9), by_definition([0, 1, 2, 3], 4), 0.0]
    torch.testing.assert_close(log_prob, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(log_prob.sum(), weights)
    assert bool((gradient[~eligible] == 0).all())
    torch.testing.assert_close(gradient[0, 2], torch.tensor(1 / 0.9 - 1 / 2.9, dtype=torch.float64))


def test_a_thousand_positions_have_a_thousand_ranks():
    ranks = draw_ranks(
        torch.rand(20, 1024) + 0.05, torch.rand(20, 1024, dtype=torch.float64), torch.ones(20, 1024).bool()
    )
    assert torch.equal(ranks.sort(dim=-1).values, torch.arange(1024).expand(20, -1))


def test_entropy_of_the_next_pick():
    masked = torch.tensor([[True, True, False, True], [False, False, True, False], [False] * 4])
    entropy = next_pick_entropy(WEIGHTS, masked)
    expected = torch.distributions.Categorical(probs=WEIGHTS[masked[0]]).entropy()
    torch.testing.assert_close(entropy, torch.stack([expected, 0 * expected, 0 * expected]))
    torch.testing.assert_close(
        next_pick_entropy(torch.full((7,), 0.2), torch.ones(7).bool()), torch.tensor(math.log(7))
    )
