"""Draws of masks: every estimator's mean, and the mean of its gradient, against the bound in closed form."""

import itertools
import math
from typing import get_args

import pytest
import torch
from order_tables import LENGTH, MASKED, TEXTS, Tables, nelbo, state_weights

from hf_diffusion.diffusion.order_bound import bound_terms, rloo_loss
from hf_diffusion.diffusion.order_masks import OrderEstimator, draw_masks, draw_masks_at


ESTIMATORS = get_args(OrderEstimator)
LEAST_TIME, CENTER, REPEATS = 0.02, 0.7, 25_000


def draw(estimator, eligible=None, exponents=None, seed=0, num_copies=2):
    exponents = Tables().exponents.repeat(REPEATS, 1) if exponents is None else exponents
    eligible = torch.ones_like(exponents, dtype=torch.bool) if eligible is None else eligible
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(exponents, eligible, estimator, generator, num_copies, LEAST_TIME, CENTER)


def losses_of(tables, exponents, draws):
    """The weighted terms of the bound at what was drawn for all texts, `REPEATS` times over, [copies, rows]."""
    numbers = (draws.masked * 2 ** torch.arange(LENGTH)).sum(-1)
    text = torch.arange(len(TEXTS)).repeat(REPEATS)
    log_probs, reverse = tables.log_probs[text, numbers], tables.reverse_exponents[text, numbers]
    return draws.weight * sum(bound_terms(log_probs, exponents, reverse, draws.masked))


def factor(estimator):
    """What makes the mean over the times that are drawn an integral."""
    return {"uniform_time": 1 - LEAST_TIME, "power_time": 1 - LEAST_TIME**CENTER}.get(estimator, 1.0)


def expected_bound(tables, estimator):
    return nelbo(tables, LEAST_TIME if "time" in estimator else 0.0)


