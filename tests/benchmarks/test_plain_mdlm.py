"""What MDLM is timed against must be the reference's algorithm, and the same model."""

import pytest
import torch
from golden_mdlm import load_golden
from mdlm import LENGTH, check_agreement, expected_passes, plain_twin, random_model
from plain_mdlm import PlainMDLM
from safetensors.torch import load_file


@pytest.fixture(params=["subs", "subs_bertmask"])
def golden(request, shared):
    return load_golden(shared, request.param)


@pytest.fixture
def plain(golden):
    """The plain model with published weights."""
    plain = PlainMDLM(golden.model().config).eval()
    plain.load_published(load_file(golden.folder / "hf/model.safetensors"))
    return plain


class TestPlainMDLM:
    def test_log_probs_are_the_references(self, golden, plain):
        torch.testing.assert_close(plain(golden["xt"]), golden["ema.logits"], rtol=0, atol=2e-5)
        torch.testing.assert_close(plain.log_probs(golden["xt"]), golden["ema.log_probs"], rtol=0, atol=2e-5)

    def test_tokens_and_passes_are_the_references(self, golden, plain):
        torch.manual_seed(golden.seeds["samplers"])
        sample = plain.sample(*golden["sample.ddpm_cache.out"].shape, num_steps=24)
        assert torch.equal(sample.sequences, golden["sample.ddpm_cache.out"])
        assert sample.passes == golden["sample.ddpm_cache.nfe"]


class TestBenchmark:
    def test_both_sides_are_the_same_model(self):
        model = random_model("64x2")
        plain = plain_twin(model)
        check_agreement(model, plain)
        with torch.no_grad():
            plain.blocks[1].attn_out.weight *= 1.2
        with pytest.raises(RuntimeError, match="The two sides differ"):
            check_agreement(model, plain)

    @pytest.mark.parametrize(("batch_size", "num_steps"), [(1, 128), (1, 1000), (8, 128)])
    def test_expected_passes(self, batch_size, num_steps):
        passes = []
        for _ in range(300):
            revealed_in = torch.randint(num_steps, (batch_size * LENGTH,))
            changes = set(revealed_in.tolist()) - {num_steps - 1}  # what the last step changes, the final pass reads
            passes.append(1 + len(changes) + 1)
        counted = torch.tensor(passes, dtype=torch.float64)
        error = counted.std() / len(passes) ** 0.5
        assert abs(counted.mean() - expected_passes(batch_size, num_steps)) < 4 * error + 0.01
