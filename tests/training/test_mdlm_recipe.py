"""How MDLM is validated: the bound by enumeration, and masks that stay the same."""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from tiny_mdlm import text, tiny

from hf_diffusion.training.families.mdlm import MaskedTexts, MDLMRecipe, SeparateSeedsCallback, collate_texts


MASK = 11


@pytest.fixture
def recipe(tmp_path):
    return MDLMRecipe(text="any.txt", output=tmp_path, block_length=4, validation_draws=6)


def bound_by_enumeration(model, row):
    """Mean of the chain rule over all orders, in nats per token."""
    total = 0.0
    orders = list(itertools.permutations(range(len(row))))
    for order in orders:
        canvas = torch.full_like(row, MASK)
        for position in order:
            total -= float(model(canvas[None]).logits[0, position].log_softmax(-1)[row[position]])
            canvas[position] = row[position]
    return total / len(orders) / len(row)


@torch.no_grad()
def test_mean_over_draws_is_the_enumerated_bound():
    model, texts = tiny(torch.float32), text(4, 4)
    expected = statistics.fmean(bound_by_enumeration(model, row) for row in texts)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(300):
        draw = MaskedTexts(texts, MASK, generator)
        losses.append(float(model(**collate_texts([draw[index] for index in range(len(draw))])).loss))
    standard_error = statistics.stdev(losses) / math.sqrt(len(losses))
    assert standard_error < 0.02 * expected
    assert abs(statistics.fmean(losses) - expected) < 4 * standard_error


def test_numbers_of_masks_are_spread_over_the_texts_and_any_text_may_get_any():
    texts, generator = text(12, 12), torch.Generator().manual_seed(0)
    numbers = torch.stack([(MaskedTexts(texts, MASK, generator).noised.input_ids == MASK).sum(1) for _ in range(200)])
    assert bool((numbers.sort(dim=1).values == torch.arange(1, 13)).all())
    assert numbers[:, 0].unique().tolist() == list(range(1, 13))


def test_runs_with_other_seeds_are_validated_with_the_same_masks(recipe, tmp_path):
    tokens, tokenizer = text(1, 42)[0], SimpleNamespace(mask_token_id=MASK)
    draws = recipe.evaluations(tokens, tokenizer)["bound"]
    other = MDLMRecipe(text="any.txt", output=tmp_path, block_length=4, validation_draws=6, seed=5)
    assert len(draws) == 6
    for one, same in zip(draws, other.evaluations(tokens, tokenizer)["bound"], strict=True):
        assert torch.equal(one.texts.flatten(), tokens[:40])
        assert torch.equal(one.noised.input_ids, same.noised.input_ids)
    assert not torch.equal(draws[0].noised.input_ids, draws[1].noised.input_ids)


def test_processes_draw_different_masks():
    def first_draw(process):
        arguments = SimpleNamespace(seed=7, process_index=process)
        SeparateSeedsCallback().on_train_begin(arguments, None, None)
        return torch.rand(4)

    assert torch.equal(first_draw(0), first_draw(0))
    assert not torch.equal(first_draw(0), first_draw(1))
