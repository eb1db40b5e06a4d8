"""The learned order of LoMDM against its Markov chain, by enumeration of a toy."""

import pytest
import torch
from canvas_chain import (
    CANVAS_CASES,
    CANVASES,
    DRAWS,
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
from tiny_mdlm import text, tiny_lomdm


@pytest.fixture(scope="module")
def model():
    return toy(tiny_lomdm, c1=1.0, c2=0.95)


@torch.no_grad()
def exponents(model):
    return model(CANVASES).exponents.double()


@CANVAS_CASES
def test_position_by_position(model, canvas):
    chain = [one_of(exponents(model))(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain) > 1e-3


@pytest.mark.parametrize("learned_order", [True, False])
def test_the_next_position_is_drawn_in_proportion_to_its_exponent(model, learned_order):
    canvas = torch.tensor([MASK, 2, 0, MASK])
    output = model.generate(
        canvas[None],
        num_return_sequences=DRAWS,
        max_length=LENGTH,
        learned_order=learned_order,
        return_dict_in_generate=True,
    )
    first = torch.bincount((output.steps == 0).nonzero()[:, 1], minlength=LENGTH).double()
    rates = exponents(model)[CANVASES.tolist().index(canvas.tolist())] * (canvas == MASK)
    masked, even = rates > 0, torch.full((2,), DRAWS / 2, dtype=torch.float64)
    learned = rates[masked] / rates.sum() * DRAWS
    expected, other = (learned, even) if learned_order else (even, learned)
    assert stats.chisquare(first[masked], expected).pvalue > 1e-3
    assert stats.chisquare(first[masked], other).pvalue < 1e-6


@CANVAS_CASES
@pytest.mark.parametrize("num_steps", [1, 3, 64])
def test_ancestral(model, canvas, num_steps):
    predicted, rates = predictions(model), exponents(model)
    chain = [transition(predicted, 1 - (after / before) ** rates) for before, after in grid(num_steps)]
    assert p_value(model, canvas, chain, strategy="ancestral", max_denoising_steps=num_steps) > 1e-3


def test_ancestral_without_the_learned_order():
    model = toy(tiny_lomdm, c1=0.5, c2=0.4)
    predicted = predictions(model)
    # As with `c2` = 0: every exponent is `c1`.
    chain = [transition(predicted, everywhere(1 - (after / before) ** 0.5)) for before, after in grid(3)]
    arguments = {"strategy": "ancestral", "max_denoising_steps": 3, "learned_order": False}
    assert p_value(model, INFILL, chain, **arguments) > 1e-3


@CANVAS_CASES
def test_in_blocks(model, canvas):
    in_first_block = MASKED & torch.tensor([True, True, canvas != NOTHING, False])
    eligible = torch.where(in_first_block.any(-1, keepdim=True), in_first_block, MASKED)
    chain = [one_of(exponents(model) * eligible)(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain, strategy="semi_autoregressive", block_length=2) > 1e-3


@CANVAS_CASES
def test_highest_velocity_first(model, canvas):
    rates = exponents(model).masked_fill(~MASKED, -torch.inf)
    chain = [one_of(torch.nn.functional.one_hot(rates.argmax(-1), LENGTH).double())(predictions(model))] * LENGTH
    assert p_value(model, canvas, chain, strategy="velocity") > 1e-3


@pytest.mark.parametrize("num_steps", [4, 1000])
def test_ancestral_takes_no_pass_in_which_nothing_is_revealed(num_steps):
    model = tiny_lomdm()
    output = model.generate(text(5, 3), max_new_tokens=12, max_denoising_steps=num_steps, return_dict_in_generate=True)
    assert output.nfe <= min(num_steps, 12)
    for row in output.steps[:, 3:].tolist():
        assert set(row) == set(range(max(row) + 1))


@pytest.mark.parametrize("strategy", [{}, {"max_denoising_steps": 3}, {"strategy": "velocity"}], ids=str)
def test_exponents_that_are_none_end_with_an_error(strategy):
    model = tiny_lomdm()
    torch.nn.init.constant_(model.reverse_scheduler.out_proj.bias, float("nan"))
    with pytest.raises(ValueError, match="`exponents` hold NaN"):
        model.generate(max_new_tokens=4, **strategy)


def test_the_samplers_of_the_reference_are_those_without_an_order():
    model = tiny_lomdm()
    arguments = {"strategy": "ancestral", "max_denoising_steps": 4, "reference_sampler": "ddpm", "max_new_tokens": 5}
    with pytest.raises(ValueError, match="`reference_sampler`='ddpm' has no effect .* set `learned_order=False`"):
        model.generate(**arguments)
    assert model.generate(**arguments, learned_order=False).shape == (1, 5)


def test_settings_that_a_learned_order_does_not_read_are_refused():
    model = tiny_lomdm()
    blocks = {"strategy": "semi_autoregressive", "block_length": 2}
    for arguments, message in (
        ({"strategy": "confidence", "learned_order": True}, "`learned_order`=True has no effect with"),
        ({"strategy": "velocity", "learned_order": False}, "which `learned_order=False` ignores"),
        ({**blocks, "approximate_cache": True}, "needs all positions in every pass to say in which order"),
        (
            {"strategy": "ancestral", "max_denoising_steps": 2, "remasking": "cap", "remasking_strength": 0.5},
            "`remasking`='cap' has no effect with .*`learned_order=False`, with which the strategy reads it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(max_new_tokens=4, **arguments)
    output = model.generate(
        max_new_tokens=4, **blocks, approximate_cache=True, learned_order=False, return_dict_in_generate=True
    )
    assert output.cache_logit_error is not None
