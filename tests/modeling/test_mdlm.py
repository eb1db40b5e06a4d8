"""MDLM against the reference's numbers, and against what its definition says of texts, noise and padding."""

import json
import math

import pytest
import torch
from golden_mdlm import VARIANTS, load_golden
from safetensors.torch import load_file
from tiny_mdlm import text, tiny
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hf_diffusion import MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.diffusion.masking import NoisedText, draw_noised_text, subs_log_probs


@pytest.fixture(params=VARIANTS)
def golden(request, shared):
    return load_golden(shared, request.param)


def ours(published):
    """Our name of a published parameter; written out here so that the hook is checked against something else."""
    names = {
        "vocab_embed.embedding": "model.embed_tokens.weight",
        "sigma_map.mlp.0": "model.noise_embedding.in_proj",
        "sigma_map.mlp.2": "model.noise_embedding.out_proj",
        "output_layer.norm_final": "model.norm",
        "output_layer.adaLN_modulation": "model.final_shift_scale",
        "output_layer.linear": "lm_head",
    }
    parts = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn_out": "self_attn.o_proj"}
    parts |= {"mlp.0": "mlp.up_proj", "mlp.2": "mlp.down_proj", "adaLN_modulation": "modulation"}
    if published in names:
        return names[published]
    stem, _, kind = published.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{parts[part]}.{kind}"


class TestReference:
    @pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModel])
    def test_logits_of_the_published_folder(self, golden, auto_class):
        model = golden.model(auto_class)
        assert type(model) is MDLMForMaskedDiffusion
        output = model(golden["xt"], output_hidden_states=True, **golden.noise(model))
        tokens = torch.arange(model.config.vocab_size) != golden.mask_token_id
        assert (output.logits - golden["ema.logits"])[..., tokens].abs().max() < 2e-5
        assert bool((output.logits[..., golden.mask_token_id] == -torch.inf).all())
        for layer, states in enumerate(output.hidden_states[1:]):
            torch.testing.assert_close(states, golden[f"ema.hidden.{layer}"], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_logits_of_every_attention_implementation(self, golden, implementation):
        model = golden.model(attn_implementation=implementation)
        features = model.model(golden["xt"], **golden.noise(model)).last_hidden_state
        assert (model.lm_head(features) - golden["ema.logits"]).abs().max() < 2e-5

    def test_log_probs_after_subs(self, golden):
        model = golden.model()
        logits = model(golden["xt"], **golden.noise(model)).logits
        log_probs, expected = subs_log_probs(logits, golden["xt"], golden.mask_token_id), golden["ema.log_probs"]
        # The reference writes -1e6 where the probability is 0.
        assert torch.equal(log_probs == -torch.inf, expected < -1e5)
        possible = expected > -1e5
        torch.testing.assert_close(log_probs[possible], expected[possible], rtol=0, atol=2e-5)

    def test_loss_and_gradients_at_given_masks(self, golden):
        model = golden.model(attend_to_padding=True)
        noised = NoisedText(golden["xt"], 1 / golden["t"], golden["sigma"])
        loss = model(golden["x0"], golden["attention_mask"], labels=golden.labels(), noised=noised).loss
        torch.testing.assert_close(loss, golden["ema.fixed.loss"], rtol=1e-5, atol=0)
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        prefix = "ema.fixed.grad."
        published = [name.removeprefix(prefix) for name in golden.tensors if name.startswith(prefix)]
        assert len(gradients) == len(published) + 2 * model.config.num_hidden_layers  # q, k and v are one of theirs
        for name in published:
            if "attn_qkv" in name:
                layer = f"model.layers.{name.split('.')[1]}.self_attn."
                gradient = torch.cat([gradients[f"{layer}{part}_proj.weight"] for part in "qkv"])
            else:
                gradient = gradients[ours(name)]
            torch.testing.assert_close(gradient, golden[prefix + name], rtol=1e-4, atol=1e-5)

    def test_loss_from_the_seed(self, golden):
        model = golden.model(attend_to_padding=True)
        torch.manual_seed(31)
        loss = model(golden["x0"], golden["attention_mask"], labels=golden.labels()).loss
        torch.testing.assert_close(loss, golden["ema.seeded.loss"], rtol=1e-5, atol=0)

    def test_the_seed_gives_the_uniforms_of_the_reference(self, golden):
        config = golden.model().config
        everywhere = torch.ones_like(golden["x0"], dtype=torch.bool)
        torch.manual_seed(31)
        noised = draw_noised_text(
            golden["x0"], everywhere, config.make_schedule(), config.make_time_sampling(), golden.mask_token_id
        )
        probability = 1 - torch.exp(-noised.sigma)
        assert torch.equal(noised.input_ids == golden.mask_token_id, golden["seeded.rand.1"] < probability[:, None])

    def test_bfloat16_is_as_close_as_the_reference_in_bfloat16(self, golden):
        model = golden.model()
        tokens = torch.arange(model.config.vocab_size) != golden.mask_token_id
        exact, reference = golden["ema.logits"][..., tokens], golden["ema.logits_bf16"][..., tokens].float()
        noise = reference - exact
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(golden["xt"], **golden.noise(model)).logits[..., tokens].float()
        assert 0 < (mixed - exact).abs().max() < 1.5 * noise.abs().max()
        assert (mixed - exact).square().mean() < 1.5 * noise.square().mean()
        # The residual stream is rounded too here, which the reference does not do.
        rounded = model.to(torch.bfloat16)(golden["xt"], **golden.noise(model)).logits[..., tokens]
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).square().mean() < 4 * noise.square().mean()


