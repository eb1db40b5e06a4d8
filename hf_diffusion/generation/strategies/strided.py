"""Strided parallel decoding (ARMD, section 3.1): the heads of S streams one by one, then all streams together."""

import torch

from ...diffusion.orders import strided_steps
from ..configuration import DiffusionGenerationConfig


def steps(num_positions: int, config: DiffusionGenerationConfig) -> torch.Tensor:
    return strided_steps(num_positions, config.num_streams)
