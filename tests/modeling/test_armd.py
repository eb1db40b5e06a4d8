"""ARMD: what it computes, who sees whom, and that its cache is exact."""

import copy
import itertools

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling.armd_reference import Reference
from transformers import DynamicCache

from hf_diffusion import ARMDCache, ARMDConfig, ARMDForMaskedDiffusion
from hf_diffusion.diffusion import orders
from hf_diffusion.modeling.prefix_aggregation import aggregate_causally


ARMD = [name for name in FAMILIES if name.startswith("armd")]
LENGTH = 10


def random_blocks(generator, batch, length=LENGTH, num_blocks=None):
    """A random order with random blocks, numbered without gaps, for each row."""
    numbers = torch.randint(num_blocks or length, (batch, length), generator=generator)
    return torch.stack([row.unique(return_inverse=True)[1] for row in numbers])


def random_order(generator, batch, length=LENGTH):
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])


@pytest.fixture(params=ARMD)
def model(request):
    return FAMILIES[request.param].model(torch.float64)


class TestNetwork:
    @pytest.mark.parametrize(
        "blocks", [[0, 1, 2, 3, 4], [3, 0, 2, 1, 4], [0, 2, 3, 1, 2], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], ids=str
    )
    def test_equals_the_definition_position_by_position(self, blocks):
        for name in ARMD:
            model = FAMILIES[name].model(torch.float64)
            text = [3, 22, 0, 7, 7]
            logits = model(torch.tensor([text]), block_index=torch.tensor([blocks])).logits[0]
            # The angles of the library's rotary embeddings are float32.
            torch.testing.assert_close(logits, Reference(model).logits(text, blocks), rtol=0, atol=2e-5)

    def test_left_to_right_is_the_default(self, model):
        ids = torch.randint(23, (2, LENGTH))
        assert torch.equal(model(ids).logits, model(ids, block_index=orders.left_to_right(2, LENGTH)).logits)

    @pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [1, 3, 0, 2], [1, 0, 1, 0], [0, 0, 0, 0]], ids=str)
    def test_probabilities_of_all_texts_sum_to_one(self, blocks):
        # A conditional that saw its own block or a later one would break the sum.
        model = FAMILIES["armd_left_neighbour"].model(torch.float64, vocab_size=4)
        texts = torch.tensor(list(itertools.product(range(4), repeat=4)))
        logits = model(texts, block_index=torch.tensor(blocks).expand(len(texts), -1)).logits
        log_likelihood = logits.log_softmax(-1).gather(-1, texts[..., None]).sum((1, 2))
        torch.testing.assert_close(log_likelihood.exp().sum(), torch.tensor(1.0, dtype=torch.float64))

    def test_masked_positions_are_predicted_from_all_the_others_by_default(self, model):
        ids = torch.randint(23, (1, LENGTH))
        masked = ids.clone()
        masked[0, [2, 3, 7]] = model.config.mask_token_id
        blocks = torch.tensor([[0, 1, 7, 7, 2, 3, 4, 7, 5, 6]])
        torch.testing.assert_close(model(masked).logits, model(ids, block_index=blocks).logits)

    def test_prefix_aggregation_in_chunks_equals_the_whole(self):
        query, key, content = torch.randn(2, 300, 8).double(), torch.randn(2, 300, 8).double(), torch.randn(2, 300, 6)
        content = content.double()
        expected = torch.stack(
            [
                sum((query[:, n] * key[:, i]).sum(-1, keepdim=True) * content[:, i] for i in range(n + 1))
                for n in (0, 150, 299)
            ]
        )
        for chunk_size in (7, 128, 300):
            aggregated = aggregate_causally(query, key, content, chunk_size)
            torch.testing.assert_close(aggregated[:, [0, 150, 299]].transpose(0, 1), expected)

    @pytest.mark.parametrize("form", ["sinusoidal", "learned"])
    def test_forms_of_the_prefix_encoding(self, form):
        model = FAMILIES["armd"].model(prefix_encoding=form, prefix_scale=0.5)
        ids = torch.randint(23, (2, 6))
        swapped = ids[:, [1, 0, 2, 3, 4, 5]]
        assert not torch.allclose(model(ids).logits[:, 5], model(swapped).logits[:, 5])

    def test_configurations_that_do_not_fit_are_refused(self):
        for settings_, message in [
            ({"hidden_size": 30}, "`hidden_size` .30. must be an even multiple"),
            ({"num_two_stream_layers": 5}, "`num_two_stream_layers` must be between 1 and"),
            ({"prefix_encoding_size": 5}, "`prefix_encoding_size` must be even"),
            ({"eos_token_id": 23}, "`eos_token_id` must lie in the vocabulary"),
        ]:
            with pytest.raises(Exception, match=message):
                FAMILIES["armd"].config(**settings_)


