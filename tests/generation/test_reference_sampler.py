"""The reference's own tokens from its own random numbers, and what is known of their law."""

import pytest
import torch
from golden_mdlm import VARIANTS, load_golden
from scipy import stats
from tiny_mdlm import text, tiny

from hf_diffusion.diffusion.schedules import Cosine, Linear, LogLinear
from hf_diffusion.generation.reference_sampler import (
    exponential_race,
    sample_as_reference,
    sample_windows_as_reference,
)


@pytest.fixture(params=VARIANTS)
def golden(request, shared):
    return load_golden(shared, request.param)


def network(golden):
    """What the samplers need to know of a model."""
    model = golden.model()
    conditioned = model.config.time_conditioning
    return {
        "predict": lambda input_ids, sigma: model(input_ids, sigma=sigma if conditioned else None).logits,
        "mask_token_id": golden.mask_token_id,
        "schedule": model.config.make_schedule(),
        "time_conditioning": conditioned,
    }


LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
MASK = 4


def toy(**changes):
    """A network that predicts the same everywhere, and a schedule."""
    settings = {
        "predict": lambda input_ids, sigma: LOGITS.expand(*input_ids.shape, -1),
        "sampler": "ddpm",
        "num_steps": 4,
        "mask_token_id": MASK,
        "schedule": LogLinear(),
        "time_conditioning": False,
    }
    return {**settings, **changes}


def toy_windows(**changes):
    settings = {key: value for key, value in toy().items() if key != "sampler"}
    return {**settings, "stride": 2, "num_strides": 2, **changes}


def masks(*shape):
    return torch.full(shape, MASK)


class TestReference:
    @pytest.mark.parametrize("noise_removal", [True, False])
    @pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache", "analytic"])
    def test_samples(self, golden, sampler, noise_removal):
        name = f"sample.{sampler}" if noise_removal else f"sample.{sampler}.no_removal"
        trajectory = []
        tokens, nfe = sample_as_reference(
            input_ids=torch.full((4, 16), golden.mask_token_id),
            sampler=sampler,
            num_steps=24,
            noise_removal=noise_removal,
            generator=torch.Generator().manual_seed(golden.seeds["samplers"]),
            on_step=trajectory.append,
            **network(golden),
        )
        assert torch.equal(torch.stack(trajectory), golden[f"sample.{sampler}.traj"])
        assert torch.equal(tokens, golden[f"{name}.out"])
        assert nfe == golden[f"{name}.nfe"]

    def test_many_steps_with_their_predictions_kept(self, golden):
        torch.manual_seed(golden.seeds["samplers"] + 1)
        tokens, nfe = sample_as_reference(
            input_ids=torch.full((4, 16), golden.mask_token_id), sampler="ddpm_cache", num_steps=200, **network(golden)
        )
        assert torch.equal(tokens, golden["sample.ddpm_cache.200.out"])
        assert nfe == golden["sample.ddpm_cache.200.nfe"]

    @pytest.mark.parametrize(("stride", "num_strides"), [(4, 2), (8, 1)])
    def test_windows(self, golden, stride, num_strides):
        torch.manual_seed(golden.seeds["semi_ar"])
        tokens, nfe = sample_windows_as_reference(
            input_ids=torch.full((3, 16), golden.mask_token_id),
            stride=stride,
            num_strides=num_strides,
            num_steps=16,
            **network(golden),
        )
        assert torch.equal(tokens, golden[f"semi_ar.{stride}x{num_strides}.ids"])
        assert nfe == golden[f"semi_ar.{stride}x{num_strides}.nfe"]

    @pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache", "analytic"])
    def test_samples_of_generate(self, golden, sampler):
        output = golden.model().generate(
            torch.full((4, 16), golden.mask_token_id),
            reference_sampler=sampler,
            strategy="ancestral",
            max_denoising_steps=24,
            eos_token_id=None,
            generator=torch.Generator().manual_seed(golden.seeds["samplers"]),
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, golden[f"sample.{sampler}.out"])
        assert output.nfe == golden[f"sample.{sampler}.nfe"]

    @pytest.mark.parametrize(("stride", "num_strides"), [(4, 2), (8, 1)])
    def test_windows_of_generate(self, golden, stride, num_strides):
        torch.manual_seed(golden.seeds["semi_ar"])
        sequences = golden.model().generate(
            torch.full((3, 0), golden.mask_token_id),
            reference_sampler="ddpm_cache",
            strategy="semi_autoregressive",
            block_strategy="ancestral",
            block_length=stride,
            sliding_window=True,
            max_denoising_steps=16,
            max_length=16 + stride * num_strides,
            eos_token_id=None,
        )
        assert torch.equal(sequences, golden[f"semi_ar.{stride}x{num_strides}.ids"])

    def test_race(self, golden):
        assert torch.equal(exponential_race(golden["cat.probs"], golden["cat.uniform"]), golden["cat.sample"])


