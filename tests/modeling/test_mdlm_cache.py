"""The cache of block-causal MDLM: exact, whatever the batch, and nothing that it holds is computed again."""

import copy

import pytest
import torch
from tiny_mdlm import text, tiny
from transformers import DynamicCache

from hf_diffusion import MDLMCache


MASK = 11


def batch(length=14):
    """A prefix, an infill, a text from nothing, and a prompt on either side of some padding; 0 where there is none."""
    ids, mask = text(5, length), torch.ones(5, length, dtype=torch.long)
    to_fill = torch.ones(5, length, dtype=torch.bool)
    to_fill[0, :6], to_fill[1, ::3], to_fill[3, :9], to_fill[4, :2] = False, False, False, False
    mask[3, :4], mask[4, -3:], mask[4, 1] = 0, 0, 0
    return ids, mask, to_fill & mask.bool()


def decode(model, ids, mask, to_fill, per_pass=2, cache=None):
    """Fill each row block by block, `per_pass` positions at a time, and compare every pass with one without cache.

    Returns:
        The greatest difference of logits, in units of their spread, the number of passes, and the cache.
    """
    canvas = torch.where(to_fill, MASK, ids)
    block = torch.where(mask.bool(), (mask.cumsum(1) - 1) // model.config.block_size, -1)
    worst, passes = 0.0, 0
    while bool((canvas == MASK).any()):
        queries = torch.full((len(ids), model.config.block_size), -1)
        for row in range(len(ids)):
            masked = (canvas[row] == MASK).nonzero()[:, 0]
            if len(masked):
                here = masked[block[row, masked] == block[row, masked].min()]
                queries[row, : len(here)] = here
        arguments = {"attention_mask": mask, "query_positions": queries}
        expected = model(canvas, **arguments).logits[..., :MASK]
        output = model(canvas, past_key_values=cache, use_cache=True, **arguments)
        cache, asked, passes = output.past_key_values, queries >= 0, passes + 1
        worst = max(worst, float(((output.logits[..., :MASK] - expected)[asked].abs().max()) / expected[asked].std()))
        for row in range(len(ids)):
            drawn = queries[row, queries[row] >= 0][-per_pass:]  # from the right: what was first asked is not final
            canvas[row, drawn] = ids[row, drawn]
    return worst, passes, cache


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_logits_are_those_without_a_cache(block_size, dtype, tolerance):
    worst, passes, cache = decode(tiny(dtype, block_size=block_size), *batch())
    assert passes >= 7
    assert worst < tolerance
    assert cache.num_final.tolist() == [(n - 1) // block_size * block_size for n in (14, 14, 14, 10, 10)]


@torch.no_grad()
def test_eager_attention():
    model = tiny(torch.float32, block_size=4, attn_implementation="eager")
    assert decode(model, *batch())[0] < 1e-4  # eager: softmax in float32


def rows_of_passes(model, canvas, queries):
    """The number of rows in each layer of each pass, for one text asked for in `queries`."""
    rows, cache = [], None
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1]))
        for layer in model.model.layers
    ]
    for positions, drawn in queries:
        cache = model(
            canvas, query_positions=torch.tensor([positions]), past_key_values=cache, use_cache=True
        ).past_key_values
        canvas[:, drawn] = 1
    for hook in hooks:
        hook.remove()
    return rows, cache