class TestVisibility:
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 2**31), singletons=st.booleans(), num_two_stream_layers=st.integers(1, 4))
    def test_a_token_changes_later_blocks_and_nothing_else(self, seed, singletons, num_two_stream_layers):
        generator = torch.Generator().manual_seed(seed)
        model = FAMILIES["armd_left_neighbour"].model(torch.float64, num_two_stream_layers=num_two_stream_layers)
        ids = torch.randint(23, (3, LENGTH), generator=generator)
        blocks = random_order(generator, 3) if singletons else random_blocks(generator, 3, num_blocks=4)
        position = int(torch.randint(LENGTH, (1,), generator=generator))
        changed = ids.clone()
        changed[:, position] = (ids[:, position] + 1) % 23
        difference = (model(ids, block_index=blocks).logits - model(changed, block_index=blocks).logits).abs().amax(-1)
        later = blocks > blocks[:, position, None]
        assert float(difference[~later].max()) == 0.0
        assert not later.any() or float(difference[later].min()) > 0.0

    def test_order_inside_a_block_and_of_the_evidence_does_not_matter(self, model):
        # The model sorts by block; here the rows of a block reach the kernels in another order.
        ids = torch.randint(23, (1, LENGTH))
        blocks = torch.tensor([[0, 1, 2, 2, 2, 3, 3, 0, 1, 3]])
        logits = model.float()(ids, block_index=blocks).logits
        core = copy.deepcopy(model)
        plan = core.model._plan

        def reversed_plan(*arguments):
            canvas, rows = plan(*arguments)
            order = (rows.query_block * 100 - rows.query).argsort(dim=-1)
            for name in ("query", "query_block", "neighbour"):
                setattr(rows, name, getattr(rows, name).gather(1, order))
            rows.content = torch.cat([rows.content[:, :1], rows.query[:, :-1]], dim=1)
            rows.content_block = torch.cat([rows.content_block[:, :1], rows.query_block[:, :-1]], dim=1)
            return canvas, rows

        core.model._plan = reversed_plan
        torch.testing.assert_close(core(ids, block_index=blocks).logits, logits, rtol=0, atol=1e-5)

    def test_a_masked_token_is_never_read(self, model):
        ids = torch.randint(23, (1, LENGTH))
        ids[0, 4] = model.config.mask_token_id
        with pytest.raises(ValueError, match="`mask_token_id` in a block that later blocks would have to read"):
            model(ids, block_index=orders.left_to_right(1, LENGTH))
        last = torch.tensor([[0, 1, 2, 3, 9, 4, 5, 6, 7, 8]])
        filled = ids.clone()
        filled[0, 4] = 11
        assert torch.equal(model(ids, block_index=last).logits, model(filled, block_index=last).logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"block_index": torch.tensor([[0, 1, 3, 4]])}, "`block_index` must number the blocks"),
            ({"block_index": torch.tensor([[0, 1, 2]])}, "`block_index` must have the shape of `input_ids`"),
            ({"attention_mask": torch.ones(1, 1, 4, 4)}, "`attention_mask` must have the shape of `input_ids`"),
            ({"labels": torch.zeros(1, 3)}, "`labels` must have the shape of `input_ids`"),
            ({"labels": torch.zeros(1, 4), "query_positions": torch.tensor([[0]])}, "`labels` needs the logits of all"),
            ({"past_key_values": ARMDCache(4)}, "`past_key_values` needs `query_positions`"),
        ],
        ids=["gap", "blocks", "mask", "labels", "queries", "cache"],
    )
    def test_wrong_arguments_are_refused(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[1, 2, 3, 4]]), **arguments)

    def test_a_text_longer_than_the_context_is_refused(self, model):
        with pytest.raises(
            ValueError, match="a text of 65 tokens, more than the model's context .`max_position_embeddings`=64."
        ):
            model(torch.zeros(1, 65, dtype=torch.long))


