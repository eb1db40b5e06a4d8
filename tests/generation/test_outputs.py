"""What `generate` returns of every token: against plain passes over the finished text, without cache or `generate`."""

import pytest
import torch
from families import FAMILIES, NUM_TOKENS, in_order


CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]
IDS = [f"{name}-{'-'.join(map(str, strategy.values()))}" for name, strategy in CASES]
PADDED = torch.tensor([[9, 1, 2], [4, 5, 1]])
REAL = torch.tensor([[0, 1, 1], [1, 1, 1]])
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True}


def prompts():
    return torch.randint(NUM_TOKENS, (2, 4), generator=torch.Generator().manual_seed(2))


def by_position(entries):
    return torch.stack(entries, dim=1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "strategy"), CASES, ids=IDS)
class TestByPosition:
    def test_logits_are_those_that_each_token_was_drawn_from(self, name, strategy):
        family = FAMILIES[name]
        model = family.model(torch.float64)
        output = model.generate(prompts(), max_new_tokens=9, seed=1, temperature=2.0, **strategy, **ALL)
        expected = family.logits_when_drawn(model, output.sequences, output.steps, 4)[:, 4:]
        torch.testing.assert_close(by_position(output.logits), expected)
        torch.testing.assert_close(by_position(output.scores), expected / 2)
        assert not torch.equal(by_position(output.logits), by_position(output.scores))

    def test_confidence_is_the_probability_of_the_token(self, name, strategy):
        family = FAMILIES[name]
        model = family.model(torch.float64)
        output = model.generate(prompts(), max_new_tokens=9, seed=1, top_k=3, return_dict_in_generate=True, **strategy)
        logits = family.logits_when_drawn(model, output.sequences, output.steps, 4)[:, 4:]
        expected = logits.softmax(-1).gather(-1, output.sequences[:, 4:, None])[..., 0]
        torch.testing.assert_close(output.confidence[:, 4:], expected.float())
        assert bool((output.confidence[:, :4] == 1).all())

    def test_transition_scores_of_transformers(self, name, strategy):
        model = FAMILIES[name].model(torch.float64)
        asked = {"return_dict_in_generate": True, "output_scores": True}
        output = model.generate(prompts(), max_new_tokens=9, seed=1, eos_token_id=[3, 8], **asked, **strategy)
        scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        torch.testing.assert_close(scores.exp().float(), output.confidence[:, 4:])

    def test_hidden_states_are_those_of_the_row_that_predicts(self, name, strategy):
        family = FAMILIES[name]
        model = family.model(torch.float64)
        output = model.generate(prompts(), max_new_tokens=9, seed=1, **strategy, **ALL)
        steps, sequences = output.steps, output.sequences
        if family.logits_when_drawn is in_order:
            given = torch.arange(4).expand(2, -1)
            inputs = {"block_index": torch.cat([given, steps[:, 4:] + 4], dim=1)}
        else:
            sequences, inputs = sequences.masked_fill(steps >= 0, model.config.mask_token_id), {}
        layers = model(sequences, output_hidden_states=True, **inputs).hidden_states
        first = (steps == 0)[:, 4:]
        assert len(output.hidden_states[0]) == len(layers)
        for layer, expected in enumerate(layers):
            drawn = torch.cat([column[layer] for column in output.hidden_states], dim=1)
            torch.testing.assert_close(drawn[first], expected[:, 4:][first])


@pytest.mark.parametrize("name", FAMILIES)
def test_given_tokens_between_the_gaps_have_log_probability_0(name):
    model = FAMILIES[name].model(torch.float64)
    mask = model.config.mask_token_id
    canvas = torch.tensor([[1, mask, 3, mask, 5, mask], [1, 2, mask, 4, mask, 6]])
    output = model.generate(canvas, seed=1, **ALL)
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    given = canvas[:, 1:] != mask
    assert scores.shape == (2, 5)
    assert bool((scores[given] == 0).all())
    torch.testing.assert_close(scores[~given].exp().float(), output.confidence[:, 1:][~given])
    assert bool((torch.cat([column[0] for column in output.hidden_states], dim=1)[given] == 0).all())


def test_hidden_states_with_the_approximate_cache_are_those_that_the_logits_were_made_of():
    """In a single layer there is nothing to approximate."""
    model = FAMILIES["mdlm"].model(torch.float64, num_hidden_layers=1)
    arguments = {"attention_mask": REAL, "max_new_tokens": 7, "seed": 3, "return_dict_in_generate": True}
    arguments.update(strategy="semi_autoregressive", block_length=3)
    exact = model.generate(PADDED, output_hidden_states=True, **arguments)
    cached = model.generate(PADDED, output_hidden_states=True, approximate_cache=True, **arguments)
    assert torch.equal(exact.sequences, cached.sequences)
    torch.testing.assert_close(cached.hidden_states, exact.hidden_states)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_scores_are_float32(name):
    model = FAMILIES[name].model(torch.bfloat16, num_hidden_layers=2)
    output = model.generate(
        PADDED,
        attention_mask=REAL,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.3,
    )
    assert {part.dtype for part in (*output.scores, *output.logits, output.confidence)} == {torch.float32}


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_drawn_leaves_nothing_to_return(name):
    output = FAMILIES[name].model().generate(prompts(), max_length=4, **ALL)
    assert (output.scores, output.logits, output.hidden_states, output.nfe) == ((), (), (), 0)
    assert output.steps.tolist() == [[-1] * 4] * 2


def test_scores_of_a_batch_in_which_a_row_has_ended():
    """What a parallel order has drawn behind the end of a text is no part of it."""
    model = FAMILIES["armd"].model(torch.float64)
    only_the_first_row_ends = lambda row, tokens: [7] if row == 0 else [8, 9]  # noqa: E731
    output = model.generate(
        prompts(),
        max_new_tokens=6,
        strategy="strided",
        num_streams=3,
        eos_token_id=7,
        prefix_allowed_tokens_fn=only_the_first_row_ends,
        **ALL,
    )
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert output.sequences[0, 4:].tolist() == [7] * 6
    assert scores[0].tolist() == [0] * 6
    assert output.steps[0].tolist() == [-1] * 4 + [0] + [-1] * 5
    assert output.tokens_per_forward[0] == 1
