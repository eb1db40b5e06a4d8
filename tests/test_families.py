"""The suite that every family passes: what a user of transformers takes for granted."""

import copy

import pytest
import torch
from families import FAMILIES, NUM_TOKENS, VOCAB_SIZE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Trainer,
    TrainingArguments,
)

from hf_diffusion import AutoModelForMaskedDiffusion, DiffusionGenerationConfig


CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]
IDS = [f"{name}-{'-'.join(map(str, strategy.values()))}" for name, strategy in CASES]
DRAWN_ORDERS = ("ancestral", "first_hitting")
"""Strategies whose order is drawn, for every position of the batch by itself."""


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def text(batch, length):
    return torch.randint(NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(2))


def seeded():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.loss_is_drawn])
class TestExactLoss:
    def test_is_the_mean_of_the_logits_cross_entropy_in_nats(self, name):
        model, ids = FAMILIES[name].model(torch.float64), text(2, 9)
        chosen = model(ids).logits.log_softmax(-1).gather(-1, ids[..., None])
        torch.testing.assert_close(model(ids, labels=ids).loss, -chosen.mean())

    def test_labels_of_minus_100_do_not_count(self, name):
        model, ids = FAMILIES[name].model(torch.float64), text(2, 9)
        labels = ids.clone()
        labels[:, 4:] = -100
        expected = -model(ids).logits.log_softmax(-1).gather(-1, ids[..., None])[:, :4].mean()
        torch.testing.assert_close(model(ids, labels=labels).loss, expected)


class TestModel:
    def test_loss_is_in_nats_per_token(self, family):
        # A model whose logits are all alike gives every token log V; an estimate is that on average.
        model, ids = family.model(torch.float64), text(400, 9)
        model.lm_head.weight.data.zero_()
        if family.loss_is_drawn:
            model.lm_head.bias.data.zero_()
        num_predicted = model(ids[:1]).logits.isfinite().sum(-1).max().double()
        tolerance = 0.1 if family.loss_is_drawn else 1e-12
        assert float(family.loss(model, ids)) == pytest.approx(float(num_predicted.log()), rel=tolerance)

    def test_loss_in_chunks_has_the_same_value_and_gradient(self, family, monkeypatch):
        from hf_diffusion.modeling import loss

        gradients = []
        for max_logits in (loss.MAX_LOGITS, 5 * 23):
            monkeypatch.setattr(loss.chunked_cross_entropy, "__defaults__", (None, max_logits))
            model = family.model(torch.float64)
            value = family.loss(model, text(2, 9))
            value.backward()
            gradients.append([value, *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)

    def test_num_items_in_batch_divides_the_sum(self, family):
        model, ids = family.model(torch.float64), text(2, 9)
        mean = family.loss(model, ids)
        torch.testing.assert_close(family.loss(model, ids, num_items_in_batch=36), mean / 2)

    def test_labels_at_padding_do_not_count(self, family):
        model, ids = family.model(torch.float64), text(2, 9)
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        expected = family.loss(model, ids, ids.masked_fill(mask == 0, -100), attention_mask=mask)
        torch.testing.assert_close(family.loss(model, ids, attention_mask=mask), expected)

    def test_with_labels_the_logits_are_never_all_held(self, family):
        model, ids = family.model(), text(2, 9)
        assert model(ids, labels=ids).logits is None

    @pytest.mark.parametrize("label", [VOCAB_SIZE, -1])
    def test_labels_outside_the_vocabulary_are_refused(self, family, label):
        ids = text(2, 9)
        labels = ids.clone()
        labels[0, 3] = label
        with pytest.raises(ValueError, match=f"`labels` holds {label}, which is no token.*-100"):
            family.model()(ids, labels=labels)

    def test_every_parameter_is_trained(self, family):
        model = family.model().train()
        for inputs in family.loss_inputs:
            family.loss(model, text(2, 9), **inputs).backward()
        assert not [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]

    def test_gradient_checkpointing_changes_nothing(self, family):
        gradients = []
        for checkpointing in (False, True):
            model, ids = family.model(torch.float64).train(), text(2, 9)
            if checkpointing:
                model.gradient_checkpointing_enable()
            family.loss(model, ids).backward()
            gradients.append([weight.grad for weight in model.parameters()])
        torch.testing.assert_close(*gradients)

    @pytest.mark.slow
    def test_torch_compile_of_training_changes_nothing(self, family):
        model, ids = family.model(torch.float64, num_hidden_layers=2).train(), text(2, 9)
        expected = family.loss(model, ids)
        expected.backward()
        gradients = [weight.grad for weight in model.parameters()]
        model.zero_grad()
        loss = family.loss(torch.compile(model, backend="aot_eager"), ids)  # generating code is the business of PyTorch
        loss.backward()
        # Not to float64's own precision: rotary angles are float32, and rounded otherwise.
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            assert (weight.grad - gradient).norm() <= 1e-4 * gradient.norm()

    def test_bfloat16_is_close_to_float32(self, family):
        model, ids = family.model(), text(2, 9)
        exact = model(ids).logits[..., :NUM_TOKENS]
        rounded = copy.deepcopy(model).to(torch.bfloat16)(ids).logits[..., :NUM_TOKENS]
        assert rounded.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: half of a hundredth for each of the few roundings of four layers.
        assert (rounded.float() - exact).square().mean().sqrt() < 0.05 * exact.std()

    def test_attention_mask_of_ones_changes_nothing(self, family):
        model, ids = family.model(torch.float64), text(2, 9)
        torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)

    @pytest.mark.parametrize("side", ["left", "right", "inside"])
    def test_padding_changes_nothing(self, family, side):
        model, ids = family.model(torch.float64), text(1, 9)
        kept = {"left": range(3, 12), "right": range(9), "inside": [0, 1, 4, 5, 6, 7, 9, 10, 11]}[side]
        padded, mask = torch.full((2, 12), 7), torch.zeros(2, 12, dtype=torch.long)
        padded[0, list(kept)], mask[0, list(kept)] = ids[0], 1
        padded[1], mask[1] = text(1, 12)[0], 1
        logits = model(padded, attention_mask=mask).logits[0, list(kept)]
        torch.testing.assert_close(logits, model(ids).logits[0])

    @pytest.mark.parametrize("tied", [True, False])
    def test_embeddings_are_tied_as_the_config_says(self, family, tied):
        model = family.model(tie_word_embeddings=tied)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


