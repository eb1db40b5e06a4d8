"""What `generate` draws has the law of the model's conditionals, by enumeration of a toy."""

import itertools

import pytest
import torch
from scipy import stats

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion
from hf_diffusion.diffusion import orders


VOCAB, LENGTH, DRAWS = 3, 5, 100_000
STRATEGIES = {
    "autoregressive": ({"strategy": "autoregressive"}, torch.arange),
    "strided 2": ({"strategy": "strided", "num_streams": 2}, lambda n: orders.strided_steps(n, 2)),
    "strided 3": ({"strategy": "strided", "num_streams": 3}, lambda n: orders.strided_steps(n, 3)),
    "semi-autoregressive": (
        {"strategy": "semi_autoregressive", "block_length": 3, "max_denoising_steps": 2},
        lambda n: orders.semi_autoregressive_steps(n, 3, 2),
    ),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ARMDConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        prefix_encoding_size=4,
        initializer_range=0.7,
        left_neighbour=True,
    )
    return ARMDForMaskedDiffusion(config).double().eval()


@torch.no_grad()
def chi_square_p_value(model, canvas, strategy, steps):
    """Compare DRAWS texts with the probabilities that the conditionals of `forward` multiply to."""
    masked = canvas == model.config.mask_token_id
    num_masked = int(masked.sum())
    fillings = torch.tensor(list(itertools.product(range(VOCAB), repeat=num_masked)))
    texts = canvas.repeat(len(fillings), 1)
    texts[:, masked] = fillings
    block_index = orders.fill_order(masked[None], None, steps).expand(len(texts), -1)
    conditionals = model(texts, block_index=block_index).logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0]
    probabilities = conditionals[:, masked].sum(-1).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)

    drawn = model.generate(canvas[None], num_return_sequences=DRAWS, max_length=LENGTH, **strategy)
    powers = VOCAB ** torch.arange(num_masked).flip(0)
    counts = torch.bincount((drawn[:, masked] * powers).sum(-1), minlength=len(fillings))
    often = probabilities * DRAWS >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None]]) * DRAWS
    kept = expected > 0
    return stats.chisquare(observed[kept], expected[kept]).pvalue


@pytest.mark.parametrize("name", STRATEGIES)
def test_unconditional_text(model, name):
    canvas = torch.full((LENGTH,), model.config.mask_token_id)
    assert chi_square_p_value(model, canvas, *STRATEGIES[name]) > 1e-3


@pytest.mark.parametrize("name", STRATEGIES)
def test_infilling(model, name):
    mask = model.config.mask_token_id
    canvas = torch.tensor([mask, 2, mask, mask, 1])
    assert chi_square_p_value(model, canvas, *STRATEGIES[name]) > 1e-3


def test_a_wrong_law_is_noticed(model):
    canvas = torch.full((LENGTH,), model.config.mask_token_id)
    strategy, _ = STRATEGIES["autoregressive"]
    _, other_steps = STRATEGIES["strided 3"]
    assert chi_square_p_value(model, canvas, strategy, other_steps) < 1e-6
