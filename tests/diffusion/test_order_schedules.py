"""Schedules per position against their derivatives, exact arithmetic and the models that they are special cases of."""

import itertools
from decimal import Decimal, localcontext

import pytest
import torch
from order_tables import (
    LENGTH,
    MASKED,
    SETS,
    TEXTS,
    Tables,
    any_order_nll,
    gauss_legendre,
    number_of_set,
    state_weights,
)

from hf_diffusion.diffusion.order_bound import bound_terms
from hf_diffusion.diffusion.order_schedules import (
    Blocks,
    Powers,
    Shared,
    genmd4_reverse,
    log_visible_probability,
    reveal_probability,
    reveal_probability_of_exponents,
)
from hf_diffusion.diffusion.schedules import Cosine, LogLinear


TEXT_OF_5 = torch.tensor([[0, 2, 1, 1, 0]])
TOKEN_WEIGHTS = torch.tensor([0.4, 1.0, 1.7], dtype=torch.float64)


@pytest.fixture(
    params=[
        Shared(Cosine(0.0)),
        Blocks(1, LogLinear(0.0)),
        Blocks(2, Cosine(0.0)),
        Powers.of_positions(torch.linspace(0.3, 2.5, 5, dtype=torch.float64)),
        Powers.of_tokens(TOKEN_WEIGHTS),
    ],
    ids=["mdm", "left_to_right", "blocks", "positions", "tokens"],
)
def schedule(request):
    return request.param


def test_velocity_is_that_of_alpha(schedule):
    t = torch.linspace(0.013, 0.987, 50, dtype=torch.float64, requires_grad=True)
    text = TEXT_OF_5.expand(50, -1)
    alpha, velocity = schedule.alpha(text, t), schedule.velocity(text, t)
    slope = torch.stack([torch.autograd.grad(alpha[:, n].sum(), t, retain_graph=True)[0] for n in range(5)], dim=1)
    torch.testing.assert_close(velocity * (1 - alpha), -slope, rtol=1e-9, atol=1e-12)
    assert bool((velocity >= 0).all())


def test_all_is_text_first_and_masks_last(schedule):
    ends = schedule.alpha(TEXT_OF_5.expand(2, -1), torch.tensor([1e-30, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([[1.0], [0.0]]).double().expand(2, 5), rtol=0, atol=1e-8)


def test_exponents_that_mask_nothing_are_refused():
    with pytest.raises(ValueError, match="`exponents` must be positive, got -1.0"):
        Powers.of_tokens(torch.tensor([1.0, -1.0, 2.0])).alpha(TEXT_OF_5, torch.ones(1))


def test_blocks_without_positions_are_refused():
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        Blocks(0, LogLinear(0.0))


def test_reveal_probability_by_counting():
    """A position masked at t was visible at s < t: of those masked at t, each at a time of its own."""
    times = torch.rand(400_000, dtype=torch.float64).sqrt()  # masked by t with probability t^2
    counted = float((times > 0.5)[times < 0.8].double().mean())
    schedule = Powers.of_positions(torch.tensor([2.0], dtype=torch.float64))
    alphas = schedule.alpha(torch.zeros(2, 1, dtype=torch.long), torch.tensor([0.5, 0.8], dtype=torch.float64))
    assert float(reveal_probability(alphas[0], alphas[1])) == pytest.approx(counted, abs=4e-3)
    assert float(reveal_probability_of_exponents(torch.tensor(2.0), 0.5 / 0.8)) == pytest.approx(counted, abs=4e-3)


def test_the_last_step_reveals_everything_and_no_step_nothing():
    e = torch.tensor([0.01, 1.0, 3.0])
    assert torch.equal(reveal_probability_of_exponents(e, 0.0), torch.ones(3))
    assert torch.equal(reveal_probability_of_exponents(e, 1.0), torch.zeros(3))
    assert float(reveal_probability(torch.tensor(1.0), torch.tensor(1.0))) == 0


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 3e-7), (torch.float64, 5e-16)])
def test_log_visible_is_exact_at_either_end(dtype, digits):
    e = torch.tensor([0.0101, 0.05, 1.0, 2.99], dtype=dtype)
    for log_t in torch.tensor([-27.6, -1.0, -0.7, -1e-3, -1e-7], dtype=dtype):
        for exponent, value in zip(e, log_visible_probability(e, log_t), strict=True):
            with localcontext() as context:
                context.prec = 60
                # From the product as rounded: what rounding it costs is not the function's.
                expected = (1 - Decimal(float(exponent * log_t)).exp()).ln()
            assert float(value) == pytest.approx(float(expected), rel=digits, abs=0)