def assert_within_4_standard_errors(draws, expected):
    """Draws [rows, ...] of all texts, `REPEATS` times over, and what the mean for each text must be."""
    draws = draws.detach().unflatten(0, (REPEATS, len(TEXTS)))
    standard_error = draws.std(dim=0) / math.sqrt(REPEATS)
    assert float(standard_error.median()) < 0.03 * float(expected.abs().max())
    assert bool(((draws.mean(dim=0) - expected).abs() < 4 * standard_error).all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_the_draws_is_the_bound(estimator):
    tables, draws = Tables(), draw(estimator)
    losses = factor(estimator) * losses_of(tables, tables.exponents.repeat(REPEATS, 1), draws)
    for copy in losses:
        assert_within_4_standard_errors(copy, expected_bound(tables, estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_the_gradients_is_that_of_the_bound(estimator):
    tables = Tables()
    e = tables.exponents.repeat(REPEATS, 1).requires_grad_()
    draws = draw(estimator, exponents=e)
    loss = factor(estimator) * rloo_loss(losses_of(tables, e, draws), draws.log_prob)
    tables.exponents.requires_grad_()
    (expected,) = torch.autograd.grad(expected_bound(tables, estimator).sum(), tables.exponents)
    assert_within_4_standard_errors(torch.autograd.grad(loss.sum(), e)[0], expected)


def test_masks_at_one_time_are_independent_with_their_probability():
    exponents = Tables().exponents.repeat(REPEATS, 1)
    generator, everywhere = torch.Generator().manual_seed(0), torch.ones_like(exponents, dtype=torch.bool)
    masked = draw_masks_at(exponents, everywhere, 0.3, generator, num_copies=2)
    expected = 0.3 ** Tables().exponents
    for copy in masked:
        assert_within_4_standard_errors(copy.double(), expected)
        assert_within_4_standard_errors(copy.all(-1).double(), expected.prod(-1))
    assert_within_4_standard_errors((masked[0] & masked[1]).double(), expected**2)


def test_copies_are_independent_given_their_number():
    """With two visible of three, all nine pairs of the one that is left come up as often as their product says."""
    e = torch.tensor([0.5, 1.0, 2.0]).expand(120_000, -1)
    draws = draw("jump_chain", exponents=e)
    last = draws.masked.sum(-1)[0] == 1
    which = draws.masked[:, last].int().argmax(-1)
    alone = [which[0].bincount() / len(which[0]), which[1].bincount() / len(which[1])]
    for one, other in itertools.product(range(3), repeat=2):
        together = float(((which[0] == one) & (which[1] == other)).double().mean())
        expected = float(alone[0][one] * alone[1][other])
        assert abs(together - expected) < 4 * math.sqrt(expected / len(which[0]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_eligible_is_never_masked_and_counts_nowhere(estimator):
    tables = Tables()
    eligible = torch.ones_like(TEXTS, dtype=torch.bool)
    eligible[:, 1] = False
    rows = eligible.repeat(REPEATS, 1)
    e = tables.exponents.where(eligible, torch.nan).repeat(REPEATS, 1).requires_grad_()
    draws = draw(estimator, eligible=rows, exponents=e)
    assert not bool(draws.masked[:, ~rows].any())
    loss = rloo_loss(losses_of(tables, e, draws), draws.log_prob)
    assert bool(torch.autograd.grad(loss.sum(), e)[0].isfinite().all())
    # A position that is given is one that is never masked: of an infinite exponent.
    given = tables.exponents.where(eligible, 1e12)
    state = sum(bound_terms(tables.log_probs, tables.exponents[:, None], tables.reverse_exponents, MASKED))
    expected = (state_weights(given, LEAST_TIME if "time" in estimator else 0.0) * state).sum(-1)
    assert_within_4_standard_errors(factor(estimator) * loss, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_with_nothing_to_mask_count_nothing(estimator):
    e = torch.full((4, 5), torch.nan, requires_grad=True)
    eligible = torch.zeros(4, 5, dtype=torch.bool)
    draws = draw(estimator, eligible, e)
    assert not bool(draws.masked.any())
    terms = bound_terms(torch.zeros(4, 5), e, e, draws.masked)
    loss = rloo_loss(draws.weight * sum(terms), draws.log_prob)
    assert loss.tolist() == [0, 0, 0, 0]
    assert bool((torch.autograd.grad(loss.sum(), e)[0] == 0).all())


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "jump_chain"])
def test_log_probability_of_masks_at_their_time(estimator):
    exponents = Tables().exponents.repeat(REPEATS, 1)
    eligible = torch.rand(exponents.shape) < 0.7
    draws = draw(estimator, eligible, exponents)
    law = torch.distributions.Bernoulli(draws.t[:, None] ** exponents)
    expected = law.log_prob(draws.masked.double()).where(eligible, 0).sum(-1)
    torch.testing.assert_close(draws.log_prob, expected, rtol=1e-9, atol=1e-9)


def test_log_probability_of_visible_tokens_in_their_order():
    """The mean of 1 / probability is how many there are of what may be drawn."""
    draws = draw("jump_chain")
    visible = LENGTH - draws.masked.sum(-1)
    assert bool((visible[0] == visible[1]).all())
    assert visible[0].bincount().tolist() == pytest.approx([REPEATS * len(TEXTS) / LENGTH] * LENGTH, abs=1)
    for k, number in enumerate([1, 3, 6]):
        inverse = (-draws.log_prob[visible == k]).exp()
        assert abs(float(inverse.mean()) - number) <= 4 * float(inverse.std()) / math.sqrt(len(inverse)) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_fractions_are_spread_evenly_whatever_the_exponents(dtype):
    generator = torch.Generator().manual_seed(3)
    e = 0.05 * 60 ** torch.rand(1000, 64, generator=generator, dtype=dtype)
    eligible = torch.rand(1000, 64, generator=generator) < 0.5
    draws = draw("mask_fraction", eligible, e)
    masked = (draws.t[:, None] ** e.double()).where(eligible, 0)
    fraction = masked.sum(-1) / eligible.sum(-1)
    assert torch.equal((fraction * 1000 - 1e-6).floor().sort().values, torch.arange(1000).double())
    # The weight is the derivative of log t by the fraction.
    slope = (masked * e).sum(-1) / eligible.sum(-1)
    torch.testing.assert_close(draws.weight[0].double(), 1 / slope, rtol=1e-5, atol=0)


def test_mask_fractions_of_the_hardest_exponents():
    """Of a thousand positions all but one are fast, or one; many of these times are too small for float32."""
    few = torch.arange(1024) < torch.tensor([1, 2, 10, 100, 1000, 1014, 1023])[:, None]
    e = torch.where(few, 0.0101, 2.99).repeat(100, 1).requires_grad_()
    draws = draw("mask_fraction", exponents=e)
    assert int((draws.t < 1e-45).sum()) > 100
    assert float((draws.weight > 0).double().mean()) == 1
    (gradient,) = torch.autograd.grad(draws.log_prob.sum(), e)
    assert bool(gradient.isfinite().all())
    # As many masks as there should be: in all, half of the positions.
    share = draws.masked.double().mean(dim=(0, 2))
    assert abs(float(share.mean()) - 0.5) < 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_that_is_scored_again_gets_every_part(estimator):
    """With exponents all equal, so that parts are the same for all rows."""
    e, generator = torch.full((4, 8), 0.7), torch.Generator().manual_seed(0)
    parts = []
    for _ in range(200):
        draws = draw_masks(e, torch.ones(4, 8, dtype=torch.bool), estimator, generator, 1, 1e-9, 0.7)
        if draws.t is None:
            parts.append((8 - draws.masked[0].sum(-1)) // 2)
        else:
            level = draws.t if estimator == "uniform_time" else draws.t**0.7
            parts.append((level * 4 - 1e-5).floor().long())
    parts = torch.stack(parts)
    assert torch.equal(parts.sort(dim=1).values, torch.arange(4).expand(200, -1))
    for row in parts.T:
        assert min(row.bincount(minlength=4).tolist()) > 25  # of 50 expected


def test_the_same_seed_draws_the_same_masks():
    for estimator in ESTIMATORS:
        one, again, other = (draw(estimator, exponents=torch.rand(9, 5) * 0 + 1, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.masked, again.masked)
        assert not torch.equal(one.masked, other.masked)


def test_without_an_order_all_estimators_weigh_alike():
    """With exponents 1, weight is length / (number masked) in the jump chain, and 1 / fraction by the fraction."""
    e = torch.ones(600, 6)
    draws = draw("jump_chain", exponents=e)
    torch.testing.assert_close(draws.weight, 6 / draws.masked.sum(-1))
    by_time = [draw(name, exponents=e) for name in ("uniform_time", "mask_fraction")]
    for draws in by_time:
        torch.testing.assert_close(draws.weight[0].double(), 1 / draws.t, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "antithetic"}, "`estimator` must be one of .*'jump_chain'.*got 'antithetic'"),
        ({"least_time": 0.0}, "`least_time` must be more than 0"),
        ({"center": 0.0}, "`center` must be positive, got 0.0"),
        ({"num_copies": 0}, "`num_copies` must be at least 1"),
        ({"eligible": torch.ones(2, 4, dtype=torch.bool)}, "`eligible` must be a bool tensor of the shape"),
        ({"eligible": torch.ones(2, 3)}, "`eligible` must be a bool tensor"),
        ({"exponents": torch.ones(2, 3, dtype=torch.bfloat16)}, "`exponents` must be float32 or wider"),
        ({"exponents": torch.tensor([[1.0, 0.0, 1.0]] * 2)}, "`exponents` must be positive where `eligible`, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"exponents": torch.ones(2, 3), "eligible": torch.ones(2, 3, dtype=torch.bool), "estimator": "jump_chain"}
    with pytest.raises(ValueError, match=message):
        draw_masks(**{**good, **arguments})


@pytest.mark.parametrize("t", [0.0, 1.5])
def test_times_out_of_range_are_refused(t):
    with pytest.raises(ValueError, match="`t` must be more than 0 and at most 1"):
        draw_masks_at(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), t)
