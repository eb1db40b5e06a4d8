"""Block-causal MDLM: what reads what, and what the loss is, against the plain network under a mask written out here."""

import functools
import itertools
import math

import pytest
import torch
from tiny_mdlm import text, tiny

from hf_diffusion import MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.diffusion.masking import NoisedText


MASK = 11
SIZES = [1, 2, 3, 4, 8, 40]


@functools.cache
def plain(**settings):
    return tiny(**settings).requires_grad_(False)


def reference(ids, block_size, mask_token_id=MASK, **settings):
    """Logits [length, vocab_size] of one unpadded text: the network without blocks, told who may read whom."""
    length = len(ids)
    allowed = torch.tensor(
        [[key // block_size <= query // block_size for key in range(length)] for query in range(length)]
    )
    return plain(**settings)(ids[None], attention_mask=allowed[None, None]).logits[0, :, :mask_token_id]


def padded(ids, kept, length):
    """Row `ids` at the positions `kept` of a longer row, and where it is."""
    row, mask = torch.full((length,), 99), torch.zeros(length, dtype=torch.long)
    row[kept], mask[kept] = ids, 1
    return row, mask


def uneven_batch():
    """Three texts of 11, 9 and 6 tokens, padded on the left, inside and on the right, with their positions."""
    ids = text(3, 11, masked=0.4)
    kept = [list(range(11)), [0, 1, 4, 5, 6, 7, 8, 9, 10], list(range(6))]
    rows = [padded(ids[row, : len(where)], where, 11) for row, where in enumerate(kept)]
    left = padded(ids[0, :7], list(range(4, 11)), 11)
    rows, kept = [*rows, left], [*kept, list(range(4, 11))]
    return torch.stack([row for row, _ in rows]), torch.stack([mask for _, mask in rows]), kept


class TestReading:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("block_size", SIZES)
    def test_logits_are_those_of_the_plain_network_under_the_mask(self, block_size, implementation):
        model = tiny(block_size=block_size, attn_implementation=implementation)
        ids, mask, kept = uneven_batch()
        logits = model(ids, attention_mask=mask).logits
        for row, where in enumerate(kept):
            torch.testing.assert_close(
                logits[row, where, :MASK], reference(ids[row, where], block_size), rtol=1e-5, atol=1e-5
            )  # eager: softmax in float32

    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
    @torch.no_grad()
    @torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    def test_flex_attention_agrees(self, compiled):
        # PyTorch's CPU kernel of flex_attention (2.13) is wrong for some numbers of keys, and does not compile
        # for varying ones: hence 16 tokens, and a kernel for every shape.
        model, ids = tiny(torch.float32, block_size=4), text(2, 16, masked=0.4)
        mask, clean = torch.ones_like(ids), text(2, 16)
        mask[0, :3] = 0
        noised = NoisedText(
            torch.where(ids == MASK, MASK, clean).masked_fill(mask == 0, 0), torch.ones(2, 1), torch.ones(2, 1)
        )
        labels = clean.masked_fill(mask == 0, -100)
        results = []
        for implementation in ("sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            with torch.compiler.set_stance("default" if compiled else "force_eager"):
                logits = model(ids, attention_mask=mask).logits[mask.bool()][:, :MASK]
                asked = model(ids, attention_mask=mask, query_positions=torch.tensor([[7, 4], [3, 2]])).logits
                loss = model(clean, attention_mask=mask, labels=labels, noised=noised).loss
            results.append([logits, asked[..., :MASK], loss])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("block_size", [1, 3, 4])
    def test_a_token_changes_its_own_and_later_blocks_and_nothing_else(self, block_size):
        model, ids = tiny(block_size=block_size), text(1, 10)
        before = model(ids).logits[0, :, :MASK]
        for changed in range(10):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % MASK
            difference = (model(other).logits[0, :, :MASK] - before).abs().amax(-1)
            first = changed // block_size * block_size
            assert float(difference[:first].sum()) == 0.0
            assert bool((difference[first:] > 1e-6).all())

    def test_one_block_is_the_plain_model(self):
        ids, mask, _ = uneven_batch()
        one, plain = tiny(block_size=11)(ids, mask).logits, tiny()(ids, mask).logits
        torch.testing.assert_close(one[mask.bool()], plain[mask.bool()])

    def test_query_positions_are_rows_of_all_the_logits(self):
        model = tiny(block_size=3)
        ids, mask, kept = uneven_batch()
        queries = torch.tensor([[10, 0, 5, -1], [10, 4, -1, 1], [2, 2, 5, 3], [4, -1, -1, -1]])
        whole = model(ids, attention_mask=mask, output_hidden_states=True)
        asked = model(ids, attention_mask=mask, query_positions=queries, output_hidden_states=True)
        assert all(set(row[row >= 0].tolist()) <= set(where) for row, where in zip(queries, kept, strict=True))
        rows, columns = (queries >= 0).nonzero(as_tuple=True)
        torch.testing.assert_close(asked.logits[rows, columns], whole.logits[rows, queries[rows, columns]])
        for one, other in zip(asked.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(one[rows, columns], other[rows, queries[rows, columns]])

    def test_bfloat16_is_close(self):
        model, ids = tiny(block_size=3), text(2, 11, masked=0.4)
        exact = model(ids).logits[..., :MASK]
        rounded = model.to(torch.bfloat16)(ids).logits[..., :MASK]
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.double() - exact).square().mean().sqrt()) < 0.05 * float(exact.std())

    def test_it_comes_back_from_a_folder(self, tmp_path):
        model, ids = tiny(torch.float32, block_size=3), text(2, 11, masked=0.4)
        model.save_pretrained(tmp_path)
        again = MDLMForMaskedDiffusion.from_pretrained(tmp_path)
        assert again.config.block_size == 3
        assert torch.equal(again(ids).logits, model(ids).logits)

    def test_compiles_without_a_graph_break(self):
        model, ids = tiny(torch.float32, block_size=3), text(2, 9, masked=0.4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"block_size": 0}, "`block_size` must be at least 1"),
            ({"block_size": 4, "time_conditioning": True}, "`block_size` .4. does not go with `time_conditioning`"),
            ({"block_size": 4, "attend_to_padding": True}, "`block_size` .4. does not go with `attend_to_padding`"),
        ],
    )
    def test_settings_that_do_not_go_together_are_refused(self, settings, message):
        with pytest.raises(Exception, match=message):  # `@strict` wraps them in classes of its own
            MDLMConfig(**settings)

    def test_what_blocks_cannot_be_read_by_is_refused(self):
        model, ids = tiny(block_size=2), text(1, 4)
        with pytest.raises(ValueError, match="`attention_mask` of shape .1, 1, 4, 4. does not go with `block_size`"):
            model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="`query_positions` must hold positions 0..3"):
            model(ids, query_positions=torch.tensor([[4]]))
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="`attn_implementation`='flash_attention_2' cannot read by blocks"):
            model(ids)


