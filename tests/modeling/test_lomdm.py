"""LoMDM: what its heads read, what they are trained by, and what is refused. Its bound: tests/evaluation."""

import copy

import pytest
import torch
from tiny_mdlm import text, tiny, tiny_lomdm

from hf_diffusion import LoMDMConfig, LoMDMForMaskedDiffusion, MDLMForMaskedDiffusion


MASK = 11


def padded(length=9):
    ids, mask = text(3, length, masked=0.4), torch.ones(3, length, dtype=torch.long)
    mask[1, :3], mask[2, -2:] = 0, 0
    return ids, mask


class TestExponents:
    @torch.no_grad()
    def test_a_fresh_model_has_no_order_and_is_an_mdlm(self):
        torch.manual_seed(0)
        config = LoMDMConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        fresh = LoMDMForMaskedDiffusion(config).eval()
        ids, mask = padded()
        output = fresh(ids, mask)
        assert torch.equal(output.exponents, torch.full_like(output.exponents, 0.7))
        assert torch.equal(fresh.forward_exponents(ids, mask), output.exponents)

    @torch.no_grad()
    def test_they_have_mean_c1_over_the_text_and_lie_in_their_range(self):
        ids, mask = padded()
        exponents = tiny_lomdm()(ids, mask).exponents
        means = (exponents * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(means, torch.full_like(means, 0.7))
        assert 0.05 < float(exponents[mask == 1].min()) < 0.6
        assert 0.8 < float(exponents[mask == 1].max()) < 1.35

    @torch.no_grad()
    def test_padding_has_no_part_in_them(self):
        model, (ids, mask) = tiny_lomdm(), padded()
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row, real][None])
            torch.testing.assert_close(model(ids, mask).exponents[row, real], alone.exponents[0])
            torch.testing.assert_close(
                model.forward_exponents(ids, mask)[row, real], model.forward_exponents(ids[row, real][None])[0]
            )

    @torch.no_grad()
    def test_they_depend_on_the_whole_text(self):
        model, ids = tiny_lomdm(), text(1, 8)
        for heads in (lambda ids: model(ids).exponents, model.forward_exponents):
            other = ids.clone()
            other[0, 6] = (other[0, 6] + 1) % 11
            assert float((heads(ids) - heads(other))[0, :6].abs().min()) > 1e-6

    @torch.no_grad()
    def test_queries_are_rows_of_the_whole_and_take_nothing_from_exponents(self):
        model, (ids, mask) = tiny_lomdm(), padded()
        queries, whole = torch.tensor([[0, 8], [4, -1], [1, 2]]), model(ids, mask)
        output = model(ids, mask, query_positions=queries)
        expected = torch.take_along_dim(whole.logits, queries.clamp(min=0)[..., None], 1)
        torch.testing.assert_close(output.logits[queries >= 0], expected[queries >= 0])
        torch.testing.assert_close(output.exponents, whole.exponents)
        without = model(ids, mask, query_positions=queries, output_exponents=False)
        assert without.exponents is None
        torch.testing.assert_close(without.logits[queries >= 0], expected[queries >= 0])

    @torch.no_grad()
    def test_they_stay_in_full_precision_under_autocast(self):
        model, ids = tiny_lomdm(torch.float32), text(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids)
        assert output.exponents.dtype == torch.float32
        torch.testing.assert_close(output.exponents.mean(1), torch.full((2,), 0.7))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_attention_implementations_agree(self, attention):
        model, (ids, mask) = tiny_lomdm(), padded()
        expected = model(ids, mask).exponents[mask == 1]
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids, mask).exponents[mask == 1], expected, rtol=1e-5, atol=0)


class TestGradients:
    def gradients(self, model, **inputs):
        model.train()
        model.zero_grad()
        generator = torch.Generator().manual_seed(3)
        ids = text(4, 8)
        model(ids, labels=ids, generator=generator, **inputs).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    def test_both_heads_and_the_backbone_learn(self):
        for name, gradient in self.gradients(tiny_lomdm()).items():
            assert gradient is not None and float(gradient.abs().max()) > 0, name

    def test_no_gradient_flows_from_a_head_into_the_backbone(self):
        """The backbone has the gradient of the token term alone, whose weights are exponents: constants to it."""
        model = tiny_lomdm()
        other = copy.deepcopy(model)
        torch.nn.init.normal_(other.reverse_scheduler.out_proj.weight)
        ours, theirs = self.gradients(model), self.gradients(other)
        for name, gradient in ours.items():
            if name.startswith(("model.", "lm_head.", "forward_scheduler.")) and "forward" not in name:
                torch.testing.assert_close(gradient, theirs[name], msg=name)
        assert not torch.equal(ours["reverse_scheduler.in_proj.weight"], theirs["reverse_scheduler.in_proj.weight"])

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_reaches_the_heads(self, use_reentrant):
        expected = self.gradients(tiny_lomdm())
        model = tiny_lomdm()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for name, gradient in self.gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    @pytest.mark.parametrize("estimator", ["uniform_time", "power_time", "mask_fraction", "jump_chain"])
    def test_all_is_finite_under_autocast_at_times_that_no_float_holds(self, estimator):
        model = tiny_lomdm(torch.float32, c2=0.6999, least_time=1e-12)
        with torch.autocast("cpu", torch.bfloat16):
            gradients = self.gradients(model, bound_estimator=estimator)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())

    def test_padding_and_given_tokens_have_no_part_in_the_loss(self):
        model, ids = tiny_lomdm().train(), text(2, 8)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        numbers, uniforms = torch.tensor([0.3, 0.6]), torch.rand(2, 2, 8)
        loss = model(ids, mask, labels=ids, uniforms=(numbers, uniforms)).loss
        other = ids.masked_fill(mask == 0, 4)
        assert torch.equal(model(other, mask, labels=other, uniforms=(numbers, uniforms)).loss, loss)
        given = ids.clone()
        given[:, :5] = -100
        logits = []
        model.lm_head.register_forward_hook(lambda *arguments: logits.append(arguments[2]))
        model(ids, labels=given, uniforms=(numbers, uniforms))
        assert sum(len(rows) for rows in logits) <= 2 * 2 * 3


