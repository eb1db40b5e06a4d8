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


def tiny(dtype=torch.float64, classes=(MDLMConfig, MDLMForMaskedDiffusion), **settings):
    config_class, model_class = classes
    shared = {"vocab_size": 12, "hidden_size": 16, "conditioning_size": 8, "num_hidden_layers": 3}
    config = {"num_attention_heads": 2, "max_position_embeddings": 32, "residual_dropout": 0.0}
    model = model_class(config_class(**{**shared, **config, **settings}))
    open_up(model)
    return model.to(dtype).eval()


def tiny_lomdm(dtype=torch.float64, **settings):
    model = tiny(dtype, (LoMDMConfig, LoMDMForMaskedDiffusion), **settings)
    spread_orders(model)
    return model


@torch.no_grad()
def spread_orders(model):
    """Scores of standard deviation 1.5 in both heads: orders far from random, of sigmoids that are not saturated."""
    size, mask = model.config.vocab_size, model.config.mask_token_id
    ids = torch.randint(size, (64, 6), generator=torch.Generator().manual_seed(4))
    for name, weight in model.named_parameters():
        if "scheduler" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    for head, run in ((model.reverse_scheduler, model), (model.forward_scheduler, model.forward_exponents)):
        scores = []
        hook = head.out_proj.register_forward_hook(lambda module, inputs, output, scores=scores: scores.append(output))
        run(ids if head is model.reverse_scheduler else ids.masked_fill(ids == mask, 0))
        hook.remove()
        scale = 1.5 / scores[0].std()
        head.out_proj.bias.copy_((head.out_proj.bias - scores[0].mean()) * scale)
        head.out_proj.weight.mul_(scale)


def text(batch, length, masked=0.0):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(11, (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < masked, 11)
