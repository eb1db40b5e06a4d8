"""Positions as far apart as possible in every pass: distant tokens depend least on each other."""

import torch

from ...diffusion.orders import semi_autoregressive_steps
from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Strategy, ranks
from .planned import planned


def keys(config: DiffusionGenerationConfig, canvas: Canvas) -> torch.Tensor:
    block_length = config.block_length
    assert block_length is not None
    steps_in_block = semi_autoregressive_steps(block_length, block_length, config.max_denoising_steps or block_length)
    return steps_in_block.to(canvas.block.device)[ranks(canvas.to_fill, canvas.block)[0]]


SPREAD = Strategy("spread", planned(keys), frozenset({"max_denoising_steps"}))
