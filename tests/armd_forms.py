"""ARMD in its two forms, with the same weights: what fills positions in any order, and what predicts the next token."""

import torch
from families import FAMILIES

from hf_diffusion import ARMDForCausalLM


def both_forms(name="armd_left_neighbour", dtype=torch.float64, **overrides):
    """A tiny `ARMDForMaskedDiffusion`, and an `ARMDForCausalLM` with a copy of its weights."""
    masked_diffusion = FAMILIES[name].model(dtype, **overrides)
    causal = ARMDForCausalLM(masked_diffusion.config).to(dtype).eval()
    causal.load_state_dict(masked_diffusion.state_dict())
    return masked_diffusion, causal


def left_padded(batch, length, paddings):
    """Random texts [batch, length] and their mask; row n has `paddings[n]` places of padding in front."""
    mask = (torch.arange(length) >= torch.tensor(paddings)[:, None]).long()
    return torch.randint(22, (batch, length)).masked_fill(mask == 0, 9), mask
