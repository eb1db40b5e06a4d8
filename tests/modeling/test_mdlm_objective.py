"""The objective of MDLM: the loss that `labels` give, against closed forms and what may be counted."""

import math

import pytest
import torch
from tiny_mdlm import text, tiny
from transformers import Trainer, TrainingArguments

from hf_diffusion import MDLMForMaskedDiffusion
from hf_diffusion.diffusion.masking import NoisedText


def noised(ids):
    return ids, torch.ones(2, 1), torch.ones(2, 1)


class TestObjective:
    def test_one_step_predicts_every_token_from_nothing(self):
        model, ids = tiny(num_timesteps=1, noise_schedule={"type": "loglinear", "epsilon": 0.0}), text(3, 7)
        log_probs = model(torch.full_like(ids, 11)).logits.log_softmax(-1)
        expected = -log_probs.gather(-1, ids[..., None]).mean()
        torch.testing.assert_close(model(ids, labels=ids).loss, expected)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"time_law": "importance"},
            {"noise_schedule": "cosine"},
            {"noise_schedule": "cosine_squared"},
            {"noise_schedule": "polynomial", "time_law": "importance"},
            {"noise_schedule": {"type": "linear", "sigma_min": 1e-5, "sigma_max": 12.0}, "time_law": "importance"},
            {"num_timesteps": 1000},
            {"low_discrepancy": False},
        ],
        ids=str,
    )
    def test_loss_is_the_mean_over_all_orders(self, settings):
        """In continuous time the bound is the mean over orders of the chain rule, whatever the schedule."""
        model, ids = tiny(torch.float32, **settings), torch.tensor([[3, 8]])

        def nll(position, known):
            canvas = torch.where(torch.arange(2) == position, 11, ids) if known else torch.full_like(ids, 11)
            return -float(model(canvas).logits.log_softmax(-1)[0, position, ids[0, position]])

        model.requires_grad_(False)
        first, second = nll(0, False) + nll(1, True), nll(1, False) + nll(0, True)
        expected = (first + second) / 2 / 2
        assert abs(nll(0, False) - nll(0, True)) > 0.1
        rows, draws = ids.expand(4000, 2), 20
        with torch.no_grad():
            losses = torch.stack([model(rows, labels=rows).loss for _ in range(draws)])
        standard_error = float(losses.std()) / math.sqrt(draws)
        assert standard_error < 0.02 * expected
        # 2e-3 for the ends of time that the published settings cut off.
        assert abs(float(losses.mean()) - expected) < 4 * standard_error + 2e-3 * expected

    def test_uniform_model_gives_the_logarithm_of_the_vocabulary(self):
        model = MDLMForMaskedDiffusion(tiny(noise_schedule={"type": "loglinear", "epsilon": 0.0}).config).eval()
        ids = text(1, 16).expand(20_000, 16)
        with torch.no_grad():
            loss = float(model(ids, labels=ids, generator=torch.Generator().manual_seed(3)).loss)
        assert loss == pytest.approx(math.log(11), rel=1e-2)

    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_discrete_time_is_finite_where_the_reference_is_not(self, time_conditioning):
        model = tiny(torch.float32, num_timesteps=100, time_conditioning=time_conditioning)
        ids = text(500, 8)
        model(ids, labels=ids).loss.backward()
        assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters())

    def test_given_tokens_stay_visible_and_do_not_count(self):
        model, ids = tiny(num_timesteps=1), text(2, 8)
        labels = ids.clone()
        labels[:, ::2] = -100
        read = []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
        loss = model(ids, labels=labels, generator=torch.Generator().manual_seed(1)).loss
        assert torch.equal(read[0][:, ::2], ids[:, ::2])
        masked = read[0] == 11
        assert bool(masked[:, 1::2].any())
        nll = -model(read[0]).logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        torch.testing.assert_close(loss, nll[masked].sum() / 8)

    def test_the_head_runs_at_masked_positions_only(self):
        model, ids = tiny().train(), text(4, 8)
        rows, read = [], []
        model.lm_head.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[:-1].numel()))
        model.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
        assert model(ids, labels=ids).logits is None
        assert sum(rows) == int((read[0] == 11).sum()) < 32

    def test_a_conditioned_model_is_told_the_noise_level_of_the_masks(self):
        model, ids = tiny(time_conditioning=True), text(3, 8)
        told = []
        model.model.noise_embedding.register_forward_pre_hook(lambda _, arguments: told.append(arguments[0]))
        model(ids, labels=ids, generator=torch.Generator().manual_seed(4))
        generator = torch.Generator().manual_seed(4)
        u = (torch.rand(3, generator=generator) / 3 + torch.arange(3) / 3) * 0.999 + 0.001
        torch.testing.assert_close(told[0], -torch.log(1 - 0.999 * u))

    def test_loss_in_chunks_has_the_same_value_and_gradient(self, monkeypatch):
        from hf_diffusion.modeling import loss

        gradients = []
        for max_logits in (loss.MAX_LOGITS, 5 * 12):
            monkeypatch.setattr(loss.chunked_cross_entropy, "__defaults__", (None, max_logits))
            model, ids = tiny(), text(3, 9)
            value = model(ids, labels=ids, generator=torch.Generator().manual_seed(4)).loss
            value.backward()
            gradients.append([value, *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)

    def test_gradient_checkpointing_changes_nothing(self):
        gradients = []
        for checkpointing in (False, True):
            model, ids = tiny().train(), text(3, 9)
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(ids, labels=ids, generator=torch.Generator().manual_seed(4)).loss.backward()
            gradients.append([weight.grad for weight in model.parameters()])
        assert all(bool(gradient.any()) for gradient in gradients[0])
        torch.testing.assert_close(*gradients)

    def test_compiled_training_has_the_same_loss_and_gradients(self):
        results = []
        for compiled in (False, True):
            model, ids = tiny().train(), text(3, 9)
            noised = NoisedText(text(3, 9, masked=0.5), torch.tensor([[1.0], [2.0], [torch.inf]]), torch.ones(3, 1))
            noised.input_ids[2] = ids[2]  # nothing is masked, so its weight must not count
            run = torch.compile(model, backend="aot_eager") if compiled else model
            loss = run(ids, labels=ids, noised=noised).loss
            loss.backward()
            results.append([loss.detach(), *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(*results)

    def test_num_items_in_batch_divides_the_sum(self):
        model, ids = tiny(), text(2, 9)
        losses = [
            model(ids, labels=ids, generator=torch.Generator().manual_seed(4), **arguments).loss
            for arguments in ({}, {"num_items_in_batch": 36})
        ]
        torch.testing.assert_close(losses[0], 2 * losses[1])

    @pytest.mark.parametrize(
        ("labels", "arguments", "message"),
        [
            (text(2, 7), {}, "`labels` must have the shape of `input_ids`"),
            (text(2, 8, masked=0.5), {}, "`labels` hold the mask token .11."),
            (text(2, 8) + 12, {}, "`labels` holds .* no token of the vocabulary"),
            (text(2, 8).double(), {}, "`labels` must hold token ids, integers"),
            (text(2, 8), {"attention_mask": torch.ones(2, 7)}, "`attention_mask` must have the shape of `input_ids`"),
            (text(2, 8), {"noised": (text(2, 8), torch.ones(2, 1))}, "`noised` must hold input_ids, weight, sigma"),
            (text(2, 8), {"noised": noised(text(2, 7))}, "`noised.input_ids` must have the shape"),
            (text(2, 8), {"noised": noised(text(2, 8).flip(1))}, "`noised.input_ids` holds .* where the text holds"),
            (
                text(2, 8),
                {"noised": noised(text(2, 8)), "generator": torch.Generator()},
                "`generator` has no effect with `noised`",
            ),
            (text(2, 8), {"t": 0.5}, "`t` does not go with `labels`"),
            (text(2, 8), {"query_positions": torch.tensor([[1], [2]])}, "`query_positions` does not go with `labels`"),
        ],
    )
    def test_wrong_labels_are_refused(self, labels, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny()(text(2, 8), labels=labels, **arguments)

    def test_padding_may_hold_anything(self):
        model, ids, mask = tiny(), text(2, 8), torch.ones(2, 8, dtype=torch.long)
        mask[0, 5:] = 0
        losses = []
        for filler in (3, 11, 99):
            padded = ids.masked_fill(mask == 0, filler)
            generator = torch.Generator().manual_seed(3)
            losses.append(model(padded, mask, labels=padded.int(), generator=generator).loss)
        assert losses[0] == losses[1] == losses[2]

    def test_trainer_lowers_the_loss(self, tmp_path):
        model, rows = tiny(torch.float32), text(1, 12).expand(64, 12)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.5 * before
