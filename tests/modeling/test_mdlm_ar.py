"""The autoregressive baseline: an ordinary causal model, to transformers and against the reference's numbers."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM
from hf_diffusion.conversion.mdlm import load_mdlm_checkpoint


@pytest.fixture
def golden(shared):
    return shared / "golden/mdlm/ar"


@pytest.fixture
def model():
    config = MDLMARConfig(
        vocab_size=12, hidden_dim=16, n_blocks=2, n_heads=2, model_length=32, dropout=0.0, eos_token_id=None
    )
    model = MDLMARForCausalLM(config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.5)
    return model.double().eval()


@pytest.mark.parametrize(("weights", "use_ema"), [("ema", True), ("raw", False)])
def test_reference_numbers(golden, weights, use_ema):
    expected = load_file(golden / "golden.safetensors")
    model = load_mdlm_checkpoint(golden / "ref.ckpt", use_ema=use_ema).model
    ids, mask = expected["x0"], expected["attention_mask"]
    log_probs = model(ids).logits.log_softmax(-1)
    assert (log_probs - expected[f"{weights}.log_probs"])[..., :31].abs().max() < 2e-5
    assert bool((log_probs[..., 31] == -torch.inf).all())
    nll = -log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(nll * mask[:, 1:], expected[f"{weights}.fixed.nlls"], rtol=1e-5, atol=1e-5)
    loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(loss, expected[f"{weights}.fixed.loss"], rtol=1e-5, atol=0)


def test_gradients_of_the_reference(golden):
    expected = load_file(golden / "golden.safetensors")
    model = load_mdlm_checkpoint(golden / "ref.ckpt").model
    labels = expected["x0"].masked_fill(expected["attention_mask"] == 0, -100)
    model(expected["x0"], labels=labels).loss.backward()
    for published, parameter in {
        "vocab_embed.embedding": model.model.embed_tokens.weight,
        "blocks.1.attn_out.weight": model.model.layers[1].self_attn.o_proj.weight,
        "blocks.0.mlp.0.bias": model.model.layers[0].mlp.up_proj.bias,
        "blocks.0.norm2.weight": model.model.layers[0].post_attention_layernorm.weight,
        "output_layer.norm_final.weight": model.model.norm.weight,
        "output_layer.linear.bias": model.lm_head.bias,
    }.items():
        torch.testing.assert_close(parameter.grad, expected[f"ema.fixed.grad.{published}"], rtol=1e-4, atol=1e-5)


def test_text_of_the_reference_from_its_noise(golden):
    """The reference adds Gumbel noise to the log-probabilities and takes the greatest; its first token is given."""
    expected = load_file(golden / "golden.safetensors")
    model = load_mdlm_checkpoint(golden / "ref.ckpt").model
    text, noise = expected["sample.ar.out"], expected["sample.ar.gumbel"]
    scores = model(text).logits[:, :-1].log_softmax(-1) + noise
    assert torch.equal(scores.argmax(-1), text[:, 1:])


def test_the_auto_classes_lead_to_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = torch.randint(11, (2, 6))
    for auto_class in (AutoModelForCausalLM, AutoModel):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is MDLMARForCausalLM
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_generate_is_that_of_transformers_with_its_cache(model):
    prompt = torch.randint(11, (2, 5))
    output = model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert torch.equal(output, model.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=False))
    assert torch.equal(model(output).logits[:, 4:-1].argmax(-1), output[:, 5:])
    assert model.generate(prompt, max_new_tokens=9, num_beams=3, do_sample=False).shape == (2, 14)


def test_left_padding_changes_nothing(model):
    ids = torch.randint(11, (1, 5))
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.tensor([[0] * 3 + [1] * 5])
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(output[:, 3:], alone)


def test_it_reads_the_past_only(model):
    ids = torch.randint(11, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    different = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert not bool(different[:5].any()) and bool(different[5:].all())


def test_a_text_in_two_shards_has_the_loss_of_the_whole(model):
    ids = torch.randint(11, (2, 9))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    whole = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=torch.zeros_like(ids), shift_labels=targets).loss, whole)
    first = model(ids[:, :4], shift_labels=targets[:, :4], num_items_in_batch=16).loss
    second = -model(ids).logits.log_softmax(-1)[:, 4:8].gather(-1, targets[:, 4:8, None]).sum() / 16
    torch.testing.assert_close(first + second, whole)
