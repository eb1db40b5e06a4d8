"""A tiny MDLM whose predictions depend on everything that they should, and texts for it."""

import torch

from hf_diffusion import LoMDMConfig, LoMDMForMaskedDiffusion, MDLMConfig, MDLMForMaskedDiffusion


def open_up(model):
    """Large random weights in a fresh model, whose predictions are all the same."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        # Shifts and scales that do not drown what the network reads, and gates that are open.
        is_modulation = "modulation" in name or "shift_scale" in name
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.1 if is_modulation else 0.5)
        if name.endswith("modulation.bias"):
            weight.data.view(6, -1)[[2, 5]] += 1
        if name.endswith("scheduler.out_proj.weight"):
            weight.data *= 6  # orders that are far from random


def tiny(dtype=torch.float64, classes=(MDLMConfig, MDLMForMaskedDiffusion), **settings):
    config_class, model_class = classes
    shared = {"vocab_size": 12, "hidden_size": 16, "conditioning_size": 8, "num_hidden_layers": 3}
    config = {"num_attention_heads": 2, "max_position_embeddings": 32, "residual_dropout": 0.0}
    model = model_class(config_class(**{**shared, **config, **settings}))
    open_up(model)
    return model.to(dtype).eval()


def tiny_lomdm(dtype=torch.float64, **settings):
    return tiny(dtype, (LoMDMConfig, LoMDMForMaskedDiffusion), **settings)


def text(batch, length, masked=0.0):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < masked, 11)