def test_nothing_is_visible_at_time_1():
    e = torch.tensor([0.5, 2.0], requires_grad=True)
    log_visible = log_visible_probability(e, torch.tensor(0.0))
    assert log_visible.tolist() == [-torch.inf] * 2
    (gradient,) = torch.autograd.grad(log_visible.where(torch.tensor([False, False]), 0).sum(), e)
    assert gradient.tolist() == [0, 0]


def exact_bound(schedule, tables, panels):
    """The integral over t of what a model pays that has the velocities of `schedule` itself, [texts]."""
    times, weights = gauss_legendre(panels)
    total = 0.0
    for t, weight in zip(times, weights, strict=True):
        alpha, velocity = (f(TEXTS, t.expand(len(TEXTS)))[:, None] for f in (schedule.alpha, schedule.velocity))
        chance = torch.where(MASKED, 1 - alpha, alpha).prod(-1)
        terms = bound_terms(tables.log_probs, velocity, velocity, MASKED)
        assert bool((terms.velocity == 0).all())
        total = total + weight * (chance * terms.token).sum(-1)
    return total


@pytest.mark.parametrize("base", [LogLinear(0.0), Cosine(0.0)], ids=str)
def test_one_schedule_for_all_is_the_mean_over_all_orders(base):
    tables = Tables()
    expected = any_order_nll(tables.log_probs, range(LENGTH), visible=[])
    torch.testing.assert_close(exact_bound(Shared(base), tables, [0.0, 1.0]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", [LogLinear(0.0), Cosine(0.0)], ids=str)
@pytest.mark.parametrize("blocks", [[[0], [1], [2]], [[0, 1], [2]], [[0, 1, 2]]], ids=str)
def test_blocks_are_any_order_models_given_the_text_before(blocks, base):
    tables = Tables()
    expected = sum(any_order_nll(tables.log_probs, block, visible=range(block[0])) for block in blocks)
    ends = [number / len(blocks) for number in range(len(blocks) + 1)]
    bound = exact_bound(Blocks(len(blocks[0]), base), tables, ends)
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-10)


def test_powers_of_positions_are_a_mixture_of_orders():
    """Each order as likely as its times fall so: (arXiv 2511.19152, eq. 5 to 7), here by the race's definition."""
    tables, weights = Tables(), torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)
    expected = 0.0
    for order in itertools.permutations(range(LENGTH)):
        left, chance = set(order), 1.0
        for n in order:
            chance *= weights[n] / weights[list(left)].sum()
            left.remove(n)
        for rank, n in enumerate(order):
            expected = expected - chance * tables.log_probs[:, number_of_set(order[rank:]), n]
    # Squeezed towards 0, where a power of 0.5 is steep.
    panels = [0.0, *torch.logspace(-16, 0, 65, dtype=torch.float64).tolist()]
    bound = exact_bound(Powers.of_positions(weights), tables, panels)
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-7)


def test_powers_far_apart_are_left_to_right():
    tables = Tables()
    weights = torch.tensor([1e4, 1.0, 1e-4], dtype=torch.float64).expand(TEXTS.shape)
    terms = bound_terms(tables.log_probs, weights[:, None], weights[:, None], MASKED)
    bound = (state_weights(weights) * terms.token).sum(-1)
    expected = any_order_nll(tables.log_probs, [0], []) + any_order_nll(tables.log_probs, [1], [0])
    expected = expected + any_order_nll(tables.log_probs, [2], [0, 1])
    torch.testing.assert_close(bound, expected, rtol=0, atol=2e-3)


def test_genmd4_has_the_integrand_of_its_authors():
    tables, weights = Tables(), TOKEN_WEIGHTS[[0, 2]]
    exponents, log_law = genmd4_reverse(tables.log_law, weights)
    torch.testing.assert_close(log_law.exp().sum(-1), torch.ones_like(exponents))
    e = weights[TEXTS][:, None]
    log_probs = log_law.gather(-1, TEXTS[:, None, :, None].expand(*MASKED.shape, 1))[..., 0]
    ours = sum(bound_terms(log_probs, e, exponents, MASKED))
    each = -e * tables.log_probs - e + (tables.log_law.exp() * weights).sum(-1)
    torch.testing.assert_close(ours, (each * SETS).sum(-1))
