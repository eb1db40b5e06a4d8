"""The bound by numbers of masks, against the chain rule over all orders and the integral over all times."""

import itertools
import math

import pytest
import torch

from hf_diffusion.diffusion.any_order_bound import mask_random_number


MASK = 9


def every_draw(length):
    """All numbers of masks with all orders of the uniforms, each as likely as the others."""
    numbers = [(number + 0.5) / length for number in range(length)]
    orders = list(itertools.permutations([(rank + 0.5) / length for rank in range(length)]))
    pairs = list(itertools.product(numbers, orders))
    return torch.tensor([number for number, _ in pairs]), torch.tensor([uniforms for _, uniforms in pairs])


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_mean_is_the_chain_rule_over_all_orders(length):
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(length, 2**length, generator=generator).tolist()  # of a position, given which ones are masked
    numbers, uniforms = every_draw(length)
    noised = mask_random_number(torch.arange(length).expand(len(numbers), length), numbers, uniforms, MASK)
    masked = noised.input_ids == MASK
    estimates = []
    for row, weight in zip(masked.tolist(), noised.weight.tolist(), strict=True):
        state = sum(is_masked << position for position, is_masked in enumerate(row))
        estimates.append(weight * sum(nll[position][state] for position in range(length) if row[position]))

    expected = 0.0
    for order in itertools.permutations(range(length)):
        for step, position in enumerate(order):
            expected += nll[position][sum(1 << later for later in order[step:])]
    assert math.fsum(estimates) / len(estimates) == pytest.approx(expected / math.factorial(length), rel=1e-6)


def test_a_model_that_reads_the_noise_level_has_the_integral_over_all_of_the_time():
    """Draws against quadrature of the integral over p, of a loss that depends on masks and on p, most of all near 0."""
    length, draws = 3, 400_000
    generator = torch.Generator().manual_seed(1)
    nll = torch.rand(length, 2**length, generator=generator, dtype=torch.float64)

    def loss(p, state):
        masked = (state[..., None] >> torch.arange(length)) & 1
        return (masked * nll[:, state].movedim(0, -1)).sum(-1) * (2 - p.sqrt())

    expected, p = 0.0, (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for state in range(1, 2**length):
        count = state.bit_count()
        law = p ** (count - 1) * (1 - p) ** (length - count)  # of these masks, times the rate 1 / p
        expected += float((law * loss(p, torch.tensor(state))).mean())

    numbers = torch.rand(draws, generator=generator)
    uniforms = torch.rand(draws, length, generator=generator, dtype=torch.float64)
    noised = mask_random_number(torch.zeros(draws, length, dtype=torch.long), numbers, uniforms, MASK)
    state = ((noised.input_ids == MASK).long() << torch.arange(length)).sum(-1)
    estimates = noised.weight * loss(-torch.expm1(-noised.sigma), state)
    standard_error = float(estimates.std()) / math.sqrt(draws)
    assert standard_error < 2e-3 * expected
    assert abs(float(estimates.mean()) - expected) < 4 * standard_error


def test_every_draw_of_a_uniform_model_is_exact():
    uniforms = torch.rand(1000, 37)
    noised = mask_random_number(torch.zeros(1000, 37, dtype=torch.long), torch.rand(1000), uniforms, MASK)
    number = (noised.input_ids == MASK).sum(dim=1)
    assert set(number.tolist()) == set(range(1, 38))
    torch.testing.assert_close(noised.weight * number, torch.full((1000,), 37.0))


def test_ends_of_the_uniforms():
    ids = torch.arange(4).expand(2, 4)
    noised = mask_random_number(ids, torch.tensor([0.0, 1 - 2**-24]), torch.zeros(2, 4), MASK)
    assert (noised.input_ids == MASK).sum(dim=1).tolist() == [1, 4]
    assert torch.equal(noised.input_ids[noised.input_ids != MASK], ids[noised.input_ids != MASK])
    assert noised.weight.tolist() == [4.0, 1.0]
    assert noised.sigma.tolist() == [0.0, 0.0]
