"""Masked diffusion draws from the law that it states: every strategy against its Markov chain."""

import itertools

import pytest
import torch
from canvas_chain import (
    CANVAS_CASES,
    CANVASES,
    INFILL,
    LENGTH,
    MASK,
    MASKED,
    NOTHING,
    everywhere,
    grid,
    one_of,
    p_value,
    predictions,
    toy,
    transition,
)
from scipy import stats

from hf_diffusion import MDLMConfig, MDLMForMaskedDiffusion


@pytest.fixture(scope="module")
def model():
    return toy()


@CANVAS_CASES
@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_ancestral(model, canvas, num_steps):
    predicted = predictions(model)
    chain = [transition(predicted, everywhere((before - after) / before)) for before, after in grid(num_steps)]
    assert p_value(model, canvas, chain, strategy="ancestral", max_denoising_steps=num_steps) > 1e-3


def test_ancestral_with_another_schedule():
    model = toy(noise_schedule={"type": "polynomial", "power": 8.0})
    predicted = predictions(model)
    chain = [transition(predicted, everywhere((b - a) / b)) for b, a in grid(2, lambda t: t**8)]
    assert p_value(model, NOTHING, chain, strategy="ancestral", max_denoising_steps=2) > 1e-3
    straight = [transition(predicted, everywhere((b - a) / b)) for b, a in grid(2)]
    assert p_value(model, NOTHING, straight, strategy="ancestral", max_denoising_steps=2) < 1e-6


def test_ancestral_with_a_network_that_reads_the_noise_level():
    model = toy(time_conditioning=True)
    chain = [
        transition(predictions(model, t=before), everywhere((before - after) / before)) for before, after in grid(4)
    ]
    assert p_value(model, NOTHING, chain, strategy="ancestral", max_denoising_steps=4) > 1e-3
    one_time = [transition(predictions(model, t=1.0), everywhere((b - a) / b)) for b, a in grid(4)]
    assert p_value(model, NOTHING, one_time, strategy="ancestral", max_denoising_steps=4) < 1e-6


