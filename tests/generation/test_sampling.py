"""Categorical sampling against the distribution itself."""

import math

import torch
from scipy import stats

from hf_diffusion.generation.sampling import sample_categorical


def uniforms(count):
    return torch.rand(count, dtype=torch.float64)


def test_draws_follow_the_softmax():
    logits = torch.randn(7) * 2
    draws = sample_categorical(logits.expand(100_000, 7), uniforms(100_000))
    expected = logits.double().softmax(-1) * 100_000
    assert stats.chisquare(torch.bincount(draws, minlength=7), expected / expected.sum() * 100_000).pvalue > 1e-3


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    # 50,000 tokens of probability 2e-10 each: a float32 race never draws one (arXiv 2409.02908).
    logits = torch.full((50_257,), math.log(2e-10))
    logits[:257] = math.log((1 - 50_000 * 2e-10) / 257)
    spread = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    draws = sample_categorical(logits.expand(500, -1), spread[-500:])
    # The last 1e-5 of the probability belongs to the rare tokens: one of the last 1e5ths.
    assert int((draws >= 257).sum()) == 1


def test_excluded_tokens_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    edges = torch.tensor([0.0, 0.5 - 1e-12, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_categorical(logits.expand(4, 5), edges).tolist() == [1, 1, 3, 3]
