"""The comparison's frontier: the baseline is drawn from its own law."""

import pytest
import torch
from comparison.frontier import draw_autoregressively
from comparison.models import AutoregressiveScorer

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM


SIZE = 24


@pytest.fixture
def baseline():
    torch.manual_seed(0)
    config = MDLMARConfig(
        vocab_size=SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=0,
        pad_token_id=0,
        mask_token_id=SIZE - 1,
    )
    model = MDLMARForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


@torch.no_grad()
def test_the_baseline_is_drawn_as_it_is_scored(baseline):
    """At a temperature near 0 every text is what passes over the whole of it, from the start token, find likeliest."""
    greedy = torch.tensor([[baseline.config.eos_token_id]])
    for _ in range(12):
        likeliest = baseline(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        greedy = torch.cat([greedy, likeliest], dim=1)
    seconds = iter(range(100))
    drawn = draw_autoregressively(AutoregressiveScorer(baseline), 5, 12, 2, lambda: next(seconds), 1e-5)
    assert drawn.token_ids == 5 * [greedy[0, 1:].tolist()]
    assert (drawn.nfe, drawn.tokens_per_second) == (12, 5 * 12 / 3)  # three batches of a second each