@torch.no_grad()
def test_nothing_is_computed_twice_but_the_block_being_drawn():
    model, canvas = tiny(block_size=4), text(1, 15)
    canvas[:, 6:] = MASK
    passes = [([6, 7], [6]), ([7], [7]), ([8, 9, 10, 11], [9, 8]), ([10, 11], [10, 11]), ([12, 14], [12]), ([13], [13])]
    rows, cache = rows_of_passes(model, canvas, passes)
    # The prompt with its block; that block again; it and the next one together; ... The last layer: what is asked.
    in_layers = [(8, 2), (4, 1), (4 + 4, 4), (4, 2), (4 + 3, 2), (3, 1)]
    assert rows == [count for whole, asked in in_layers for count in (whole, whole, asked)]
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_no_mask_is_built_where_all_may_be_read(monkeypatch):
    from hf_diffusion.modeling import masks

    built = []
    original = masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def count(**arguments):
        built.append((arguments["q_length"], arguments["kv_length"]))
        return original(**arguments)

    monkeypatch.setitem(masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", count)
    model, canvas = tiny(block_size=4), torch.full((1, 12), MASK)
    passes = [([0, 1, 2, 3], [0, 1]), ([2, 3], [2, 3]), ([4, 5, 6, 7], [4, 5, 6]), ([7], [7]), ([8], [8])]
    rows_of_passes(model, canvas, passes)
    assert built == [(8, 8), (8, 12)]  # the two passes that finish a block and begin another


@torch.no_grad()
def test_rows_can_be_selected_repeated_and_reordered():
    model, (ids, mask, to_fill) = tiny(block_size=3), batch()
    canvas = torch.where(to_fill, MASK, ids)
    first = torch.tensor([[6], [1], [0], [9], [3]])
    cache = model(canvas, mask, query_positions=first, use_cache=True).past_key_values
    assert isinstance(cache, MDLMCache) and cache.num_final.tolist() == [6, 0, 0, 3, 0]
    for change, argument, rows in (
        (cache.batch_select_indices, torch.tensor([3, 0, 4]), [3, 0, 4]),
        (cache.reorder_cache, torch.tensor([1, 0, 2]), [0, 3, 4]),
        (cache.batch_repeat_interleave, 2, [0, 0, 3, 3, 4, 4]),
    ):
        change(argument)
        worst, _, _ = decode(model, ids[rows], mask[rows], to_fill[rows], per_pass=3, cache=copy.deepcopy(cache))
        assert worst < 1e-10
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert decode(model, ids, mask, to_fill, cache=cache)[0] < 1e-10


@torch.no_grad()
def test_a_row_that_asks_for_nothing_stays_as_it_is():
    model, ids = tiny(block_size=3), text(2, 9)
    ids[:, 6:] = MASK
    cache = model(ids, query_positions=torch.tensor([[6], [6]]), use_cache=True).past_key_values
    ids[0, 6:] = 1
    output = model(ids, query_positions=torch.tensor([[-1, -1], [8, -1]]), past_key_values=cache)
    assert cache.num_final.tolist() == [6, 6]
    assert bool(output.logits[..., :MASK].isfinite().all())
    torch.testing.assert_close(output.logits[1, 0], model(ids).logits[1, 8])
    nobody = torch.full((2, 1), -1)
    assert model(ids, query_positions=nobody, use_cache=True).past_key_values.num_final.tolist() == [0, 0]


@torch.no_grad()
def test_the_canvas_may_grow():
    model, ids = tiny(block_size=3), text(1, 12)
    cache = model(ids[:, :6], query_positions=torch.tensor([[3]]), use_cache=True).past_key_values
    logits = model(ids, query_positions=torch.tensor([[10]]), past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(logits, model(ids).logits[:, 10])


@torch.no_grad()
def test_a_refused_pass_leaves_the_cache_as_it_was():
    model, ids = tiny(block_size=3), text(1, 9)
    cache = model(ids, query_positions=torch.tensor([[3]]), use_cache=True).past_key_values
    masked = ids.clone()
    masked[0, 4] = MASK
    with pytest.raises(ValueError, match="`input_ids` holds `mask_token_id` .11. in a block before"):
        model(masked, query_positions=torch.tensor([[6]]), past_key_values=cache)
    logits = model(ids, query_positions=torch.tensor([[6]]), past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(logits, model(ids).logits[:, 6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_positions": [[3, 6], [3, 4]]}, "asks for positions of several blocks of a row at once"),
        ({"query_positions": [[2], [4]]}, "asks for a block that is finished in the cache"),
        ({"query_positions": [[8], [4]]}, "asks for padding"),
        ({"query_positions": [[9], [4]]}, "must hold positions 0..8, or -1"),
        ({"query_positions": None}, "`past_key_values`.* needs `query_positions`"),
        (
            {"query_positions": [[3], [3]], "past_key_values": DynamicCache()},
            "must be an `MDLMCache`, got Dyn",
        ),
        ({"query_positions": [[3], [3]], "past_key_values": "one row"}, "has 2 rows, but the cache .* 1"),
    ],
    ids=["blocks", "finished", "padding", "range", "none", "class", "rows"],
)
def test_wrong_passes_are_refused(arguments, message):
    model, ids, mask = tiny(block_size=3), text(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 8] = 0
    cache = model(ids, mask, query_positions=torch.tensor([[3], [3]]), use_cache=True).past_key_values
    if arguments.get("past_key_values") == "one row":
        cache.batch_select_indices(torch.tensor([0]))
        arguments = {"query_positions": arguments["query_positions"]}
    queries = arguments["query_positions"]
    with pytest.raises(ValueError, match=message):
        model(
            ids,
            mask,
            query_positions=torch.tensor(queries) if queries is not None else None,
            past_key_values=arguments.get("past_key_values", cache),
        )


def test_a_cache_that_could_not_be_exact_is_refused():
    ids, queries = text(1, 6), torch.tensor([[2]])
    refusals = (
        ({"use_cache": True}, "needs a model with `block_size`"),
        ({"past_key_values": MDLMCache(3)}, "must be an `ApproximateMDLMCache`, got MDLMCache"),
    )
    for arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            tiny()(ids, query_positions=queries, **arguments)
        with pytest.raises(ValueError, match="does not go with `labels`"):
            tiny(block_size=3)(ids, labels=ids, **arguments)
    assert tiny()(ids, query_positions=queries, use_cache=False).past_key_values is None
    model = tiny(block_size=3).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not go with gradient checkpointing"):
        model(ids, query_positions=queries, use_cache=True)
