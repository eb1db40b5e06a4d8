"""The bound of order-expressive diffusion against everything else that it must equal, all enumerated in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from order_tables import (
    LENGTH,
    MASKED,
    SETS,
    TEXTS,
    Tables,
    gauss_legendre,
    nelbo,
    nll,
    nll_in_steps,
    number_of_set,
    state_weights,
)

from hf_diffusion.diffusion.order_bound import bound_terms, jump_chain_terms, rloo_loss
from hf_diffusion.diffusion.order_masks import log_prob_of_masks
from hf_diffusion.diffusion.order_schedules import reveal_probability_of_exponents
from hf_diffusion.diffusion.plackett_luce import log_prob_of_first


EVERY_POSITION = torch.ones_like(TEXTS, dtype=torch.bool)


@pytest.fixture(params=[0, 1])
def tables(request):
    return Tables(request.param)


def state_bound(tables):
    """What each state of masks counts in the integral over log t, [texts, sets]."""
    return sum(bound_terms(tables.log_probs, tables.exponents[:, None], tables.reverse_exponents, MASKED))


def probability_of_masks(tables, log_t):
    """q(masks | text, t), [times, texts, sets]."""
    masked = SETS[:, None].expand(-1, len(TEXTS), -1)
    at = [log_prob_of_masks(tables.exponents, value.expand(len(TEXTS)), masked, EVERY_POSITION) for value in log_t]
    return torch.stack(at).exp().transpose(1, 2)


def integral(tables, least_time=0.0):
    """The bound from `least_time` on, on the clock -log t: to 60, where e^(-60 * 0.4) is left."""
    panels = torch.linspace(0, 60 if least_time == 0 else -math.log(least_time), 41, dtype=torch.float64).tolist()
    clock, weights = gauss_legendre(panels)
    return torch.einsum("i,ixs,xs->x", weights, probability_of_masks(tables, -clock), state_bound(tables))


def jump_chain(tables, with_timing):
    """The mean over all Plackett-Luce orders of the sum over their states, [texts]."""
    terms = jump_chain_terms(tables.log_probs, tables.exponents[:, None], tables.reverse_exponents, MASKED)
    state = terms.token + terms.order + (terms.timing if with_timing else 0)
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        ranks = torch.tensor([order.index(n) for n in range(LENGTH)]).expand_as(TEXTS)
        whole = torch.full((len(TEXTS),), LENGTH)
        chance = log_prob_of_first(tables.exponents, ranks, whole, EVERY_POSITION).exp()
        total = total + chance * sum(state[:, number_of_set(order[k:])] for k in range(LENGTH))
    return total


def test_the_integral_is_the_jump_chain_is_the_sum_over_states(tables):
    expected = nelbo(tables)
    torch.testing.assert_close((state_weights(tables.exponents) * state_bound(tables)).sum(-1), expected)
    torch.testing.assert_close(integral(tables), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(jump_chain(tables, with_timing=True), expected, rtol=0, atol=1e-12)


def test_the_terms_of_the_jump_chain_are_those_of_the_integral_apart(tables):
    apart = jump_chain_terms(tables.log_probs, tables.exponents[:, None], tables.reverse_exponents, MASKED)
    rate = (tables.exponents[:, None] * SETS).sum(-1)
    torch.testing.assert_close(sum(apart) * rate, state_bound(tables))
    assert all(bool((term >= 0).all()) for term in apart)
    # One position left leaves no choice of it.
    assert bool((apart.order[:, [1, 2, 4]] == 0).all())


def test_the_bounds_are_bounds_in_their_order(tables):
    likelihood = nll(tables)
    assert float((-likelihood).exp().sum()) == pytest.approx(1, abs=1e-12)
    sequential = jump_chain(tables, with_timing=False)
    assert bool((sequential > likelihood + 1e-3).all())
    assert bool((nelbo(tables) > sequential + 1e-3).all())


def test_a_model_that_knows_the_order_pays_for_tokens_only():
    tables = Tables()
    e = tables.exponents[:, None].expand(MASKED.shape)
    terms = bound_terms(tables.log_probs, e, e, MASKED)
    assert bool((terms.velocity == 0).all())
    apart = jump_chain_terms(tables.log_probs, e, 3 * e, MASKED)
    torch.testing.assert_close(apart.order, torch.zeros_like(apart.order), rtol=0, atol=1e-15)
    torch.testing.assert_close(apart.timing[:, 1:], torch.full_like(apart.timing[:, 1:], 2 - math.log(3)))


def bound_in_steps(tables, times):
    """Sum over steps of the mean divergence of the sampler's step from the posterior's, [texts]."""
    s_over_t = (times[:-1] / times[1:])[:, None, None, None]
    reveals = reveal_probability_of_exponents(tables.exponents[:, None].expand(s_over_t.shape[0], -1, 1, -1), s_over_t)
    expects = reveal_probability_of_exponents(tables.reverse_exponents.expand(len(times) - 1, -1, -1, -1), s_over_t)
    stays = torch.special.xlogy(1 - reveals, ((1 - reveals) / (1 - expects)).where(reveals < 1, 1))
    divergence = ((reveals * ((reveals / expects).log() - tables.log_probs) + stays) * SETS).sum(-1)
    return torch.einsum("kxs,kxs->x", probability_of_masks(tables, times[1:].log()), divergence)


def test_bound_in_steps_holds_and_goes_to_the_integral():
    tables = Tables()
    errors = {}
    for steps in [1, 2, 3, 8, 64, 512, 1024]:
        times = (
            torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 3
        )  # dense near 0, where exponents of 0.4 need it
        likelihood = nll_in_steps(tables, times, reveal_probability_of_exponents)
        assert float((-likelihood).exp().sum()) == pytest.approx(1, abs=1e-12)
        bound = bound_in_steps(tables, times)
        if steps == 1:  # all tokens at once leave no choice of an order
            torch.testing.assert_close(bound, likelihood)
        else:
            assert bool((bound > likelihood + 1e-3).all())
        errors[steps] = torch.cat([bound - nelbo(tables), likelihood - nll(tables)])
    assert float(errors[1024].abs().max()) < 1e-2
    assert float((2 * errors[1024] - errors[512]).abs().max()) < 1e-4  # what is left is of second order in 1/steps


def test_a_last_step_from_the_least_time_is_the_reconstruction_term():
    """The truncated integral is no bound. With the tokens still masked then, it is one: of drawing them in one step."""
    tables = Tables()
    full, gaps = nelbo(tables), []
    for least_time in [0.1, 1e-3, 1e-6]:
        truncated = integral(tables, least_time)
        torch.testing.assert_close(truncated, nelbo(tables, least_time), rtol=0, atol=1e-8)
        assert bool((truncated < full).all())
        masks = probability_of_masks(tables, torch.tensor([math.log(least_time)]).double())[0]
        reconstruction = (masks * bound_terms(tables.log_probs, *[torch.ones(1).double()] * 2, MASKED).token).sum(-1)
        whole = truncated + reconstruction
        times = torch.cat([torch.zeros(1), torch.logspace(math.log10(least_time), 0, 1001)]).double()
        torch.testing.assert_close(bound_in_steps(tables, times), whole, rtol=0, atol=0.02)
        assert bool((whole > nll_in_steps(tables, times, reveal_probability_of_exponents)).all())
        gaps.append(float((whole - full).abs().max()))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 0.01


def test_the_best_reverse_exponent_is_the_mean_over_the_texts_that_fit():
    tables, prior = Tables(), torch.rand(len(TEXTS), dtype=torch.float64)
    weights = prior[:, None] * state_weights(tables.exponents)
    best = torch.zeros_like(tables.reverse_exponents)
    visible_texts = torch.where(MASKED, -1, TEXTS[:, None])
    for x, s in itertools.product(range(len(TEXTS)), range(1, len(SETS))):
        fits = (visible_texts[:, s] == visible_texts[x, s]).all(-1)
        best[x, s] = (weights[fits, s, None] * tables.exponents[fits]).sum(0) / weights[fits, s].sum()

    def mean_bound(reverse_exponents):
        state = sum(bound_terms(tables.log_probs, tables.exponents[:, None], reverse_exponents, MASKED))
        return (weights * state).sum()

    reverse = Tables.on_canvases(torch.ones_like(tables.reverse_table)).where(~MASKED, best)
    table = torch.ones_like(tables.reverse_table)
    numbers = Tables.on_canvases(torch.arange(len(table)))
    table[numbers.flatten()] = reverse.flatten(0, 1)
    table.requires_grad_()
    (gradient,) = torch.autograd.grad(mean_bound(Tables.on_canvases(table)), table)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    # It is the least, not just stationary, and what is left is the price of an order that depends on hidden tokens.
    assert float(mean_bound(reverse)) < float(mean_bound(1.05 * reverse))
    assert float(mean_bound(reverse)) < float(mean_bound(0.95 * reverse))
    least = (weights * bound_terms(tables.log_probs, tables.exponents[:, None], reverse, MASKED).velocity).sum()
    assert float(least) > 1e-3


def test_rloo_at_a_time_has_the_gradient_of_the_expectation():
    tables, log_t = Tables(), torch.full((len(TEXTS),), math.log(0.3), dtype=torch.float64)
    e = tables.exponents.requires_grad_()
    log_prob = log_prob_of_masks(e, log_t, SETS[:, None].expand(-1, len(TEXTS), -1), EVERY_POSITION)
    losses = state_bound(tables).T / 0.3
    exact = (log_prob.exp() * losses).sum(0)
    assert_expectation(rloo_of_pairs(losses, log_prob), exact, e)


def test_rloo_of_the_jump_chain_has_the_gradient_of_the_bound():
    """All numbers of visible tokens with all pairs of ordered prefixes, as the log-probability is that of the order."""
    tables = Tables()
    e, total = tables.exponents.requires_grad_(), 0.0
    state = state_bound(tables)
    for k in range(LENGTH):
        log_probs, losses = [], []
        for first in itertools.permutations(range(LENGTH), k):
            rest = [n for n in range(LENGTH) if n not in first]
            ranks = torch.tensor([[*first, *rest].index(n) for n in range(LENGTH)]).expand_as(TEXTS)
            log_probs.append(log_prob_of_first(e, ranks, torch.full((len(TEXTS),), k), EVERY_POSITION))
            losses.append(LENGTH / e[:, rest].sum(-1) * state[:, number_of_set(rest)])
        total = total + rloo_of_pairs(torch.stack(losses), torch.stack(log_probs)) / LENGTH
    assert_expectation(total, nelbo(tables), e)


def rloo_of_pairs(losses, log_probs):
    """The expectation over all pairs of draws, held fixed, of the surrogate: [draws, texts] -> [texts]."""
    chance, total = log_probs.detach().exp(), 0.0
    for one, other in itertools.product(range(len(losses)), repeat=2):
        pair = [one, other]
        total = total + chance[one] * chance[other] * rloo_loss(losses[pair], log_probs[pair])
    return total


def assert_expectation(surrogate, exact, exponents):
    torch.testing.assert_close(surrogate, exact, rtol=0, atol=1e-10)
    gradient, expected = (
        torch.autograd.grad(value.sum(), exponents, retain_graph=True)[0] for value in [surrogate, exact]
    )
    assert float(expected.abs().min()) > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_a_change_of_time_changes_nothing(tables):
    torch.testing.assert_close(nelbo(tables, scale=0.7), nelbo(tables))
    e, reverse = 0.7 * tables.exponents[:, None], 0.7 * tables.reverse_exponents
    ours = jump_chain_terms(tables.log_probs, e, reverse, MASKED)
    unscaled = jump_chain_terms(tables.log_probs, tables.exponents[:, None], tables.reverse_exponents, MASKED)
    torch.testing.assert_close(torch.stack(ours), torch.stack(unscaled))


between = st.floats(0.01, 3, exclude_min=True, exclude_max=True)


@given(
    st.lists(st.tuples(between, between, st.booleans(), st.booleans(), st.floats(-80, 0)), min_size=1, max_size=8),
    st.floats(math.log(1e-7), math.log(27.63)),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_values_and_gradients_are_finite(positions, log_minus_log_t, dtype, autocast):
    """For exponents in (0.01, 3) and times from 1e-12 to almost 1, whatever lies at positions that do not count."""
    e, reverse, masked, eligible, log_probs = (torch.tensor(values) for values in zip(*positions, strict=True))
    masked = torch.stack([masked & eligible, eligible])[:, None]
    nothing = torch.tensor(float("nan"), dtype=dtype)
    e, reverse, log_probs = (
        torch.where(eligible, value.to(dtype), nothing)[None].requires_grad_() for value in (e, reverse, log_probs)
    )
    log_t = -torch.tensor([log_minus_log_t], dtype=dtype).exp()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_prob = log_prob_of_masks(e, log_t, masked, eligible[None])
        terms = bound_terms(log_probs, e, reverse, masked)
        apart = jump_chain_terms(log_probs, e, reverse, masked)
        loss = rloo_loss(sum(terms) * torch.exp(-log_t), log_prob) + sum(apart).sum(0)
    assert loss.dtype == dtype
    assert bool(loss.isfinite().all())
    assert bool((log_prob <= 0).all())
    assert bool((terms.velocity >= 0).all())
    for gradient in torch.autograd.grad(loss.sum(), (e, reverse, log_probs)):
        assert bool(gradient.isfinite().all())
        assert bool((gradient[:, ~eligible] == 0).all())


def test_what_is_not_due_costs_the_rate_at_which_it_is_expected():
    """A masked position that is not revealed now, as in blocks to come, by a model that does not know."""
    rates = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.7, 2.0]])
    terms = bound_terms(torch.tensor([[-5.0, -3.0]]), *rates, torch.tensor([[True, True]]))
    torch.testing.assert_close(torch.stack(terms), torch.tensor([[6.0], [0.7]]))


def test_nearly_equal_rates_keep_their_digits():
    """In float32, where e log(e/ê) - e + ê is rounding error of its terms."""
    e = torch.tensor([[0.7, 1.3]])
    reverse = e * (1 + torch.tensor([[1e-4, -1e-4]]))
    error = (reverse.double() - e.double()) / e.double()
    expected = (e.double() * (error**2 / 2 - error**3 / 3)).sum(-1)
    cost = bound_terms(torch.zeros_like(e), e, reverse, torch.ones_like(e, dtype=torch.bool)).velocity
    torch.testing.assert_close(cost.double(), expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize(("losses", "log_probs"), [((1, 4), (1, 4)), ((3, 4), (3, 4)), ((2, 4), (2, 1))])
def test_rloo_refuses_what_is_not_two_draws(losses, log_probs):
    with pytest.raises(ValueError, match="`num_copies`=2"):
        rloo_loss(torch.zeros(losses), torch.zeros(log_probs))
