"""Packed linear layers compute what the ordinary ones do."""

import copy

import torch
from families import FAMILIES

from hf_diffusion.modeling.packed_linear import PackedLinear, pack_linear_layers, unpack_linear_layers


def test_generation_and_logits_stay_the_same():
    model = FAMILIES["armd"].model()
    packed = copy.deepcopy(model)
    ids = torch.randint(23, (2, 9))
    assert pack_linear_layers(packed) == 4 * 6 + 1 + 1
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-4)
    arguments = {"max_new_tokens": 9, "strategy": "strided", "num_streams": 3, "do_sample": False}
    assert torch.equal(packed.generate(ids, **arguments), model.generate(ids, **arguments))


def test_training_saving_and_unpacking_see_ordinary_layers(tmp_path):
    model = FAMILIES["armd"].model()
    ids = torch.randint(23, (2, 9))
    expected = model(ids, labels=ids).loss
    pack_linear_layers(model)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert model.lm_head.weight.grad is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    unpack_linear_layers(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_changed_weight_is_packed_anew():
    model, ids = FAMILIES["armd"].model(), torch.randint(23, (2, 9))
    pack_linear_layers(model)
    with torch.no_grad():
        before = model(ids).logits
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
        after = model(ids).logits
        unpack_linear_layers(model)
        torch.testing.assert_close(after, model(ids).logits, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(before, after)


def test_packed_models_can_be_copied():
    model, ids = FAMILIES["armd"].model(), torch.randint(23, (2, 9))
    pack_linear_layers(model)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, expected)


def test_bfloat16_generates_whether_or_not_this_machine_can_pack_it():
    model = FAMILIES["armd"].model(torch.bfloat16)
    pack_linear_layers(model)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=4).shape == (1, 6)


def test_what_cannot_be_packed_stays():
    assert pack_linear_layers(FAMILIES["armd"].model(torch.float64)) == 0