def block_ranges(length, block_size):
    return [range(start, min(start + block_size, length)) for start in range(0, length, block_size)]


def log_prob(ids, canvas, position, block_size, **settings):
    """log p of token `position` of `ids` given what `canvas` shows, by the plain network."""
    logits = reference(canvas, block_size, settings["vocab_size"] - 1, **settings)
    return float(logits.log_softmax(-1)[position, ids[position]])


def log_probs_of_orders(ids, block, block_size, **settings):
    """log p of a block of `ids` given the text before it, in each order of its positions, one at a time."""
    results = []
    for order in itertools.permutations(block):
        canvas, total = ids.clone()[: block[-1] + 1], 0.0
        canvas[list(block)] = settings["vocab_size"] - 1
        for position in order:
            total += log_prob(ids, canvas, position, block_size, **settings)
            canvas[position] = ids[position]
        results.append(total)
    return results


def expected_loss(model, ids):
    """The mean over times and masks of the loss of `ids` [length], for alpha(t) = 1 - t.

    Of a block of n tokens, k given ones are masked and weigh 1/t with the probability density t^(k-1) (1-t)^(n-k); its
    integral is (k-1)! (n-k)! / n!. The loss adds up over blocks, so each can have its masks alone.
    """
    total = 0.0
    for block in block_ranges(len(ids), model.config.block_size):
        n = len(block)
        for k in range(1, n + 1):
            share = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
            for masked in itertools.combinations(block, k):
                noisy = ids.clone()
                noisy[list(masked)] = model.config.mask_token_id
                noised = NoisedText(noisy[None], torch.ones(1, 1), torch.ones(1, 1))
                total += share * float(model(ids[None], labels=ids[None], noised=noised).loss)
    return total


