"""The bound by numbers of masks, against the chain rule over all orders and the integral over all times."""

import itertools
import math

import pytest
import torch

from hf_diffusion.diffusion.any_order_bound import mask_random_number


MASK = 9


def block_ranges(length, block_size):
    block_size = block_size or length
    return [range(start, min(start + block_size, length)) for start in range(0, length, block_size)]


def every_draw(length, block_size):
    """All numbers of masks with all orders of the uniforms, each as likely as the others."""
    of_blocks = [
        [(number + 0.5) / len(block) for number in range(len(block))] for block in block_ranges(length, block_size)
    ]
    orders = itertools.permutations([(rank + 0.5) / length for rank in range(length)])
    pairs = list(itertools.product(itertools.product(*of_blocks), orders))
    return torch.tensor([numbers for numbers, _ in pairs]), torch.tensor([uniforms for _, uniforms in pairs])


@pytest.mark.parametrize(
    ("length", "block_size"),
    [(1, None), (2, None), (3, None), (4, None), (4, 1), (4, 2), (5, 2), (5, 3), (4, 4), (3, 7)],
)
def test_mean_is_the_chain_rule_over_all_orders_of_each_block(length, block_size):
    generator = torch.Generator().manual_seed(0)
    # Of a position, given which ones of its block are masked; the text before the block is never masked for it.
    nll = torch.rand(length, 2**length, generator=generator).tolist()
    numbers, uniforms = every_draw(length, block_size)
    ids, blocks = torch.arange(length).expand(len(numbers), length), block_ranges(length, block_size)
    noised = mask_random_number(ids, numbers, uniforms, MASK, block_size)
    estimates = []
    for row, weight in zip((noised.input_ids == MASK).tolist(), noised.weight.expand(ids.shape).tolist(), strict=True):
        states = [sum(row[position] << position for position in block) for block in blocks]
        estimates += [
            weight[position] * nll[position][state]
            for block, state in zip(blocks, states, strict=True)
            for position in block
            if row[position]
        ]

    expected = 0.0
    for block in blocks:
        for order in itertools.permutations(block):
            for step, position in enumerate(order):
                state = sum(1 << later for later in order[step:])
                expected += nll[position][state] / math.factorial(len(block))
    assert math.fsum(estimates) / len(numbers) == pytest.approx(expected, rel=1e-6)


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

    numbers = torch.rand(draws, 1, generator=generator)
    uniforms = torch.rand(draws, length, generator=generator, dtype=torch.float64)
    noised = mask_random_number(torch.zeros(draws, length, dtype=torch.long), numbers, uniforms, MASK)
    state = ((noised.input_ids == MASK).long() << torch.arange(length)).sum(-1)
    estimates = noised.weight[:, 0] * loss(-torch.expm1(-noised.sigma[:, 0]), state)
    standard_error = float(estimates.std()) / math.sqrt(draws)
    assert standard_error < 2e-3 * expected
    assert abs(float(estimates.mean()) - expected) < 4 * standard_error


@pytest.mark.parametrize("block_size", [None, 1, 5])
def test_every_draw_of_a_uniform_model_is_exact(block_size):
    ids, blocks = torch.zeros(1000, 37, dtype=torch.long), block_ranges(37, block_size)
    noised = mask_random_number(ids, torch.rand(1000, len(blocks)), torch.rand(1000, 37), MASK, block_size)
    masked = noised.input_ids == MASK
    for block in blocks:
        assert set(masked[:, list(block)].sum(dim=1).tolist()) == set(range(1, len(block) + 1))
    torch.testing.assert_close((noised.weight * masked).sum(dim=1), torch.full((1000,), 37.0))


def test_blocks_of_one_token_leave_nothing_to_chance():
    noised = mask_random_number(torch.arange(6).view(2, 3), torch.rand(2, 3), torch.rand(2, 3), MASK, block_size=1)
    assert bool((noised.input_ids == MASK).all())
    assert bool((noised.weight == 1).all())


@pytest.mark.parametrize("block_size", [None, 5])
def test_what_is_below_the_noise_level_of_its_block_is_masked(block_size):
    uniforms = torch.rand(100, 13, dtype=torch.float64)
    numbers = torch.rand(100, len(block_ranges(13, block_size)))
    noised = mask_random_number(torch.zeros(100, 13, dtype=torch.long), numbers, uniforms, MASK, block_size)
    # The greatest that is masked is the level itself, to rounding.
    assert torch.equal(noised.input_ids == MASK, uniforms < -torch.expm1(-noised.sigma) + 1e-12)


@pytest.mark.parametrize(
    ("block_size", "fewest", "least_weights", "most_weights"),
    [(None, [1], [5.0], [1.0]), (3, [1, 1], [3.0, 3.0, 3.0, 2.0, 2.0], [1.0] * 5)],
)
def test_ends_of_the_uniforms(block_size, fewest, least_weights, most_weights):
    ids, blocks = torch.arange(5).expand(2, 5), block_ranges(5, block_size)
    numbers = torch.tensor([[0.0], [1 - 2**-24]]).expand(2, len(blocks))
    noised = mask_random_number(ids, numbers, torch.zeros(2, 5), MASK, block_size)
    masked = noised.input_ids == MASK
    assert [int(masked[0, list(block)].sum()) for block in blocks] == fewest
    assert bool(masked[1].all())
    assert torch.equal(noised.input_ids[~masked], ids[~masked])
    assert noised.weight.tolist() == [least_weights, most_weights]
    assert bool((noised.sigma == 0).all())
    assert noised.sigma.shape == noised.weight.shape


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3, 3), (2, 5)])
def test_numbers_that_are_not_those_of_the_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="`number_uniforms` must have shape .2, 3., one for each block"):
        mask_random_number(torch.zeros(2, 5, dtype=torch.long), torch.rand(shape), torch.rand(2, 5), MASK, block_size=2)
