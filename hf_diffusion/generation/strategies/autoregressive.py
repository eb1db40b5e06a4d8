"""Left to right, one position per step."""

import torch

from ..configuration import DiffusionGenerationConfig


def steps(num_positions: int, config: DiffusionGenerationConfig) -> torch.Tensor:
    return torch.arange(num_positions)