class TestObjective:
    @pytest.mark.parametrize("block_size", SIZES)
    def test_hidden_states_are_those_of_generation(self, block_size):
        """In training, a noisy block reads what it would in generation: the clean text before it, and itself."""
        model = tiny(block_size=block_size)
        _, mask, kept = uneven_batch()
        clean, noisy = text(4, 11).masked_fill(mask == 0, 0), text(4, 11, masked=0.5).masked_fill(mask == 0, 0)
        noisy = torch.where(noisy == MASK, MASK, clean)
        trained = model.model(noisy, mask, clean_ids=clean).last_hidden_state
        logits = model.lm_head(trained)[..., :MASK]
        for row, where in enumerate(kept):
            for block in block_ranges(len(where), block_size):
                read = torch.cat([clean[row, where][: block[0]], noisy[row, where][block[0] : block[-1] + 1]])
                expected = reference(read, block_size)[list(block)]
                torch.testing.assert_close(logits[row, [where[n] for n in block]], expected)

    @pytest.mark.parametrize("block_size", [1, 2, 3, 4])
    def test_its_mean_is_the_bound_by_enumeration(self, block_size):
        """In continuous time the bound is the mean over the orders of a block of the chain rule."""
        settings, ids = {"vocab_size": 5}, torch.tensor([0, 3, 1, 2])
        bound = 0.0
        for block in block_ranges(4, block_size):
            of_orders = log_probs_of_orders(ids, block, block_size, **settings)
            bound -= sum(of_orders) / len(of_orders)
        assert expected_loss(tiny(block_size=block_size, **settings), ids) == pytest.approx(bound / 4, rel=1e-9)

    def test_blocks_of_one_token_give_the_exact_negative_log_likelihood(self):
        """With one step from all masks, nothing is random; and one token leaves no order to average over."""
        settings = {"vocab_size": 12, "num_timesteps": 1, "noise_schedule": {"type": "loglinear", "epsilon": 0.0}}
        ids = text(2, 7)
        nll = 0.0
        for row in ids:
            for n in range(7):
                nll -= log_prob(row, torch.cat([row[:n], torch.tensor([MASK])]), n, 1, vocab_size=12)
        assert float(tiny(block_size=1, **settings)(ids, labels=ids).loss) == pytest.approx(nll / 14, rel=1e-9)

    def test_one_block_has_the_loss_and_the_gradients_of_the_plain_model(self):
        ids, results = text(3, 9), []
        noisy = torch.where(text(3, 9, masked=0.5) == MASK, MASK, ids)
        for settings in ({}, {"block_size": 9}):
            model = tiny(**settings)
            loss = model(ids, labels=ids, noised=NoisedText(noisy, torch.full((3, 1), 0.7), torch.ones(3, 1))).loss
            loss.backward()
            results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(*results)

    def test_the_bound_bounds_and_the_law_it_bounds_is_one(self):
        settings, total = {"vocab_size": 4}, 0.0
        model = tiny(block_size=2, **settings)
        gaps = []
        for tokens in itertools.product(range(3), repeat=3):
            ids, log_likelihood = torch.tensor(tokens), 0.0
            for block in block_ranges(3, 2):
                of_orders = torch.tensor(log_probs_of_orders(ids, block, 2, **settings), dtype=torch.float64)
                log_likelihood += float(of_orders.logsumexp(0)) - math.log(len(of_orders))
            gaps.append(3 * expected_loss(model, ids) + log_likelihood)
            total += math.exp(log_likelihood)
        assert total == pytest.approx(1, rel=1e-9)
        assert min(gaps) > -1e-9 and max(gaps) > 1e-2

    @pytest.mark.parametrize("settings", [{}, {"time_law": "importance"}, {"num_timesteps": 1000}], ids=str)
    def test_the_loss_that_is_drawn_has_that_mean(self, settings):
        model, ids = tiny(block_size=2, **settings).requires_grad_(False), torch.tensor([3, 8, 1, 5])
        expected = expected_loss(model, ids)
        rows = ids.expand(1000, 4)
        losses = torch.stack([model(rows, labels=rows).loss for _ in range(20)])
        standard_error = float(losses.std()) / math.sqrt(len(losses))
        assert standard_error < 0.03 * expected
        assert abs(float(losses.mean()) - expected) < 4 * standard_error + 2e-3 * expected

    def test_given_tokens_stay_visible_in_both_copies_and_do_not_count(self):
        model, ids = tiny(block_size=3, num_timesteps=1), text(2, 8)
        labels = ids.clone()
        labels[:, ::2] = -100
        read = []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
        loss = model(ids, labels=labels, generator=torch.Generator().manual_seed(1)).loss
        noisy, clean = read[0][:, :8], read[0][:, 8:]
        assert torch.equal(noisy[:, ::2], ids[:, ::2]) and torch.equal(clean, ids[:, :6])
        masked = noisy == MASK
        assert bool(masked[:, 1::2].any())
        nll = 0.0
        for row, position in masked.nonzero().tolist():
            start = position // 3 * 3
            canvas = torch.cat([ids[row, :start], noisy[row, start : start + 3]])
            nll -= log_prob(ids[row], canvas, position, 3, vocab_size=12)
        assert float(loss) == pytest.approx(nll / 8, rel=1e-6)

    def test_rows_end_as_early_as_nobody_reads_them(self):
        model, ids, rows = tiny(block_size=3), text(2, 8), []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1]))
        model(ids, labels=ids)
        # Two of the three blocks are read when clean; the last layer's own output is, of noisy rows only.
        assert rows == [8 + 6, 8 + 6, 8]

    def test_gradients_reach_every_parameter_with_and_without_checkpointing(self):
        gradients = []
        for checkpointing in (False, True):
            model, ids = tiny(block_size=3).train(), text(3, 9)
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(ids, labels=ids, generator=torch.Generator().manual_seed(4)).loss.backward()
            gradients.append([weight.grad for weight in model.parameters()])
        assert all(bool(gradient.any()) for gradient in gradients[0])
        torch.testing.assert_close(*gradients)

    def test_padding_has_no_effect_on_the_loss(self):
        model, ids = tiny(block_size=3), text(1, 8)
        noisy = torch.where(text(1, 8, masked=0.5) == MASK, MASK, ids)
        expected = model(ids, labels=ids, noised=NoisedText(noisy, torch.ones(1, 1), torch.ones(1, 1))).loss
        for kept in (list(range(3, 11)), list(range(8)), [0, 1, 3, 4, 5, 8, 9, 10]):
            (row, mask), (noisy_row, _) = padded(ids[0], kept, 11), padded(noisy[0], kept, 11)
            labels = row.masked_fill(mask == 0, -100)[None]
            noised = NoisedText(noisy_row[None], torch.ones(1, 11), torch.ones(1, 11))
            loss = model(row[None], mask[None], labels=labels, noised=noised).loss
            torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("shape", [(2,), (2, 4), (1, 8)])
    def test_weights_of_another_shape_are_refused(self, shape):
        ids = text(2, 8)
        with pytest.raises(ValueError, match="`noised.weight` must have shape .2, 8. or .2, 1."):
            tiny(block_size=3)(ids, labels=ids, noised=NoisedText(ids, torch.ones(shape), torch.ones(2, 1)))
