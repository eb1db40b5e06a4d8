"""Positions as far apart as possible in every pass: distant tokens depend least on each other."""

import torch

from ...diffusion.orders import check_steps_per_block
from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Strategy, ranks
from .planned import planned


def keys(config: DiffusionGenerationConfig, canvas: Canvas) -> torch.Tensor:
    rank = ranks(canvas.to_fill, canvas.block)
    if config.max_denoising_steps is None:
        return rank
    assert config.block_length is not None
    check_steps_per_block(config.max_denoising_steps, config.block_length)
    return rank % config.max_denoising_steps


SPREAD = Strategy("spread", planned(keys), frozenset({"max_denoising_steps"}))
