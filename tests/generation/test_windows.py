"""Texts beyond the context, and uneven batches of them: each pass reads the context that ends with its block."""

import pytest
import torch
from tiny_mdlm import text, tiny


CONTEXT, MASK = 8, 11
BLOCKS = {"strategy": "semi_autoregressive", "block_length": 3, "block_strategy": "confidence", "do_sample": False}


def surest_first(model, canvas, blocks):
    """Fill `canvas` [length] block by block, a pass per position, with windows of the context cut by hand."""
    canvas = canvas.clone()
    for positions in blocks:
        end = int(positions[-1]) + 1
        start = max(0, end - CONTEXT)
        masked = [position for position in positions.tolist() if canvas[position] == MASK]
        while masked:
            probabilities = model(canvas[None, start:end]).logits[0, :, :MASK].softmax(-1)
            position = max(masked, key=lambda position: float(probabilities[position - start].max()))
            canvas[position] = probabilities[position - start].argmax()
            masked.remove(position)
    return canvas


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [0, 4, 10])
def test_blocks_beyond_the_context(prompt_length):
    model, prompt = tiny(max_position_embeddings=CONTEXT), text(1, prompt_length)
    canvas = torch.cat([prompt[0], torch.full((14,), MASK)])
    expected = surest_first(model, canvas, torch.arange(prompt_length, prompt_length + 14).split(3))
    assert torch.equal(model.generate(prompt, max_new_tokens=14, **BLOCKS)[0], expected)


@torch.no_grad()
def test_a_sliding_window_begins_with_all_of_the_context():
    model, prompt = tiny(max_position_embeddings=CONTEXT), text(1, 2)
    canvas = torch.cat([prompt[0], torch.full((12,), MASK)])
    expected = surest_first(model, canvas, (torch.arange(8), *torch.arange(8, 14).split(3)))
    assert torch.equal(model.generate(prompt, max_new_tokens=12, sliding_window=True, **BLOCKS)[0], expected)


@pytest.mark.parametrize("approximate_cache", [False, True])
@pytest.mark.parametrize("sliding_window", [False, True])
def test_rows_of_uneven_length_do_not_know_of_each_other(sliding_window, approximate_cache):
    model, prompts = tiny(max_position_embeddings=CONTEXT), text(3, 6)
    mask = torch.ones_like(prompts)
    mask[1, :4] = mask[2, 1:6] = 0
    arguments = {**BLOCKS, "sliding_window": sliding_window, "approximate_cache": approximate_cache}
    together = model.generate(prompts, attention_mask=mask, max_new_tokens=7, **arguments)
    for row in range(3):
        alone = model.generate(prompts[row][mask[row].bool()][None], max_new_tokens=7, **arguments)
        assert torch.equal(together[row, 6:], alone[0, -7:])


def test_a_block_that_no_window_holds_is_refused():
    model = tiny(max_position_embeddings=CONTEXT)
    canvas = torch.cat([torch.tensor([MASK]), text(1, 10)[0], torch.tensor([MASK])])[None]
    with pytest.raises(ValueError, match="`block_length` .2.: a block of these positions to fill spans 12 tokens"):
        model.generate(canvas, strategy="semi_autoregressive", block_length=2)
    filled = model.generate(canvas, strategy="semi_autoregressive", block_length=1)
    assert torch.equal(filled[:, 1:11], canvas[:, 1:11])


def test_a_model_that_reads_its_padding_does_not_read_windows():
    model, mask = tiny(max_position_embeddings=CONTEXT, attend_to_padding=True), torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    with pytest.raises(ValueError, match="`attention_mask` marks padding in a text of more tokens than .* context"):
        model.generate(
            text(2, 6), attention_mask=mask, max_new_tokens=6, strategy="semi_autoregressive", block_length=2
        )


def test_only_blocks_go_beyond_the_context():
    with pytest.raises(ValueError, match="text of 9 tokens, more than the model's context.*8"):
        tiny(max_position_embeddings=CONTEXT).generate(max_new_tokens=9, strategy="first_hitting")
