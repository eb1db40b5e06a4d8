"""The approximate cache: what it keeps, where it is exact all the same, and that its error is what it says."""

import pytest
import torch
from tiny_mdlm import text, tiny

from hf_diffusion import ApproximateMDLMCache


MASK = 11
BLOCKS = {"strategy": "semi_autoregressive", "block_length": 4, "max_new_tokens": 10}


def seeded():
    return torch.Generator().manual_seed(3)


def uneven_batch():
    ids, mask = text(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = mask[2, 6:] = 0
    ids[0, 4:], ids[1, 6:], ids[2, 1] = MASK, MASK, MASK
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_first_pass_is_exact_and_so_is_a_second_in_which_nothing_has_changed(attention):
    model, (ids, mask) = tiny(), uneven_batch()
    model.set_attn_implementation(attention)
    queries = torch.tensor([[5, 7], [6, 8], [1, -1]])
    cache = ApproximateMDLMCache(3)
    expected = model(ids, mask, query_positions=queries).logits[queries >= 0]
    for _ in range(2):
        logits = model(ids, mask, query_positions=queries, past_key_values=cache).logits[queries >= 0]
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_keys_and_values_of_known_tokens_are_those_of_the_first_pass():
    model, ids = tiny(), text(1, 7)
    canvas = ids.clone()
    canvas[0, 4:] = MASK
    queries, cache = torch.tensor([[6]]), ApproximateMDLMCache(3)
    model(canvas, query_positions=queries, past_key_values=cache)
    layer_states = [(layer.keys[:, :, :4].clone(), layer.values[:, :, :4].clone()) for layer in cache.layers]
    canvas[0, 4:6] = ids[0, 4:6]
    logits = model(canvas, query_positions=queries, past_key_values=cache).logits
    for layer, (keys, values) in zip(cache.layers, layer_states, strict=True):
        assert torch.equal(layer.keys[:, :, :4], keys)
        assert torch.equal(layer.values[:, :, :4], values)
    assert float((logits - model(canvas, query_positions=queries).logits)[..., :MASK].abs().max()) > 1e-3


@torch.no_grad()
def test_a_single_layer_has_nothing_to_approximate():
    """There, keys and values are made of the token itself, whatever the others are."""
    model = tiny(num_hidden_layers=1)
    output = model.generate(
        text(2, 3), approximate_cache=True, generator=seeded(), return_dict_in_generate=True, **BLOCKS
    )
    assert torch.equal(output.sequences, model.generate(text(2, 3), generator=seeded(), **BLOCKS))
    assert float(output.cache_logit_error.max()) < 1e-10


@torch.no_grad()
def test_the_error_is_the_largest_difference_in_the_last_pass_of_a_block():
    model, prompt = tiny(), text(1, 3)
    output = model.generate(prompt, approximate_cache=True, generator=seeded(), return_dict_in_generate=True, **BLOCKS)
    assert output.nfe == 10
    errors, cache = [], None
    for step in range(10):
        canvas = output.sequences.masked_fill(output.steps >= step, MASK)
        queries = (output.steps == step).nonzero()[:, 1:]
        if step % 4 == 0:
            cache = ApproximateMDLMCache(3)
        logits = model(canvas, query_positions=queries, past_key_values=cache).logits
        errors.append((logits - model(canvas, query_positions=queries).logits)[..., :MASK].abs().max())
    assert errors[0] < 1e-10 < 1e-3 < errors[3]
    torch.testing.assert_close(output.cache_logit_error, max(errors[3], errors[7], errors[9])[None].float())


@torch.no_grad()
@pytest.mark.parametrize("strategy", [{"block_strategy": "confidence", "confidence_threshold": 0.5}, {}], ids=str)
def test_rows_do_not_know_of_each_other(strategy):
    model, (ids, mask) = tiny(eos_token_id=[3, 4]), uneven_batch()
    arguments = {"approximate_cache": True, "return_dict_in_generate": True, **BLOCKS, **strategy}
    together = model.generate(ids, attention_mask=mask, generator=seeded(), **arguments)
    generator = seeded()
    for row in range(3):
        alone = model.generate(ids[row, None], attention_mask=mask[row, None], generator=generator, **arguments)
        own = alone.sequences[0]  # padding in all rows is no column
        assert torch.equal(own, together.sequences[row, : len(own)])
        torch.testing.assert_close(alone.cache_logit_error[0], together.cache_logit_error[row], rtol=1e-5, atol=1e-8)


def test_fewer_rows_go_through_the_network():
    model, rows = tiny(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model.generate(text(1, 8), approximate_cache=True, **BLOCKS)
    assert rows == [18, *[10] * 3, 18, *[6] * 3, 18, 2]


@torch.no_grad()
def test_a_row_that_is_renewed_is_read_as_a_whole():
    model, (ids, mask) = tiny(), uneven_batch()
    queries, cache = torch.tensor([[8], [8], [-1]]), ApproximateMDLMCache(3)
    for _ in range(2):
        model(ids, mask, query_positions=queries, past_key_values=cache)
        ids[0, 4:6], ids[1, 6:8] = 1, 2
    cache.renew(torch.tensor([False, True, False]))
    logits = model(ids, mask, query_positions=queries, past_key_values=cache).logits[..., :MASK]
    exact = model(ids, mask, query_positions=queries).logits[..., :MASK]
    difference = (logits - exact).abs().amax((1, 2))
    assert difference[0] > 1e-4 > 1e-10 > difference[1]


@pytest.mark.parametrize(
    ("queries", "message"),
    [([[2], [6], [1]], "tokens that the cache keeps"), ([[4], [0], [1]], "asks for padding"), (None, "needs `query_")],
    ids=["kept", "padding", "none"],
)
def test_wrong_passes_are_refused(queries, message):
    model, (ids, mask) = tiny(), uneven_batch()
    cache = ApproximateMDLMCache(3)
    model(ids, mask, query_positions=torch.tensor([[4], [6], [1]]), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(ids, mask, query_positions=torch.tensor(queries) if queries else None, past_key_values=cache)
    with pytest.raises(ValueError, match="`attention_mask` of shape .* does not go with `past_key_values`"):
        model(ids, torch.zeros(3, 1, 9, 9), query_positions=torch.tensor([[4]] * 3), past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` has 1 layers, and the model 3"):
        model(ids, mask, query_positions=torch.tensor([[4]] * 3), past_key_values=ApproximateMDLMCache(1))
    with pytest.raises(ValueError, match="has 1 rows, but the cache .* 3"):
        model(ids[:1], mask[:1], query_positions=torch.tensor([[4]]), past_key_values=cache)