class TestLoading:
    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForMaskedDiffusion])
    def test_saved_model_comes_back_bit_for_bit(self, family, auto_class, tmp_path):
        model, ids = family.model(), text(2, 9)
        model.generation_config = DiffusionGenerationConfig(strategy="strided", num_streams=2)
        model.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is family.model_class
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        # Matrix products may differ in their last digit with where in memory the weights lie.
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert type(loaded.generation_config) is DiffusionGenerationConfig
        assert (loaded.generation_config.strategy, loaded.generation_config.num_streams) == ("strided", 2)

    def test_what_loads_as_a_causal_language_model_writes_the_same_text(self, family, tmp_path):
        model, ids = family.model(), text(2, 9)
        model.generation_config.strategy = "autoregressive"
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        drawn = [one.generate(ids, max_new_tokens=5, do_sample=False) for one in (model, loaded)]
        assert torch.equal(*drawn)

    def test_config_comes_back(self, family, tmp_path):
        config = family.config(num_hidden_layers=3)
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_json_string() == config.to_json_string()

    def test_settings_of_generation_come_back(self, family, tmp_path):
        model = family.model()
        model.generation_config.eos_token_id = 3
        model.generation_config.strategy = "first_hitting"
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).generation_config
        assert (loaded.eos_token_id, loaded.strategy) == (3, "first_hitting")

    def test_a_setting_that_does_not_fit_is_refused_while_loading(self, family, tmp_path):
        family.model().save_pretrained(tmp_path)
        for name, value in family.wrong_settings:
            with pytest.raises(ValueError, match=name):
                family.config(**{name: value})
            with pytest.raises(ValueError, match=name):
                family.model_class.from_pretrained(tmp_path, **{name: value})

    def test_the_configuration_of_another_kind_of_model_is_refused(self, family):
        with pytest.raises(ValueError, match="`model_type` is 'bd3lm', not"):
            family.config_class.from_dict({**family.config().to_dict(), "model_type": "bd3lm"})

    def test_special_tokens_of_the_config_reach_generation(self, family):
        assert family.model(eos_token_id=3, pad_token_id=4).generation_config.eos_token_id == 3


