"""The law of a text that is drawn in steps, by enumeration: a Markov chain over all canvases of a few positions.

A canvas holds tokens and masks. In each step every position is revealed or masked again with a probability of its own,
given the canvas.
"""

import itertools

import pytest
import torch
from scipy import stats
from tiny_mdlm import tiny


VOCAB, LENGTH, DRAWS, MASK = 3, 4, 100_000, 3
NOTHING, INFILL = [MASK] * 4, [MASK, 2, MASK, MASK]
CANVASES = torch.tensor(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)))
MASKED = CANVASES == MASK


def toy(make=tiny, **settings):
    """A tiny model whose texts can be enumerated."""
    shape = {"vocab_size": VOCAB + 1, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return make(torch.float32, **shape, num_attention_heads=1, **settings)


@torch.no_grad()
def predictions(model, **inputs):
    """Probabilities [canvases, positions, tokens] of what each mask hides."""
    return model(CANVASES, **inputs).logits[..., :VOCAB].double().softmax(-1)


def transition(predicted, reveal, remask=None):
    """Probability [canvases, canvases] to go from one canvas to another in one step.

    Args:
        predicted: [canvases, positions, tokens].
        reveal, remask: [canvases, positions], probability that a masked position is revealed, a visible one masked.
    """
    remask = torch.zeros_like(reveal) if remask is None else remask
    visible = torch.nn.functional.one_hot(CANVASES, VOCAB + 1).double()
    stays = (1 - remask)[..., None] * visible + remask[..., None] * torch.eye(VOCAB + 1)[MASK].double()
    draws = torch.cat([reveal[..., None] * predicted, 1 - reveal[..., None]], dim=-1)
    position = torch.where(MASKED[..., None], draws, stays)
    chosen = position[:, None].expand(-1, len(CANVASES), -1, -1)
    return chosen.gather(-1, CANVASES[None, ..., None].expand(len(CANVASES), -1, -1, 1))[..., 0].prod(-1)


def p_value(model, canvas, chain, **arguments):
    """Compare DRAWS texts from `canvas` with where the transitions of `chain` lead to."""
    canvas = torch.tensor(canvas)
    law = (canvas == CANVASES).all(-1).double()
    for step in chain:
        law = law @ step
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert float(law[MASKED.any(-1)].sum()) == pytest.approx(0, abs=1e-12)
    drawn = model.generate(canvas[None], num_return_sequences=DRAWS, max_length=LENGTH, **arguments)
    powers = (VOCAB + 1) ** torch.arange(LENGTH).flip(0)
    counts = torch.bincount((drawn * powers).sum(-1), minlength=len(CANVASES)).double()
    expected = law * DRAWS
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


def grid(num_steps, share=lambda t: t):
    """Shares of masked positions before and after each of the steps."""
    levels = [share(1 - step / num_steps) / share(1) for step in range(num_steps)] + [0.0]
    return itertools.pairwise(levels)


def everywhere(probability):
    return torch.full((len(CANVASES), LENGTH), probability, dtype=torch.float64)


def one_of(weight):
    """Transitions that each reveal one masked position, in proportion to its `weight` [canvases, positions]."""
    weight = weight.double() * MASKED

    def mixture(predicted):
        total_weight = weight.sum(-1, keepdim=True)
        total = torch.eye(len(CANVASES), dtype=torch.float64) * (total_weight == 0)
        for position in range(LENGTH):
            only = torch.zeros(len(CANVASES), LENGTH, dtype=torch.float64)
            only[:, position] = 1
            share = weight[:, position, None] / total_weight.clamp(min=1e-300)
            total += share * transition(predicted, only)
        return total

    return mixture


CANVAS_CASES = pytest.mark.parametrize("canvas", [NOTHING, INFILL], ids=["nothing", "infill"])
