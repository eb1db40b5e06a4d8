"""Blocks of `block_length` from left to right, each drawn in `max_denoising_steps` steps."""

import torch

from ...diffusion.orders import semi_autoregressive_steps
from ..configuration import DiffusionGenerationConfig


def steps(num_positions: int, config: DiffusionGenerationConfig) -> torch.Tensor:
    steps_per_block = config.max_denoising_steps or config.block_length
    return semi_autoregressive_steps(num_positions, config.block_length, steps_per_block)
