"""Weights in 8 and 4 bits by bitsandbytes, on the CPU, and LoRA on top of them."""

import pytest
import torch
from families import FAMILIES, NUM_TOKENS
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE


bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the extra `quantized`")

EIGHT_BITS = {"load_in_8bit": True}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
VERSE = "KING HENRY.\nOnce more unto the breach, dear friends, once more,\nOr close the wall up with our English dead."

both = pytest.mark.parametrize("bits", [EIGHT_BITS, FOUR_BITS], ids=["8-bit", "4-bit"])
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def text():
    return torch.randint(NUM_TOKENS, (2, 9), generator=torch.Generator().manual_seed(2))


def quantized(folder, bits):
    return AutoModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu")


@torch.no_grad()
@every_family
def test_a_model_in_four_bits_is_the_model_of_its_rounded_weights(family, tmp_path):
    plain = family.model()
    plain.save_pretrained(tmp_path)
    model = quantized(tmp_path, FOUR_BITS)
    rounded = set()
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.copy_(weight)
            rounded.add(name)
    assert any("layers" in name for name in rounded)
    assert not [name for name in rounded if "encoding" in name or "embedding" in name or "lm_head" in name]
    torch.testing.assert_close(model(text()).logits, plain(text()).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@both
@every_family
def test_a_model_is_saved_and_loaded_in_its_bits(family, bits, tmp_path):
    family.model(hidden_size=64).save_pretrained(tmp_path)  # a block of the 4-bit format
    model = quantized(tmp_path, bits)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModel.from_pretrained(tmp_path / "quantized")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    # The backend lays 4-bit weights out anew where it loads them, and sums in another order.
    torch.testing.assert_close(again(text()).logits, model(text()).logits, rtol=1e-2, atol=1e-2)


@both
@every_family
def test_adapters_learn_on_top_and_the_whole_generates(family, bits, tmp_path):
    family.model().save_pretrained(tmp_path)
    model = prepare_model_for_kbit_training(quantized(tmp_path, bits))
    model = get_peft_model(model, LoraConfig(r=4)).train()
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(15):
        loss = family.loss(model, text())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    written = model.eval().generate(input_ids=text(), max_new_tokens=4, **family.strategies[0])
    assert torch.equal(written[:, :9], text())
    assert int(written.max()) < NUM_TOKENS


@torch.no_grad()
@pytest.mark.parametrize(("bits", "most_lost"), [(EIGHT_BITS, 0.01), (FOUR_BITS, 0.1)], ids=["8-bit", "4-bit"])
def test_the_shipped_model_loses_little(bits, most_lost):
    ids = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)(VERSE, return_tensors="pt")["input_ids"]
    exact = AutoModel.from_pretrained(ARMD_SHAKESPEARE)(ids, labels=ids).loss
    loss = quantized(ARMD_SHAKESPEARE, bits)(ids, labels=ids).loss
    assert 0 < abs(float(loss - exact)) < most_lost


@torch.no_grad()
@every_family
def test_encodings_stay_in_float32_in_a_model_of_half_precision(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    in_float32 = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert in_float32 == {
        name for name, _ in model.named_parameters() if "_encoding." in name or "noise_embedding" in name
    }
    logits, expected = model(text()).logits, family.model()(text()).logits
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), expected, rtol=3e-2, atol=0.1)
