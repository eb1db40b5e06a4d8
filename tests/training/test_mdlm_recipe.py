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
    return MDLMRecipe(text="any.txt", output=tmp_path, text_length=4, validation_draws=6)


def bound_by_enumeration(model, row):
    """Mean of the chain rule over all orders of each block, one token at a time, in nats per token."""
    total, block_size = 0.0, model.config.block_size or len(row)
    for start in range(0, len(row), block_size):
        block = range(start, min(start + block_size, len(row)))
        orders = list(itertools.permutations(block))
        for order in orders:
            canvas = row[: block.stop].clone()
            canvas[start:] = MASK
            for position in order:
                log_probs = model(canvas[None]).logits[0, position].log_softmax(-1)
                total -= float(log_probs[row[position]]) / len(orders)
                canvas[position] = row[position]
    return total / len(row)


def losses_of_draws(model, texts, num_draws):
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(num_draws):
        draw = MaskedTexts(texts, MASK, generator, model.config.block_size)
        losses.append(float(model(**collate_texts([draw[index] for index in range(len(draw))])).loss))
    return losses


@pytest.mark.parametrize("block_size", [None, 2, 3])
@torch.no_grad()
def test_mean_over_draws_is_the_enumerated_bound(block_size):
    model, texts = tiny(torch.float32, block_size=block_size), text(4, 4)
    expected = statistics.fmean(bound_by_enumeration(model, row) for row in texts)
    losses = losses_of_draws(model, texts, 300)
    standard_error = statistics.stdev(losses) / math.sqrt(len(losses))
    assert standard_error < 0.02 * expected
    assert abs(statistics.fmean(losses) - expected) < 4 * standard_error


@torch.no_grad()
def test_every_draw_in_blocks_of_one_token_is_the_exact_negative_log_likelihood():
    model, texts = tiny(block_size=1), text(4, 7)
    expected = statistics.fmean(bound_by_enumeration(model, row) for row in texts)
    assert losses_of_draws(model, texts, 3) == pytest.approx([expected] * 3, rel=1e-9)


@pytest.mark.parametrize("block_size", [None, 4])
def test_numbers_of_masks_are_spread_over_all_blocks_and_any_block_may_get_any(block_size):
    texts, generator, most = text(12, 12), torch.Generator().manual_seed(0), block_size or 12
    draws = [MaskedTexts(texts, MASK, generator, block_size) for _ in range(200)]
    numbers = torch.stack([(draw.noised.input_ids == MASK).view(-1, most).sum(1) for draw in draws])
    times_each = numbers.shape[1] // most
    assert bool((numbers.sort(dim=1).values == torch.arange(1, most + 1).repeat_interleave(times_each)).all())
    assert all(of_block.unique().tolist() == list(range(1, most + 1)) for of_block in numbers.T)


def test_runs_with_other_seeds_are_validated_with_the_same_masks(recipe, tmp_path):
    tokens, tokenizer = text(1, 42)[0], SimpleNamespace(mask_token_id=MASK)
    draws = recipe.evaluations(tokens, tokenizer)["bound"]
    other = MDLMRecipe(text="any.txt", output=tmp_path, text_length=4, validation_draws=6, seed=5)
    assert len(draws) == 6
    for one, same in zip(draws, other.evaluations(tokens, tokenizer)["bound"], strict=True):
        assert torch.equal(one.texts.flatten(), tokens[:40])
        assert torch.equal(one.noised.input_ids, same.noised.input_ids)
    assert not torch.equal(draws[0].noised.input_ids, draws[1].noised.input_ids)


def test_validation_masks_are_drawn_in_the_blocks_of_the_recipe(tmp_path):
    recipe = MDLMRecipe(text="any.txt", output=tmp_path, text_length=4, block_size=1)
    draws = recipe.evaluations(text(1, 42)[0], SimpleNamespace(mask_token_id=MASK))["bound"]
    assert all(bool((draw.noised.input_ids == MASK).all()) for draw in draws)


def test_processes_draw_different_masks():
    def first_draw(process):
        arguments = SimpleNamespace(seed=7, process_index=process)
        SeparateSeedsCallback().on_train_begin(arguments, None, None)
        return torch.rand(4)

    assert torch.equal(first_draw(0), first_draw(0))
    assert not torch.equal(first_draw(0), first_draw(1))
