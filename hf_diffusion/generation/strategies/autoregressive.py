"""Left to right, one position per pass."""

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Strategy, ranks
from .planned import planned


def keys(config: DiffusionGenerationConfig, canvas: Canvas) -> torch.Tensor:
    return ranks(canvas.to_fill, canvas.block)


AUTOREGRESSIVE = Strategy("autoregressive", planned(keys))