def decode(model, ids, blocks, first_block, attention_mask=None):
    """Ask for block after block with a cache; returns the logits of the positions asked for, in place."""
    cache, logits = None, torch.zeros(*ids.shape, model.config.vocab_size, dtype=model.dtype)
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    passes = 0
    step = torch.where(real, blocks - first_block, -1)
    for number in range(int(step.max()) + 1):
        width = int((step == number).sum(1).max())
        queries = torch.full((len(ids), width), -1)
        for row in range(len(ids)):
            positions = (step[row] == number).nonzero()[:, 0]
            queries[row, : len(positions)] = positions
        known = torch.where(step < number, ids, model.config.mask_token_id)
        output = model(
            torch.where(real, known, ids),
            attention_mask=attention_mask,
            block_index=blocks,
            query_positions=queries,
            past_key_values=cache,
            use_cache=True,
        )
        cache, passes = output.past_key_values, passes + 1
        for row in range(len(ids)):
            asked = queries[row] >= 0
            logits[row, queries[row, asked]] = output.logits[row, asked]
    return logits, step >= 0, cache, passes


class TestCache:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
    @pytest.mark.parametrize("num_streams", [1, 2, 3, 4, 8])
    def test_strided_decoding_of_an_uneven_batch_with_infills(self, model, dtype, tolerance, num_streams):
        # In units of the logits' spread: the tiny network's logits are large on purpose.
        model = model.to(dtype)
        ids = torch.randint(23, (4, 24))
        attention_mask = torch.ones_like(ids)
        attention_mask[1, :5], attention_mask[2, -4:] = 0, 0
        to_fill = torch.ones_like(ids, dtype=torch.bool)
        to_fill[0, :9], to_fill[1, 10:12], to_fill[2, ::3] = False, False, False
        blocks = orders.fill_order(to_fill, attention_mask, lambda count: orders.strided_steps(count, num_streams))
        given = (attention_mask.bool() & ~to_fill).sum(1, keepdim=True)
        cached, asked, _, _ = decode(model, ids, blocks, given, attention_mask)
        full = model(ids, attention_mask=attention_mask, block_index=blocks).logits
        assert asked.sum() == (to_fill & attention_mask.bool()).sum()
        assert float((cached - full)[asked].abs().max()) < tolerance * float(full.std())

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**31), first=st.integers(0, 3), singletons=st.booleans())
    def test_any_order_and_any_blocks(self, seed, first, singletons):
        generator = torch.Generator().manual_seed(seed)
        model = FAMILIES["armd_left_neighbour"].model(torch.float64)
        ids = torch.randint(23, (3, LENGTH), generator=generator)
        blocks = random_order(generator, 3) if singletons else random_blocks(generator, 3, num_blocks=6)
        cached, asked, _, _ = decode(model, ids, blocks, first)
        full = model(ids, block_index=blocks).logits
        assert not asked.any() or float((cached - full)[asked].abs().max()) < 1e-10

    def test_nothing_is_computed_twice(self, model):
        ids = torch.randint(23, (2, 20))
        blocks = orders.fill_order(
            (torch.arange(20) >= 6).expand(2, 20), None, lambda count: orders.strided_steps(count, 4)
        )
        rows = []
        handle = model.model.layers[0].register_forward_pre_hook(
            lambda _, arguments: rows.append(arguments[0].shape[1])
        )
        _, _, cache, passes = decode(model, ids, blocks, torch.tensor([[6], [6]]))
        handle.remove()
        assert passes == 4 + -(-14 // 4) - 1
        # Start symbol and prompt as content, prompt and the first head as queries; then the last block and the next.
        assert rows == [7 + 7, 1 + 1, 1 + 1, 1 + 1, 1 + 4, 4 + 4, 4 + 2]
        assert [layer.get_seq_length() for layer in cache.layers] == [1 + 6 + 12] * 2 + [6 + 14] * 2

    def test_orders_of_singletons_never_build_a_mask(self, model, monkeypatch):
        def refuse(**arguments):
            pytest.fail(f"a mask of {arguments['q_length']} x {arguments['kv_length']} was built")

        from hf_diffusion.modeling import masks

        monkeypatch.setitem(masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", refuse)
        ids = torch.randint(23, (2, LENGTH))
        blocks = random_order(torch.Generator().manual_seed(0), 2)
        attention_mask = torch.ones_like(ids)
        attention_mask[0, :3] = 0
        model(ids, block_index=blocks)
        model(ids, attention_mask=attention_mask)
        decode(model, ids, blocks, 4)
        uneven = torch.tensor([[0, 0, 0, *range(7)], list(range(10))])
        queries = torch.tensor([[8], [5]])
        model(ids, attention_mask, uneven, query_positions=queries, use_cache=True)
        with pytest.raises(pytest.fail.Exception):
            model(ids, block_index=torch.zeros_like(ids))

    def test_rows_can_be_selected_repeated_and_reordered(self, model):
        ids = torch.randint(23, (3, LENGTH))
        blocks = orders.left_to_right(3, LENGTH)
        full = model(ids).logits

        def ask(cache, text, position):
            queries = torch.full((len(text), 1), position)
            return model(
                text, block_index=blocks[: len(text)], query_positions=queries, past_key_values=cache, use_cache=True
            )

        cache = ask(None, ids, 4).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        torch.testing.assert_close(ask(cache, ids[[2, 0]], 5).logits[:, 0], full[[2, 0], 5])
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(ask(cache, ids[[0, 2]], 6).logits[:, 0], full[[0, 2], 6])
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(ask(cache, ids[[0, 0, 2, 2]], 7).logits[:, 0], full[[0, 0, 2, 2], 7])
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(-1)
        cache.reset()
        torch.testing.assert_close(ask(cache, ids, 8).logits[:, 0], full[:, 8])

    @pytest.mark.parametrize(
        ("queries", "message"),
        [
            ([[2, 3]], "positions of several blocks at once"),
            ([[9]], r"must hold positions 0\.\.3"),
            ([2], "must be an integer tensor .batch=1, queried"),
            ([[0], [1]], "must be an integer tensor .batch=1, queried"),
            ([[2, 2]], "asks for a position twice"),
        ],
        ids=["blocks", "range", "flat", "batch", "twice"],
    )
    def test_wrong_queries_are_refused(self, model, queries, message):
        ids = torch.tensor([[1, 2, 3, 4]])
        with pytest.raises(ValueError, match=message):
            model(
                ids,
                block_index=orders.left_to_right(1, 4),
                query_positions=torch.tensor(queries),
                use_cache=True,
            )

    def test_what_the_cache_has_read_is_not_asked_again(self, model):
        ids, blocks = torch.tensor([[1, 2, 3, 4]]), orders.left_to_right(1, 4)
        cache = model(ids, block_index=blocks, query_positions=torch.tensor([[2]]), use_cache=True).past_key_values
        for position in (1, 2):
            with pytest.raises(ValueError, match="or for one that the cache has read already"):
                model(ids, query_positions=torch.tensor([[position]]), past_key_values=cache)
        with pytest.raises(ValueError, match="A canvas keeps its length"):
            model(torch.ones(1, 5, dtype=torch.long), query_positions=torch.tensor([[3]]), past_key_values=cache)
        with pytest.raises(ValueError, match="must be an `ARMDCache`, got DynamicCache"):
            model(ids, query_positions=torch.tensor([[3]]), past_key_values=DynamicCache())

    def test_a_block_must_be_written_before_the_next_pass(self, model):
        ids = torch.full((1, 4), model.config.mask_token_id)
        cache = model(ids, query_positions=torch.tensor([[0]]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="Write the tokens drawn there before the next pass"):
            model(ids, query_positions=torch.tensor([[1]]), past_key_values=cache)


class TestAttentionImplementations:
    def inputs(self):
        """Texts, and what else may be passed with them: an order, padding, both."""
        ids = torch.randint(23, (2, 16))
        real = torch.ones_like(ids)
        real[0, :3] = 0
        strided, shorter = orders.strided_steps(16, 4), orders.strided_steps(13, 4)
        padded = torch.stack([torch.nn.functional.pad(shorter, (3, 0)), strided])
        order = {"block_index": strided.expand(2, 16)}
        return ids, [{}, order, {"attention_mask": real}, {"attention_mask": real, "block_index": padded}]

    def check_logits(self, model, implementation, ids, cases):
        for case in cases:
            rows = case.get("attention_mask", torch.ones_like(ids)).bool()
            model.set_attn_implementation("sdpa")
            expected = model(ids, **case).logits[rows]
            model.set_attn_implementation(implementation)
            error = (model(ids, **case).logits[rows] - expected).abs().max()
            assert float(error) < 1e-5 * float(expected.std())

    # flex_attention as PyTorch defines it, by whole matrices. Compiling takes ten seconds for every kind of mask, and
    # its CPU kernel (2.13) returns wrong numbers for 8 or 24 keys: one case of it is below.
    @pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def test_agree_with_sdpa(self, implementation):
        model, (ids, cases) = FAMILIES["armd_left_neighbour"].model(torch.float32), self.inputs()
        self.check_logits(model, implementation, ids, cases)
        prompts = [{"input_ids": ids[:, :9]}, {"input_ids": ids, **cases[2]}]
        settings = [{}, {"strategy": "strided", "num_streams": 4}]
        for prompt, strategy in itertools.product(prompts, settings):
            drawn = []
            for name in ("sdpa", implementation):
                model.set_attn_implementation(name)
                drawn.append(model.generate(**prompt, **strategy, max_new_tokens=8, do_sample=False))
            assert torch.equal(*drawn)

    @pytest.mark.slow
    @torch.no_grad()
    def test_compiled_flex_attention_agrees_with_sdpa(self):
        ids, cases = self.inputs()
        model = FAMILIES["armd_left_neighbour"].model(torch.float32, num_hidden_layers=2)  # one of each kind
        drawn = model.generate(ids[:, :9], max_new_tokens=2, do_sample=False)
        self.check_logits(model, "flex_attention", ids, cases[-1:])
        assert torch.equal(model.generate(ids[:, :9], max_new_tokens=2, do_sample=False), drawn)


def test_projections_into_the_residual_stream_start_smaller():
    model = FAMILIES["armd"].model(hidden_size=128, num_hidden_layers=8, initializer_range=0.02)
    layer = model.model.layers[3]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert float(projection.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(layer.self_attn.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    # torch's own scale for a linear layer: uniform in +-1/sqrt(n), so a standard deviation of 1/sqrt(3n).
    encoding = FAMILIES["armd"].model(prefix_encoding_size=128).model.position_encoding.proj.weight.detach()
    assert float(encoding.std()) == pytest.approx(float(torch.nn.Linear(128, 128).weight.detach().std()), rel=0.05)


def test_a_model_of_the_papers_size_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        small = ARMDForMaskedDiffusion(ARMDConfig())
        medium = ARMDForMaskedDiffusion(ARMDConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    # "Similar to GPT-2 small (125M) and medium (345M)"; GPT-2's own counts, with learned positions, are 124 and 355.
    assert small.num_parameters() == pytest.approx(124e6, rel=0.01)
    assert medium.num_parameters() == pytest.approx(354e6, rel=0.01)
