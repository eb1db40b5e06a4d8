"""Ancestral sampling of masked diffusion on a grid of T times, exact in law for every T (MDLM, section 3.3).

From time t to s a masked position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), whatever the tokens
are, and only a revealed one draws a token. So the step in which each position is revealed can be drawn first, from one
uniform: it is still masked at time t if the uniform is less than the share of masked positions at t. Steps in which a
row reveals nothing need no pass, and no small probability is ever multiplied with a token's.
"""

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Filling, Strategy
from .planned import PlannedFilling
from .remasking import RemaskingFilling, num_planes


def begin(config: DiffusionGenerationConfig, canvas: Canvas) -> Filling:
    if config.remasking is not None:
        return RemaskingFilling(config, canvas)
    uniforms = canvas.uniforms[:, 1].contiguous()
    levels = canvas.mask_levels(config.max_denoising_steps).flip(0).to(uniforms.device)
    above = torch.searchsorted(levels, uniforms, right=True).clamp(max=len(levels) - 1)
    return PlannedFilling(canvas, keys=-above, level=levels[above])


ANCESTRAL = Strategy(
    "ancestral",
    begin,
    frozenset({"max_denoising_steps", "remasking", "remasking_strength", "reference_sampler"}),
    frozenset({"max_denoising_steps"}),
    num_planes=num_planes,
)