class TestSteps:
    @pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Linear(sigma_min=0.5, sigma_max=5.0)])
    @pytest.mark.parametrize("sampler", ["ddpm", "analytic"])
    def test_masks_are_lifted_as_the_schedule_says(self, sampler, schedule):
        trajectory = []
        sample_as_reference(
            input_ids=masks(100, 1000),
            **toy(sampler=sampler, schedule=schedule, noise_removal=False, on_step=trajectory.append),
        )
        still_masked = [int((tokens == MASK).sum()) for tokens in trajectory]
        times = torch.linspace(1, 1e-5, 5, dtype=torch.float64)
        probability = schedule.mask_probability(times) / schedule.mask_probability(times[0])
        for step, (count, before) in enumerate(zip(still_masked, [100_000, *still_masked], strict=False)):
            kept = float(probability[step + 1] / probability[step])
            assert stats.binomtest(count, before, kept).pvalue > 1e-4
        drawn = torch.bincount(trajectory[-1][trajectory[-1] != MASK], minlength=MASK).double()
        assert stats.chisquare(drawn, LOGITS[:MASK].double().softmax(-1) * drawn.sum()).pvalue > 1e-4

    @pytest.mark.parametrize("sampler", ["ddpm", "analytic"])
    def test_noise_removal_fills_what_is_left(self, sampler):
        # At the end of this schedule 39 % of the tokens are still masked.
        settings = toy(sampler=sampler, schedule=Linear(sigma_min=0.5, sigma_max=5.0))
        torch.manual_seed(1)
        before, _ = sample_as_reference(input_ids=masks(100, 1000), noise_removal=False, **settings)
        torch.manual_seed(1)
        after, nfe = sample_as_reference(input_ids=masks(100, 1000), **settings)
        left = before == MASK
        assert nfe == 5
        assert torch.equal(after[~left], before[~left])
        filled = torch.bincount(after[left], minlength=MASK)
        if sampler == "ddpm":
            assert filled.tolist() == [0, 0, 0, int(left.sum())]
        else:
            expected = LOGITS[:MASK].double().softmax(-1) * filled.sum()
            assert stats.chisquare(filled.double(), expected).pvalue > 1e-4

    @pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache", "analytic"])
    def test_given_tokens_stay(self, sampler):
        text = torch.tensor([[MASK, 2, MASK, 0, 0], [1, 2, 3, MASK, 0]])
        tokens, _ = sample_as_reference(input_ids=text, **toy(sampler=sampler))
        assert torch.equal(tokens[text != MASK], text[text != MASK])
        assert bool((tokens != MASK).all())

    def test_a_window_begins_as_the_last_one_ended(self):
        windows = []

        def predict(input_ids, sigma):
            windows.append(input_ids)
            return LOGITS.expand(*input_ids.shape, -1)

        tokens, nfe = sample_windows_as_reference(
            input_ids=torch.tensor([[MASK, 3, MASK, 2, MASK]]), **toy_windows(predict=predict)
        )
        assert tokens.shape == (1, 9)
        assert tokens[0, [1, 3]].tolist() == [3, 2]
        starts = [window for window in windows if bool((window[0, -2:] == MASK).all())]
        for position in (2, 4):
            expected = torch.cat([tokens[:, position : position + 3], masks(1, 2)], dim=1)
            assert any(torch.equal(window, expected) for window in starts)
        assert nfe == len(windows)

    @pytest.mark.parametrize(("num_steps", "nfe"), [(92, 94), (93, 94), (94, 96)])
    def test_the_steps_of_a_window_are_counted_as_by_the_reference(self, num_steps, nfe):
        # In floating point, 1 / (1 / 93) is below 93. One step at time 0 and the removal of noise are added.
        settings = toy_windows(num_steps=num_steps, num_strides=0, time_conditioning=True)
        assert sample_windows_as_reference(input_ids=masks(1, 4), **settings)[1] == nfe

    def test_neighbours_in_a_huge_vocabulary_are_the_same_to_the_reference(self):
        mask = 150_000
        only = torch.full((mask + 1,), -torch.inf).index_fill(0, torch.tensor(mask - 1), 0.0)
        settings = toy(
            sampler="ddpm_cache",
            predict=lambda input_ids, sigma: only.expand(*input_ids.shape, -1),
            mask_token_id=mask,
            noise_removal=False,
        )
        tokens, nfe = sample_as_reference(input_ids=torch.full((1, 6), mask), **settings)
        assert tokens.tolist() == [[mask - 1] * 6]
        assert nfe == 1

    def test_sigma_is_one_of_each_row(self):
        seen = []

        def predict(input_ids, sigma):
            seen.append(sigma)
            return LOGITS.expand(*input_ids.shape, -1)

        sample_as_reference(input_ids=masks(3, 2), **toy(predict=predict, num_steps=2, time_conditioning=True))
        times = torch.tensor([1, 0.500005, 1e-5], dtype=torch.float64)
        expected = -torch.log(1 - 0.999 * times)[:, None].expand(-1, 3)
        # At time 1 the 1e-3 that is left of alpha has lost three digits in float32.
        torch.testing.assert_close(torch.stack(seen).double(), expected, rtol=1e-5, atol=0)