class TestConfiguration:
    def test_published_names_are_aliases(self):
        config = MDLMConfig(hidden_dim=64, n_blocks=3, n_heads=4, model_length=77, cond_dim=9, dropout=0.3)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
        assert (config.max_position_embeddings, config.conditioning_size, config.residual_dropout) == (77, 9, 0.3)
        assert (config.hidden_dim, config.n_blocks, config.intermediate_size) == (64, 3, 256)
        assert not {"hidden_dim", "n_blocks", "n_heads", "model_length", "cond_dim", "dropout"} & set(config.to_dict())

    def test_published_config_is_cleaned(self, golden, tmp_path):
        config = AutoConfig.from_pretrained(golden.folder / "hf")
        assert type(config) is MDLMConfig
        assert config.return_dict is True
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert not {"auto_map", "return_dict", "hidden_dim", "n_blocks", "torch_dtype", "architectures"} & set(written)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.to_json_string(use_diff=False) == AutoConfig.from_pretrained(tmp_path).to_json_string(
            use_diff=False
        )
        assert again.hidden_size == 32

    def test_tuples_are_returned_to_who_asks_for_them(self):
        model = tiny()
        assert isinstance(model(text(1, 4), return_dict=False), tuple)
        model.config.return_dict = False
        assert isinstance(model(text(1, 4)), tuple)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"hidden_size": 30, "num_attention_heads": 4}, "`hidden_size` .30. must be an even multiple"),
            ({"mask_token_id": 50258}, "`mask_token_id` must lie in the vocabulary .0 to 50257., got 50258"),
            ({"eos_token_id": [1, -1]}, "`eos_token_id` must lie in the vocabulary"),
            ({"noise_schedule": "sigmoid"}, "`noise_schedule` must name one of"),
            ({"time_law": "gamma"}, "time_law"),
            ({"least_time": 2.0}, "`least_time` must be"),
            (
                {"time_conditioning": True, "noise_schedule": {"type": "loglinear", "epsilon": 0}},
                "`noise_schedule` .* has an infinite noise level at t = 1",
            ),
        ],
    )
    def test_wrong_settings_are_refused(self, settings, message):
        with pytest.raises(Exception, match=message):  # `@strict` wraps them in classes of its own
            MDLMConfig(**settings)


