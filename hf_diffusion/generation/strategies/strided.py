"""Strided parallel decoding (ARMD, section 3.1): the heads of S streams one by one, then all streams together."""

import torch

from ...diffusion.orders import strided_steps
from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Strategy
from .planned import planned


def keys(config: DiffusionGenerationConfig, canvas: Canvas) -> torch.Tensor:
    counts, keys = canvas.to_fill.sum(dim=1), torch.zeros_like(canvas.block)
    for count in counts.unique().tolist():
        if count:
            chosen = canvas.to_fill & (counts == count)[:, None]
            steps = strided_steps(count, config.num_streams, config.heads == "staggered").to(keys.device)
            keys[chosen] = steps.repeat(int((counts == count).sum()))
    return keys


STRIDED = Strategy("strided", planned(keys), frozenset({"num_streams", "heads"}), frozenset({"num_streams"}))