class TestLaw:
    """How many masks the race lifts in the first of 1000 steps over 50,257 tokens, in parts of what it should.

    A token has a chance only if its uniform is within 24 times its weight of 1, since the mask arrives before time 24.
    Those uniforms are so few that a hundred million positions can be drawn; all others are left out. What is expected
    was found by quadrature over the uniform of the mask.
    """

    VOCABULARY, POSITIONS, SHORT = 50_257, 100_000_000, 1e-3

    def lifted(self, probabilities, dtype):
        weights = probabilities.double() * self.SHORT
        cells = (24 * weights * 2**24).ceil() + 1  # whole numbers of the 2^24 values that a float32 uniform has
        generator = torch.Generator().manual_seed(3)
        counts = torch.binomial(
            torch.full_like(cells, self.POSITIONS, dtype=torch.float64), cells / 2**24, generator=generator
        ).long()
        token = torch.repeat_interleave(torch.arange(len(weights)), counts)
        position = torch.randint(self.POSITIONS, token.shape, generator=generator)
        _, index = position.unique(return_inverse=True)
        token_uniforms = 1 - cells[token] / 2**24 * (
            1 - torch.rand(token.shape, dtype=torch.float64, generator=generator)
        )
        mask_uniforms = torch.rand(int(index.max()) + 1, dtype=torch.float64, generator=generator)
        uniforms = torch.stack([token_uniforms, mask_uniforms[index]], dim=-1)
        if dtype == torch.float32:
            uniforms = (uniforms * 2**24).floor() / 2**24
        entries = torch.stack([weights[token], torch.full_like(token_uniforms, 1 - self.SHORT)], dim=-1)
        wins = exponential_race(entries.to(dtype), uniforms.to(dtype)) == 0
        return index[wins].unique().numel() / (self.POSITIONS * self.SHORT)

    @pytest.mark.parametrize(("law", "ratio"), [("flat", 0.158), ("Zipf", 0.690)])
    def test_float32_lifts_too_few_masks(self, law, ratio):
        rank = torch.arange(1, self.VOCABULARY + 1)
        probabilities = torch.ones(self.VOCABULARY) if law == "flat" else 1 / rank
        probabilities = probabilities / probabilities.sum()
        assert self.lifted(probabilities, torch.float32) == pytest.approx(ratio, abs=0.004)
        assert self.lifted(probabilities, torch.float64) == pytest.approx(1, abs=0.01)

    def test_float32_uniforms_of_torch_are_multiples(self):
        draws = torch.rand(1_000_000).double() * 2**24
        assert torch.equal(draws, draws.round())