class TestWeights:
    def test_published_weights_are_saved_in_our_layout_and_come_back_bit_for_bit(self, golden, tmp_path):
        model = golden.model()
        model.save_pretrained(tmp_path)
        names = set(load_file(tmp_path / "model.safetensors"))
        assert names == set(model.state_dict())
        assert "model.layers.1.self_attn.k_proj.weight" in names
        assert not any("inv_freq" in name or "backbone" in name for name in names)
        again = AutoModelForMaskedLM.from_pretrained(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        noise = golden.noise(model)
        torch.testing.assert_close(again(golden["xt"], **noise).logits, model(golden["xt"], **noise).logits)

    def test_published_layout_on_request(self, golden, tmp_path):
        golden.model().save_pretrained(tmp_path, save_original_format=True)
        written, published = (load_file(folder / "model.safetensors") for folder in (tmp_path, golden.folder / "hf"))
        published.pop("backbone.rotary_emb.inv_freq")
        assert set(written) == set(published)
        assert all(torch.equal(written[name], published[name]) for name in written)

    def test_fresh_weights_come_back(self, tmp_path):
        model = MDLMForMaskedDiffusion(tiny().config)
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
        again = MDLMForMaskedDiffusion.from_pretrained(tmp_path)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )

    @pytest.mark.parametrize(
        ("width", "layers", "heads", "parameters"),
        [(512, 8, 8, 80_061_266), (768, 12, 12, 169_627_218), (1024, 24, 16, 424_477_010)],
    )
    def test_the_published_sizes_have_their_number_of_parameters(self, width, layers, heads, parameters):
        with torch.device("meta"):
            model = MDLMForMaskedDiffusion(MDLMConfig(hidden_dim=width, n_blocks=layers, n_heads=heads))
        assert model.num_parameters() == parameters

    def test_embeddings_are_tied_on_request(self):
        model = tiny(tie_word_embeddings=True)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert tiny().lm_head.weight is not tiny().get_input_embeddings().weight

    def test_a_fresh_model_finds_all_tokens_equally_likely(self):
        model = MDLMForMaskedDiffusion(tiny().config).eval()
        logits = model(text(2, 6, masked=0.5)).logits
        assert bool((logits[..., :11] == 0).all())
        assert model.model.embed_tokens.weight.std() > 0.1
        assert model.model.layers[0].mlp.up_proj.weight.std() > 0.1


