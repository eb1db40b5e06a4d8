"""What is reported of every token is what a plain pass says of it."""

import pytest
import torch
from families import FAMILIES


PROMPTS = torch.tensor([[9, 1, 2], [4, 5, 1]])
REAL = torch.tensor([[0, 1, 1], [1, 1, 1]])
BLOCKS = {"strategy": "semi_autoregressive", "block_length": 3}


@torch.no_grad()
@pytest.mark.parametrize("name", ["mdlm", "lomdm"])
@pytest.mark.parametrize("strategy", ["autoregressive", "first_hitting", "ancestral"])
def test_logits_and_hidden_states_are_those_of_the_pass_that_drew_a_token(name, strategy):
    model = FAMILIES[name].model(torch.float64)
    steps = {"max_denoising_steps": 4} if strategy == "ancestral" else {}
    output = model.generate(
        PROMPTS,
        attention_mask=REAL,
        max_new_tokens=6,
        strategy=strategy,
        **steps,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    mask = torch.nn.functional.pad(REAL, (0, 6), value=1)
    for step in range(output.nfe):
        canvas = output.sequences.masked_fill(output.steps >= step, model.config.mask_token_id)
        plain = model(canvas, attention_mask=mask, output_hidden_states=True)
        for row, column in (output.steps == step).nonzero().tolist():
            torch.testing.assert_close(output.logits[column - 3][row], plain.logits[row, column])
            states = [layer[row, 0] for layer in output.hidden_states[column - 3]]
            torch.testing.assert_close(states, [layer[row, column] for layer in plain.hidden_states])
            probability = plain.logits[row, column].softmax(-1)[output.sequences[row, column]]
            torch.testing.assert_close(output.confidence[row, column].double(), probability, rtol=1e-6, atol=0)


@torch.no_grad()
def test_hidden_states_with_the_approximate_cache_are_those_that_the_logits_were_made_of():
    """In a single layer there is nothing to approximate."""
    model = FAMILIES["mdlm"].model(torch.float64, num_hidden_layers=1)
    arguments = {"attention_mask": REAL, "max_new_tokens": 7, "seed": 3, "return_dict_in_generate": True, **BLOCKS}
    exact = model.generate(PROMPTS, output_hidden_states=True, **arguments)
    cached = model.generate(PROMPTS, output_hidden_states=True, approximate_cache=True, **arguments)
    assert torch.equal(exact.sequences, cached.sequences)
    torch.testing.assert_close(cached.hidden_states, exact.hidden_states)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_scores_are_float32(name):
    model = FAMILIES[name].model(torch.bfloat16, num_hidden_layers=2)
    output = model.generate(
        PROMPTS,
        attention_mask=REAL,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
    )
    assert {part.dtype for part in (*output.scores, *output.logits, output.confidence)} == {torch.float32}


def test_transition_scores_are_log_probabilities_of_the_tokens():
    model = FAMILIES["mdlm"].model(torch.float64, num_hidden_layers=2)
    mask = model.config.mask_token_id
    prompts = torch.tensor([[1, mask, 2, mask], [1, 2, 3, mask]])
    output = model.generate(
        prompts, max_new_tokens=3, strategy="first_hitting", return_dict_in_generate=True, output_scores=True
    )
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(scores.exp().float(), output.confidence[:, 1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_where_nothing_is_drawn_nothing_is_reported(name):
    names = ("output_scores", "output_logits", "output_hidden_states")
    output = (
        FAMILIES[name]
        .model(num_hidden_layers=2)
        .generate(PROMPTS, max_length=3, return_dict_in_generate=True, **dict.fromkeys(names, True))
    )
    assert (output.scores, output.logits, output.hidden_states, output.nfe) == ((), (), (), 0)
    assert output.steps.tolist() == [[-1] * 3] * 2
