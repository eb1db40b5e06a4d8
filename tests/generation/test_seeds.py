"""A text with a seed of its own is the same alone and in any batch, for every family and strategy."""

import pytest
import torch
from families import FAMILIES


REMASKING = {"strategy": "ancestral", "max_denoising_steps": 5, "remasking": "rescale", "remasking_strength": 0.5}
CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]
CASES += [
    ("mdlm", REMASKING),
    ("mdlm", {"strategy": "semi_autoregressive", "block_length": 4, "approximate_cache": True}),
]
IDS = [f"{name}-{'-'.join(map(str, strategy.values()))}" for name, strategy in CASES]
SEEDS = [40, 3, 40, 8]


def model_of(name):
    return FAMILIES[name].model(torch.float64, num_hidden_layers=2)


def texts(mask):
    """Prompts of several lengths, some with gaps."""
    return [[1, 2, 3], [4, mask, 5, 6, mask, 7], [1, 2, 3], [8, 9, mask]]


def batch(rows, side):
    width = max(map(len, rows))
    ids, real = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[number, where], real[number, where] = torch.tensor(row), 1
    return ids, real


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "strategy"), CASES, ids=IDS)
def test_a_text_with_a_seed_is_the_same_alone_and_in_a_batch(name, strategy, side):
    model = model_of(name)
    rows = texts(model.config.mask_token_id)
    arguments = {"max_new_tokens": 7, "temperature": 3.0, "eos_token_id": [10, 11], "pad_token_id": 10, **strategy}
    ids, real = batch(rows, side)
    together = model.generate(ids, attention_mask=real, seed=SEEDS, **arguments)
    real = torch.nn.functional.pad(real.bool(), (0, together.shape[1] - ids.shape[1]), value=True)
    for row, seed, text, is_real in zip(rows, SEEDS, together, real, strict=True):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), seed=[seed], **arguments)
        in_batch = text[is_real]
        assert torch.equal(in_batch[: alone.shape[1]], alone[0])
        assert bool((in_batch[alone.shape[1] :] == 10).all())
    # The first and third have the same prompt and the same seed.
    assert torch.equal(together[0], together[2])


def test_an_integer_is_the_first_of_consecutive_seeds():
    model, (ids, real) = model_of("mdlm"), batch([[1, 2], [3], [1, 2]], "left")
    arguments = {"attention_mask": real, "max_new_tokens": 8}
    one = model.generate(ids, seed=5, **arguments)
    assert torch.equal(one, model.generate(ids, seed=[5, 6, 7], **arguments))
    assert not torch.equal(one[0], one[2])


def test_every_sequence_of_a_prompt_has_its_own_seed():
    model, (ids, real) = model_of("mdlm"), batch([[1, 2], [3]], "right")
    arguments = {"attention_mask": real, "max_new_tokens": 8}
    several = model.generate(ids, seed=5, num_return_sequences=2, **arguments)
    assert torch.equal(several, model.generate(ids, seed=[5, 6, 7, 8], num_return_sequences=2, **arguments))
    assert torch.equal(several[[1, 3]], model.generate(ids, seed=[6, 8], **arguments))
    with pytest.raises(ValueError, match="`seed` must be an integer.*each of the 4 texts"):
        model.generate(ids, seed=[5, 6], num_return_sequences=2, **arguments)


def test_a_seed_leaves_the_global_generator_alone():
    model, before = model_of("armd"), torch.get_rng_state()
    model.generate(torch.tensor([[1]]), max_new_tokens=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