class TestNoiseLevel:
    def test_t_and_sigma_that_belong_together_give_the_same(self):
        model, ids = tiny(time_conditioning=True), text(3, 8, masked=0.5)
        t = torch.tensor([0.1, 0.5, 0.9])
        sigma = -torch.log(1 - 0.999 * t.double())
        torch.testing.assert_close(model(ids, t=t).logits, model(ids, sigma=sigma).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(ids, t=t).logits[..., :11], model(ids, sigma=t).logits[..., :11], atol=1e-2)

    def test_t_is_read_by_the_schedule_of_the_config(self):
        ids = text(1, 8, masked=0.5)
        model = tiny(time_conditioning=True, noise_schedule={"type": "cosine", "epsilon": 0.1})
        expected = model(ids, sigma=-math.log(0.1 + 0.9 * math.cos(math.pi / 2 * 0.3))).logits
        torch.testing.assert_close(model(ids, t=0.3).logits, expected, rtol=1e-5, atol=1e-5)

    def test_each_row_has_its_own(self):
        model, ids = tiny(time_conditioning=True), text(3, 8, masked=0.5)
        sigma = torch.tensor([0.1, 1.0, 5.0])
        together = model(ids, sigma=sigma).logits
        alone = torch.cat([model(ids[row : row + 1], sigma=float(sigma[row])).logits for row in range(3)])
        torch.testing.assert_close(together, alone)

    def test_modulations_made_once_serve_every_pass(self):
        ids = text(2, 8, masked=0.5)
        model = tiny()
        torch.testing.assert_close(model(ids, modulations=model.model.modulations()).logits, model(ids).logits)
        model = tiny(time_conditioning=True)
        made = model.model.modulations(t=torch.tensor([0.2, 0.7]))
        torch.testing.assert_close(model(ids, modulations=made).logits, model(ids, t=torch.tensor([0.2, 0.7])).logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs either `sigma`.*neither"),
            ({"sigma": 1.0, "t": 0.5}, "needs either `sigma`.*both"),
            ({"t": 1.5}, "`t` must be a valid t, got .1.5.: a time runs from 0 to 1"),
            ({"sigma": -0.5}, "`sigma` must be a valid sigma"),
            ({"sigma": math.inf}, "`sigma` must be a valid sigma"),
            ({"sigma": torch.ones(3)}, "`sigma` must be one number or one for each of the 2 rows"),
        ],
    )
    def test_a_conditioned_model_refuses_what_is_no_noise_level(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny(time_conditioning=True)(text(2, 8), **arguments)

    @pytest.mark.parametrize("name", ["sigma", "t"])
    def test_an_unconditioned_model_refuses_a_noise_level(self, name):
        with pytest.raises(ValueError, match=f"`{name}`=0.5 has no effect"):
            tiny()(text(2, 8), **{name: 0.5})


class TestReading:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("side", ["left", "right", "inside"])
    def test_padding_changes_nothing(self, side, implementation):
        model, ids = tiny(attn_implementation=implementation), text(1, 9, masked=0.4)
        kept = {"left": range(3, 12), "right": range(9), "inside": [0, 1, 4, 5, 6, 7, 9, 10, 11]}[side]
        padded, mask = torch.full((2, 12), 99), torch.zeros(2, 12, dtype=torch.long)
        padded[0, list(kept)], mask[0, list(kept)] = ids[0], 1
        padded[1], mask[1] = text(1, 12)[0], 1
        logits = model(padded, attention_mask=mask).logits[0, list(kept)]
        torch.testing.assert_close(logits, model(ids).logits[0], rtol=1e-5, atol=1e-5)  # eager: softmax in float32

    def test_padding_is_read_as_the_reference_does_on_request(self):
        model, ids = tiny(attend_to_padding=True), text(2, 9, masked=0.4)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)
        model.config.attend_to_padding = False
        assert not torch.allclose(model(ids, attention_mask=mask).logits[0, :5], model(ids).logits[0, :5])

    def test_it_reads_both_sides(self):
        model, ids = tiny(), text(1, 9, masked=0.4)
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 11
        assert not torch.allclose(model(ids).logits[0, 0, :11], model(changed).logits[0, 0, :11])

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_query_positions_are_rows_of_all_the_logits(self, padded, implementation):
        model, ids = tiny(attn_implementation=implementation), text(2, 9, masked=0.4)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3] = 0
        query_positions = torch.tensor([[4, 8, -1, -1], [0, 3, 5, 7]])
        whole = model(ids, attention_mask=mask, output_hidden_states=True)
        asked = model(ids, attention_mask=mask, query_positions=query_positions, output_hidden_states=True)
        assert asked.logits.shape == (2, 4, 12)
        rows = torch.arange(2)[:, None].expand(2, 4)[query_positions >= 0]
        positions = query_positions[query_positions >= 0]
        asked_rows = query_positions >= 0
        torch.testing.assert_close(asked.logits[asked_rows], whole.logits[rows, positions])
        for one, other in zip(asked.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(one[asked_rows], other[rows, positions])

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_mask_of_ones_own_decides_who_reads_whom(self, implementation):
        model, ids = tiny(attn_implementation=implementation), text(2, 6, masked=0.4)
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        if implementation == "eager":
            mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~mask, -1e9)
        changed = ids.clone()
        changed[:, 4] = (changed[:, 4] + 1) % 11
        logits = model(ids, attention_mask=mask).logits
        different = (logits != model(changed, attention_mask=mask).logits).any(-1)
        assert not bool(different[:, :4].any()) and bool(different[:, 4:].all())
        asked = model(ids, attention_mask=mask, query_positions=torch.tensor([[5, 1], [0, 3]])).logits
        torch.testing.assert_close(asked, torch.stack([logits[0, [5, 1]], logits[1, [0, 3]]]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("ids", "arguments", "message"),
        [
            (torch.tensor([[1, 12]]), {}, "`input_ids` holds the token id 12, outside"),
            (torch.tensor([[1, -1]]), {}, "`input_ids` holds the token id -1, outside the vocabulary"),
            (torch.tensor([1, 2]), {}, "`input_ids` must be an integer tensor .batch, length."),
            (torch.rand(1, 2), {}, "`input_ids` must be an integer tensor"),
            (text(1, 33), {}, "text of 33 tokens, more than the model's context .*32"),
            (text(1, 4), {"attention_mask": torch.ones(1, 3)}, "`attention_mask` must have the shape of `input_ids`"),
            (
                text(2, 2),
                {"attention_mask": torch.tensor([[1, 1], [0, 0]])},
                "`attention_mask` has a row of zeros only",
            ),
            (text(1, 4), {"generator": torch.Generator()}, "`generator` has no effect without `labels`"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, ids, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny()(ids, **arguments)

    def test_compiles_without_a_graph_break(self):
        model, ids = tiny(torch.float32), text(2, 9, masked=0.4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
