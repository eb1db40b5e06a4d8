"""Masks, times and weights against closed forms and enumeration."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion.diffusion.masking import (
    TimeSampling,
    draw_noised_text,
    draw_times,
    importance_times,
    low_discrepancy,
    mask_tokens,
    subs_log_probs,
)
from hf_diffusion.diffusion.schedules import Cosine, CosineSquared, Linear, LogLinear, Polynomial


MASK = 9
EXACT = [LogLinear(0.0), Cosine(0.0), CosineSquared(0.0), Polynomial(3.0, 0.0)]


def test_low_discrepancy_puts_one_draw_in_each_part():
    draws = low_discrepancy(torch.rand(1000, dtype=torch.float64))
    assert torch.equal((draws * 1000).floor().long().sort().values, torch.arange(1000))


def test_low_discrepancy_times_of_the_reference(shared):
    golden = load_file(shared / "golden/mdlm/subs/golden.safetensors")
    t, weight = draw_times(golden["sample_t.8.uniform"], LogLinear(), TimeSampling())
    torch.testing.assert_close(t, golden["sample_t.8"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weight, 1 / golden["sample_t.8"])


def test_importance_times_of_the_reference(shared):
    golden = load_file(shared / "golden/mdlm/subs/golden.safetensors")
    ends = [-math.expm1(-1e-3), -math.expm1(-6.907755278982137)]
    t = importance_times(golden["noise.t"], LogLinear(), *ends)
    torch.testing.assert_close(t, golden["noise.loglinear.importance_t"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", [*EXACT, LogLinear(), Linear(0.01, 5.0)], ids=str)
@pytest.mark.parametrize("law", ["uniform", "importance"])
def test_weights_make_up_for_the_law_of_the_times(schedule, law):
    """The mean of weight * h(t) is the integral of velocity(t) h(t), here of h = mask probability: what is masked after
    `least_time`."""
    least_time = 1e-3
    uniforms = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, weight = draw_times(uniforms, schedule, TimeSampling(law, least_time, low_discrepancy=False))
    estimate = (weight * schedule.mask_probability(t)).mean()
    ends = schedule.mask_probability(torch.tensor([least_time, 1.0], dtype=torch.float64))
    # The uniform law takes the mean over its range for the mean over 0 to 1.
    scale = 1 - least_time if law == "uniform" else 1
    torch.testing.assert_close(scale * estimate, ends[1] - ends[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("schedule", EXACT, ids=str)
def test_discrete_time_is_finite_and_counts_every_token_once(schedule, steps):
    """A token is revealed in exactly one of the steps, so with a uniform model the bound is log V for any T."""
    uniforms = torch.arange(steps, dtype=torch.float64) / steps + 1e-9
    t, weight = draw_times(uniforms, schedule, TimeSampling(num_timesteps=steps, low_discrepancy=False))
    torch.testing.assert_close(t, torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    assert bool(weight.isfinite().all())
    assert float((weight * schedule.mask_probability(t)).mean()) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_discrete_bound_of_a_uniform_model_by_enumeration(steps):
    length, vocab_size, schedule = 3, 8, Cosine(0.0)
    uniforms = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    times, weights = draw_times(uniforms, schedule, TimeSampling(num_timesteps=steps, low_discrepancy=False))
    bound = 0.0
    for t, weight in zip(times, weights, strict=True):
        masked_with = float(schedule.mask_probability(t))
        for masked in itertools.product([False, True], repeat=length):
            probability = math.prod(masked_with if is_masked else 1 - masked_with for is_masked in masked)
            bound += float(weight) / steps * probability * sum(masked) * math.log(vocab_size)
    assert bound / length == pytest.approx(math.log(vocab_size))


def test_tokens_are_masked_independently_with_their_probability():
    ids = torch.randint(9, (2, 100_000))
    noised = mask_tokens(ids, torch.tensor([[0.2], [0.9]]), torch.rand(2, 100_000), MASK)
    masked = noised == MASK
    assert torch.equal(noised[~masked], ids[~masked])
    torch.testing.assert_close(masked.float().mean(dim=1), torch.tensor([0.2, 0.9]), rtol=0, atol=0.006)
    pairs = (masked[:, 1:] & masked[:, :-1]).float().mean(dim=1)
    torch.testing.assert_close(pairs, torch.tensor([0.04, 0.81]), rtol=0, atol=0.006)


def test_drawn_text_keeps_what_may_not_be_masked_and_says_its_noise_level():
    ids, maskable = torch.randint(9, (64, 12)), torch.rand(64, 12) < 0.5
    sampling = TimeSampling()
    noised = draw_noised_text(ids, maskable, LogLinear(), sampling, MASK, torch.Generator().manual_seed(5))
    assert torch.equal(noised.input_ids[~maskable], ids[~maskable])
    assert bool((noised.input_ids[maskable] == MASK).any())
    # 1 - exp(-sigma) = (1 - epsilon) t, and the weight is 1 / t.
    torch.testing.assert_close((1 - torch.exp(-noised.sigma)) * noised.weight, torch.full((64, 1), 0.999))
    again = draw_noised_text(ids, maskable, LogLinear(), sampling, MASK, torch.Generator().manual_seed(5))
    assert torch.equal(noised.input_ids, again.input_ids)


def test_every_block_sees_all_times_and_all_blocks_of_a_batch_spread_evenly():
    ids, block = torch.zeros(2, 12, dtype=torch.long), torch.arange(12)[None] // 3
    maskable, generator = torch.ones(2, 12, dtype=torch.bool), torch.Generator().manual_seed(6)

    def draw():
        noised = draw_noised_text(ids, maskable, LogLinear(0.0), TimeSampling(), MASK, generator, block)
        t = 1 - torch.exp(-noised.sigma)
        torch.testing.assert_close(noised.weight * t, torch.ones(2, 12), rtol=1e-4, atol=0)
        t = t.view(2, 4, 3)
        assert torch.equal(t, t[..., :1].expand_as(t))
        return t[..., 0]

    times = torch.stack([draw() for _ in range(1000)])
    parts = ((times - 1e-3) / 0.999 * 8).floor().flatten(1).sort(dim=1).values
    assert torch.equal(parts, torch.arange(8.0).expand(1000, 8))
    # Uniform: mean 1/2, standard deviation 0.289.
    assert float((times.mean(0) - 0.5).abs().max()) < 4 * 0.289 / 1000**0.5
    torch.testing.assert_close(times.std(0), torch.full((2, 4), 0.289), rtol=0.05, atol=0)


def test_subs_excludes_the_mask_and_carries_visible_tokens_over():
    ids = torch.tensor([[2, MASK, 0, MASK]])
    logits = torch.randn(1, 4, 10, dtype=torch.float64)
    probabilities = subs_log_probs(logits, ids, MASK).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 4).double())
    assert bool((probabilities[..., MASK] == 0).all())
    assert probabilities[0, 0, 2] == probabilities[0, 2, 0] == 1
    torch.testing.assert_close(probabilities[0, 1, :9], logits[0, 1, :9].softmax(-1))
    assert subs_log_probs(logits.bfloat16(), ids, MASK).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": "gamma"}, "`law` must be"),
        ({"least_time": 1.0}, "`least_time` must be at least 0 and less than 1"),
        ({"law": "importance", "least_time": 0.0}, "needs a positive `least_time`"),
        ({"num_timesteps": 0}, "`num_timesteps` must be at least 1"),
        ({"num_timesteps": 5, "law": "importance"}, "`num_timesteps` .5. draws its times uniformly"),
    ],
)
def test_wrong_laws_of_times_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TimeSampling(**settings)