@CANVAS_CASES
def test_first_hitting(model, canvas):
    chain = [one_of(MASKED)(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain, strategy="first_hitting") > 1e-3


@CANVAS_CASES
def test_semi_autoregressive(model, canvas):
    # Blocks are laid over the positions to fill, whatever is given between them.
    in_first_block = MASKED & torch.tensor([True, True, canvas == INFILL, False])
    eligible = torch.where(in_first_block.any(-1, keepdim=True), in_first_block, MASKED)
    chain = [one_of(eligible)(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain, strategy="semi_autoregressive", block_length=2) > 1e-3


@CANVAS_CASES
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_block_causal(canvas, block_size):
    model = toy(block_size=block_size)
    # Blocks of the model are laid over the whole text. What it predicts depends on no later one.
    block = torch.arange(LENGTH) // block_size
    first = block.where(MASKED, LENGTH).amin(-1, keepdim=True)
    chain = [one_of(MASKED & (block == first))(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain, strategy="semi_autoregressive") > 1e-3


def test_without_a_cache_a_block_causal_model_follows_the_same_law():
    model = toy(block_size=2)
    block = torch.arange(LENGTH) // 2
    first = block.where(MASKED, LENGTH).amin(-1, keepdim=True)
    chain = [one_of(MASKED & (block == first))(predictions(model))] * LENGTH
    assert p_value(model, NOTHING, chain, strategy="semi_autoregressive", use_cache=False) > 1e-3
    whole = [one_of(MASKED)(predictions(model))] * LENGTH
    assert p_value(model, NOTHING, whole, strategy="semi_autoregressive", use_cache=False) < 1e-6


@pytest.mark.parametrize("remasking", ["cap", "rescale"])
@CANVAS_CASES
def test_remasking(model, remasking, canvas):
    predicted, drawn_again, chain = predictions(model), torch.tensor(canvas) == MASK, []
    for before, after in grid(4):
        # In the paper's terms: alpha = 1 - the share of masked positions.
        alpha_t, alpha_s = 1 - before, 1 - after
        sigma_max = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0
        sigma = min(0.4, sigma_max) if remasking == "cap" else 0.4 * sigma_max
        reveal = everywhere((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        chain.append(transition(predicted, reveal, everywhere(sigma) * drawn_again))
    arguments = {"strategy": "ancestral", "max_denoising_steps": 4, "remasking": remasking, "remasking_strength": 0.4}
    assert p_value(model, canvas, chain, **arguments) > 1e-3


def test_remasking_is_told_from_plain_sampling(model):
    predicted = predictions(model)
    plain = [transition(predicted, everywhere((before - after) / before)) for before, after in grid(4)]
    arguments = {"strategy": "ancestral", "max_denoising_steps": 4, "remasking": "rescale", "remasking_strength": 1.0}
    assert p_value(model, NOTHING, plain, **arguments) < 1e-6


@pytest.mark.parametrize(
    "strategy",
    [{"strategy": "ancestral"}, {"strategy": "semi_autoregressive", "block_length": 4, "block_strategy": "ancestral"}],
    ids=["canvas", "blocks"],
)
def test_an_end_token_that_could_be_taken_back_ends_nothing(model, strategy):
    arguments = {"max_denoising_steps": 6, "remasking": "rescale", "remasking_strength": 1.0, **strategy}
    whole, ended = (
        model.generate(
            generator=torch.Generator().manual_seed(3), max_new_tokens=8, num_return_sequences=400, **arguments, **end
        )
        for end in ({}, {"eos_token_id": 0, "pad_token_id": 1})
    )
    after_end = (whole == 0).cumsum(1) - (whole == 0).long() > 0
    assert torch.equal(ended, whole.masked_fill(after_end, 1))


# From a canvas in which no two positions are equally sure, as they are in one of masks alone.
START = CANVASES.tolist().index(INFILL)


def highest(scores):
    return torch.nn.functional.one_hot(scores.masked_fill(~MASKED, -torch.inf).argmax(-1), LENGTH).bool() & MASKED


def by_confidence(predicted):
    return predicted.amax(-1)


def by_margin(predicted):
    in_order = predicted.sort(-1, descending=True).values
    return in_order[..., 0] - in_order[..., 1]


def by_entropy(predicted):
    return (predicted * predicted.log()).sum(-1)


@pytest.mark.parametrize(
    ("strategy", "score"), [("confidence", by_confidence), ("margin", by_margin), ("entropy", by_entropy)]
)
def test_surest_position_first(model, strategy, score):
    predicted = predictions(model)
    chain = [transition(predicted, highest(score(predicted)).double())] * LENGTH
    assert p_value(model, INFILL, chain, strategy=strategy) > 1e-3


def test_several_sure_positions_in_each_of_few_steps(model):
    predicted = predictions(model)
    first = highest(by_confidence(predicted))
    second = highest(by_confidence(predicted).masked_fill(first, -1.0)) & ~first
    # Three positions in two steps: two, then one.
    chain = [transition(predicted, (first | second).double()), transition(predicted, MASKED.double())]
    assert p_value(model, INFILL, chain, strategy="confidence", max_denoising_steps=2) > 1e-3


def test_positions_above_a_threshold_are_kept_together(model):
    predicted = predictions(model)
    confidence = by_confidence(predicted)
    threshold = 0.8
    kept = (confidence > threshold) & MASKED | highest(confidence)
    assert {1, 2} <= set(kept.sum(-1).tolist())
    chain = [transition(predicted, kept.double())] * LENGTH
    arguments = {"strategy": "confidence", "confidence_threshold": threshold}
    assert p_value(model, INFILL, chain, **arguments) > 1e-3


def test_positions_within_an_entropy_bound_are_kept_together(model):
    predicted = predictions(model)
    entropy = -by_entropy(predicted)
    bound = 0.7 * float(entropy[START][[0, 2, 3]].sort().values[:2].sum())
    kept = torch.zeros_like(MASKED)
    for row, masked in enumerate(MASKED):
        positions = sorted(masked.nonzero()[:, 0].tolist(), key=lambda position: float(entropy[row, position]))
        for count in range(1, len(positions) + 1):
            of_these = entropy[row, positions[:count]]
            if float(of_these.sum() - of_these.max()) <= bound:
                kept[row, positions[:count]] = True
    assert int(kept[START].sum()) == 2
    chain = [transition(predicted, kept.double())] * LENGTH
    assert p_value(model, INFILL, chain, strategy="entropy", entropy_bound=bound) > 1e-3


def test_a_large_vocabulary_at_a_thousand_steps_is_drawn_exactly():
    """Where a float32 race over all tokens reveals 0.69 of the positions that it should (arXiv 2409.02908)."""
    vocabulary, length, rows, num_steps = 50_257, 128, 12, 1000
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": length}
    model = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=vocabulary + 1, **shape)).eval()
    zipf = 1 / torch.arange(1, vocabulary + 2, dtype=torch.float64)
    model.lm_head.bias.data.copy_(zipf.log())  # all other weights of a fresh head are zero
    output = model.generate(
        num_return_sequences=rows,
        max_new_tokens=length,
        strategy="ancestral",
        max_denoising_steps=num_steps,
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(0),
    )
    # A row needs a pass for every step in which at least one of its positions is revealed.
    passes = length / output.tokens_per_forward.double()
    occupied = num_steps * (1 - (1 - 1 / num_steps) ** length)
    assert abs(float(passes.mean()) - occupied) < 4 * float(passes.std()) / rows**0.5
    law = zipf[:vocabulary] / zipf[:vocabulary].sum()
    edges = torch.tensor([0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, vocabulary])
    counts = torch.histogram(output.sequences.flatten().double(), edges.double() - 0.5).hist
    expected = torch.stack([law[a:b].sum() for a, b in itertools.pairwise(edges.tolist())]) * rows * length
    assert stats.chisquare(counts, expected).pvalue > 1e-3