class TestArguments:
    WINDOWS = {"strategy": "semi_autoregressive", "block_length": 2, "sliding_window": True, "max_denoising_steps": 2}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"attention_mask": torch.tensor([[0, 1, 1]])}, "`attention_mask` marks padding"),
            ({"suppress_tokens": [1]}, "`suppress_tokens`=.1.: the reference sampler has nothing of the kind"),
            ({"block_size": 4}, "`reference_sampler`='ddpm' is MDLM's, which reads text in both directions"),
            ({"temperature": 0.5}, "`temperature`=0.5: the reference sampler has nothing of the kind"),
            ({"eos_token_id": 3}, "`eos_token_id`=3: the reference sampler has nothing of the kind"),
            ({"streamer": object()}, "`streamer`: the reference sampler has nothing of the kind"),
            ({"remasking": "cap", "remasking_strength": 0.5}, "`remasking`='cap': the reference sampler has nothing"),
            ({"reference_sampler": "ancestral"}, "`reference_sampler` must be one of"),
            ({"strategy": "first_hitting", "max_denoising_steps": None}, "`reference_sampler`='ddpm' has no effect"),
            ({**WINDOWS, "block_strategy": "ancestral"}, 'In blocks the reference has .*"ddpm_cache"'),
            ({**WINDOWS, "block_strategy": "ancestral", "reference_sampler": "ddpm_cache"}, "reference draws windows"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_settings_of_generate_that_the_reference_lacks_are_refused(self, changes, message):
        model = tiny(block_size=changes.get("block_size"))
        changes = {name: value for name, value in changes.items() if name != "block_size"}
        if model.config.block_size is not None:
            changes.update(strategy="semi_autoregressive", block_strategy="ancestral")
        model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made before the error"))
        arguments = {"strategy": "ancestral", "max_denoising_steps": 2, "reference_sampler": "ddpm", **changes}
        with pytest.raises(ValueError, match=message):
            model.generate(text(1, 3), max_new_tokens=5, **arguments)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sampler": "ancestral"}, "`sampler` must be one of ddpm, ddpm_cache, analytic; got 'ancestral'"),
            ({"num_steps": 0}, "`num_steps` must be at least 1, got 0"),
            ({"mask_token_id": -1}, "`mask_token_id` must be a token id, at least 0; got -1"),
            ({"sampler": "ddpm_cache", "schedule": Cosine()}, "`schedule` must be loglinear here.*got 'cosine'"),
            ({"schedule": LogLinear(epsilon=0.0)}, "`schedule` must have a finite noise level at time 1"),
            ({"input_ids": masks(3)}, r"`input_ids` must be a long tensor .batch, length., got torch.int64 .3."),
            ({"input_ids": masks(1, 3).float()}, "`input_ids` must be a long tensor .* got torch.float32"),
        ],
    )
    def test_wrong_values_are_refused_before_any_pass(self, changes, message):
        settings = toy(input_ids=masks(1, 3), predict=None)
        with pytest.raises(ValueError, match=message):
            sample_as_reference(**{**settings, **changes})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"stride": 0}, "`stride` must be from 1 to the length of `input_ids` .3., got 0"),
            ({"stride": 4}, "`stride` must be from 1 to the length of `input_ids` .3., got 4"),
            ({"num_strides": -1}, "`num_strides` must be at least 0, got -1"),
            ({"num_steps": 0}, "`num_steps` must be at least 1, got 0"),
            ({"schedule": Cosine()}, "`schedule` must be loglinear here.*got 'cosine'"),
        ],
    )
    def test_wrong_windows_are_refused_before_any_pass(self, changes, message):
        settings = toy_windows(input_ids=masks(1, 3), predict=None)
        with pytest.raises(ValueError, match=message):
            sample_windows_as_reference(**{**settings, **changes})