@pytest.mark.parametrize(("name", "strategy"), CASES, ids=IDS)
class TestGenerate:
    def model(self, name, **overrides):
        return FAMILIES[name].model(torch.float64, **overrides)

    def test_given_tokens_stay_and_no_mask_is_left(self, name, strategy):
        model = self.model(name)
        prompt = text(3, 8)
        masked = torch.zeros(3, 8, dtype=torch.bool)
        masked[0, [1, 2, 3, 6]], masked[1, [0, 1, 4]], masked[2, 3:] = True, True, True
        prompt[masked] = model.config.mask_token_id
        output = model.generate(prompt, max_new_tokens=5, **strategy)
        assert output.shape == (3, 13)
        assert torch.equal(output[:, :8][~masked], prompt[~masked])
        assert not bool((output == model.config.mask_token_id).any())

    def test_same_seed_same_text_for_any_split_of_a_batch(self, name, strategy):
        model, prompt = self.model(name), text(4, 6)
        whole = model.generate(prompt, max_new_tokens=7, generator=seeded(), **strategy)
        generator = seeded()
        parts = [
            model.generate(part, max_new_tokens=7, generator=generator, **strategy) for part in prompt.split([1, 3])
        ]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, model.generate(prompt, max_new_tokens=7, **strategy))

    def test_gaps_in_a_text_that_is_given_to_its_end(self, name, strategy):
        model, prompt = self.model(name), text(3, 12)
        masked = torch.zeros(3, 12, dtype=torch.bool)
        masked[0, :7], masked[1, [0, 2, 5, 6, 9]], masked[2, 1:11] = True, True, True
        output = model.generate(prompt.masked_fill(masked, model.config.mask_token_id), **strategy)
        assert torch.equal(output[~masked], prompt[~masked])
        assert not bool((output == model.config.mask_token_id).any())

    def test_an_end_token_only_cuts_the_text(self, name, strategy):
        model, arguments = self.model(name), {"max_new_tokens": 10, "temperature": 10.0, **strategy}
        whole = model.generate(text(12, 3), generator=seeded(), **arguments)
        ended = model.generate(text(12, 3), generator=seeded(), eos_token_id=[5, 7, 9], pad_token_id=6, **arguments)
        is_end = torch.isin(whole[:, 3:], torch.tensor([5, 7, 9]))
        after_end = is_end.cumsum(1) - is_end.long() > 0
        assert bool(after_end.any())
        assert torch.equal(ended[:, 3:], whole[:, 3:].masked_fill(after_end, 6))

    def test_cache_changes_nothing(self, name, strategy):
        model, prompt = self.model(name), text(2, 6)
        mask = torch.ones_like(prompt)
        mask[0, :2] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 9, **strategy}
        with_cache = model.generate(prompt, generator=seeded(), **arguments)
        assert torch.equal(with_cache, model.generate(prompt, generator=seeded(), use_cache=False, **arguments))

    def test_greedy_takes_the_most_likely_token_of_every_position(self, name, strategy):
        model, prompt = self.model(name), text(2, 4)
        output = model.generate(prompt, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **strategy)
        logits = FAMILIES[name].logits_when_drawn(model, output.sequences, output.steps, 4)
        assert torch.equal(logits[:, 4:].argmax(-1), output.sequences[:, 4:])

    @pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
    def test_the_most_likely_token_alone_is_greedy(self, name, strategy, narrow):
        model, prompt = self.model(name), text(2, 4)
        greedy = model.generate(prompt, max_new_tokens=9, do_sample=False, generator=seeded(), **strategy)
        assert torch.equal(greedy, model.generate(prompt, max_new_tokens=9, generator=seeded(), **narrow, **strategy))

    def test_several_sequences_for_a_prompt(self, name, strategy):
        model, prompt = self.model(name), text(2, 4)
        output = model.generate(prompt, max_new_tokens=9, num_return_sequences=3, **strategy)
        assert torch.equal(output[:, :4], prompt.repeat_interleave(3, dim=0))
        assert not torch.equal(output[0], output[1])

    def test_nothing_follows_the_end_token(self, name, strategy):
        model, arguments = self.model(name, eos_token_id=5, pad_token_id=6), {"max_new_tokens": 12, "temperature": 10.0}
        output = model.generate(
            text(20, 3), attention_mask=torch.ones(20, 3), return_dict_in_generate=True, **arguments, **strategy
        )
        new, all_passes = output.sequences[:, 3:], []
        for row, tokens_per_forward in zip(new.tolist(), output.tokens_per_forward, strict=True):
            kept = row.index(5) + 1 if 5 in row else len(row)
            assert all(token == 6 for token in row[kept:])
            passes = kept / float(tokens_per_forward)
            assert passes == pytest.approx(round(passes), abs=1e-4)
            all_passes.append(round(passes))
        assert (new == 5).any()
        assert max(all_passes) == output.nfe

    def test_a_row_that_has_ended_takes_part_in_no_further_pass(self, name, strategy):
        model, sizes = self.model(name, eos_token_id=list(range(8))), []
        model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True)
        arguments = {"max_new_tokens": 12, "temperature": 10.0, "generator": seeded(), **strategy}
        sequences = model.generate(text(20, 3), **arguments)
        sizes_together, sizes[:] = list(sizes), []
        generator = arguments.pop("generator").manual_seed(3)
        alone = [model.generate(row, generator=generator, **arguments) for row in text(20, 3).split(1)]
        for row, own in zip(sequences, alone, strict=True):  # padding in all rows is no column
            assert torch.equal(row[: own.shape[1]], own[0])
        assert sum(sizes_together) == len(sizes) < 20 * len(sizes_together)

    def test_an_end_token_before_given_text_is_a_token_like_others(self, name, strategy):
        model = self.model(name, eos_token_id=5, pad_token_id=6)
        mask = model.config.mask_token_id
        prompt = torch.tensor([[1, mask, mask, mask, 7, mask, mask, mask, mask]]).repeat(40, 1)
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), temperature=10.0, **strategy)
        ended_early = (output[:, 1:4] == 5).any(1)
        assert bool(ended_early.any())
        last_gap = output[ended_early][:, 5:]
        assert not bool((last_gap == 6).all(1).any())

    def test_bfloat16(self, name, strategy):
        model = FAMILIES[name].model(torch.bfloat16)
        output = model.generate(text(2, 6), max_new_tokens=7, **strategy)
        assert bool(((output >= 0) & (output < VOCAB_SIZE)).all())

    def test_a_mask_token_of_the_vocabulary_is_never_drawn(self, name, strategy):
        model = self.model(name, mask_token_id=5)
        output = model.generate(
            torch.tensor([[1, 2, 3]]).repeat(20, 1), max_new_tokens=12, temperature=10.0, **strategy
        )
        assert not bool((output == 5).any())

    def test_text_from_nothing(self, name, strategy):
        assert self.model(name).generate(max_new_tokens=6, **strategy).shape == (1, 6)

    def test_full_text_is_left_as_it_is(self, name, strategy):
        model, prompt = self.model(name), text(2, 20)
        output = model.generate(prompt, max_length=20, return_dict_in_generate=True, **strategy)
        assert torch.equal(output.sequences, prompt)
        assert output.nfe == 0


def test_every_family_has_a_strategy_of_its_own(family):
    output = family.model().generate(text(2, 3), max_new_tokens=6)
    assert output.shape == (2, 9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [case for case in CASES if case[1].get("block_strategy", case[1]["strategy"]) not in DRAWN_ORDERS],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_padded_prompt_gives_the_text_of_the_prompt_alone(name, strategy, side):
    model, prompt = FAMILIES[name].model(torch.float64), text(1, 6)
    alone = model.generate(prompt, max_new_tokens=7, do_sample=False, **strategy)
    padding = (3, 0) if side == "left" else (0, 3)
    padded = torch.nn.functional.pad(prompt, padding, value=9)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), padding)
    batch, masks = torch.cat([padded, text(1, 9)]), torch.cat([mask, torch.ones(1, 9, dtype=torch.long)])
    output = model.generate(batch, attention_mask=masks, max_new_tokens=7, do_sample=False, **strategy)
    assert torch.equal(output[0, -7:], alone[0, -7:])


def test_trainer_lowers_the_loss(family, tmp_path):
    model, texts = family.model(), text(1, 12).expand(64, 12)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=20, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in texts],
    )
    before = family.loss(model, texts)
    trainer.train()
    assert family.loss(model, texts) < 0.5 * before