class TestFromMDLM:
    @torch.no_grad()
    def test_predictions_and_law_are_those_of_the_mdlm(self, tmp_path):
        mdlm, ids = tiny(noise_schedule="cosine", time_law="importance"), text(2, 8, masked=0.5)
        mdlm.save_pretrained(tmp_path)
        for source in (mdlm, str(tmp_path)):
            lomdm = LoMDMForMaskedDiffusion.from_mdlm(source, c1=1.0, c2=0.9).to(torch.float64)
            assert lomdm.config.c2 == 0.9
            output = lomdm(ids)
            torch.testing.assert_close(output.logits, mdlm(ids).logits)
            assert torch.equal(output.exponents, torch.ones_like(output.exponents))

    def test_what_it_cannot_be_is_refused(self):
        with pytest.raises(ValueError, match="`time_conditioning`=True does not go with LoMDM"):
            LoMDMForMaskedDiffusion.from_mdlm(tiny(time_conditioning=True))
        with pytest.raises(ValueError, match="`block_size`=2 does not go with LoMDM"):
            LoMDMForMaskedDiffusion.from_mdlm(tiny(block_size=2))

    def test_settings_of_generation_and_attention_are_kept_and_shapes_are(self):
        mdlm = tiny(eos_token_id=4)
        mdlm.generation_config.top_k = 3
        mdlm.set_attn_implementation("eager")
        lomdm = LoMDMForMaskedDiffusion.from_mdlm(mdlm)
        assert (lomdm.generation_config.eos_token_id, lomdm.generation_config.top_k) == (4, 3)
        assert lomdm.config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="`hidden_size` .32. is what the MDLM has"):
            LoMDMForMaskedDiffusion.from_mdlm(mdlm, hidden_size=32)
        with pytest.raises(ValueError, match="`model` is a LoMDM already"):
            LoMDMForMaskedDiffusion.from_mdlm(lomdm)

    def test_it_is_saved_as_itself(self, tmp_path):
        lomdm = LoMDMForMaskedDiffusion.from_mdlm(tiny())
        lomdm.save_pretrained(tmp_path)
        loaded = LoMDMForMaskedDiffusion.from_pretrained(tmp_path)
        assert loaded.config.architectures == ["LoMDMForMaskedDiffusion"]
        for name, weight in lomdm.state_dict().items():
            assert torch.equal(loaded.state_dict()[name].to(weight.dtype), weight), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"c1": 0.5, "c2": 0.5},
            "`c2` .0.5. must be at least 0 and less than `c1` .0.5.: the exponent .* goes down to",
        ),
        ({"c2": -0.1}, "`c2` .-0.1. must be at least 0"),
        ({"bound_estimator": "elbo"}, "bound_estimator"),
        ({"least_time": 0.0}, "`least_time` must be more than 0"),
        ({"noise_schedule": "cosine"}, "`noise_schedule`=.* does not go with LoMDM: the schedule is learned"),
        ({"attend_to_padding": True}, "`attend_to_padding`=True does not go with LoMDM"),
    ],
)
def test_impossible_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoMDMConfig(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": torch.Generator()}, "`generator` has no effect without `labels`"),
        ({"labels": text(2, 8), "query_positions": torch.tensor([[0], [0]])}, "`query_positions` does not go with"),
        ({"use_cache": True}, "`past_key_values` and `use_cache` leave positions out"),
        ({"attention_mask": torch.zeros(2, 1, 8, 8)}, "does not say which positions are text"),
        ({"labels": text(2, 8, masked=0.5)}, "`labels` hold the mask token"),
        ({"labels": text(2, 8), "bound_estimator": "elbo"}, "must be one of"),
        ({"labels": text(2, 8), "output_hidden_states": True}, "`output_hidden_states` does not go with `labels`"),
        ({"labels": text(2, 8), "uniforms": (torch.ones(2), torch.rand(1, 2, 8))}, "`uniforms` must lie in .0, 1."),
        ({"labels": text(2, 8), "uniforms": (torch.rand(2), torch.rand(2, 8))}, "`uniforms` must have shapes"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_lomdm()(text(2, 8), **arguments)


def test_it_is_no_mdlm_to_the_auto_classes():
    assert issubclass(LoMDMForMaskedDiffusion, MDLMForMaskedDiffusion)
    assert LoMDMConfig.model_type == "lomdm"
