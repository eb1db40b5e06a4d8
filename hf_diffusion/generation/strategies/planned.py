"""Orders that are laid down before the first token is drawn: which pass each position belongs to."""

from collections.abc import Callable

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Filling, Pass


class PlannedFilling(Filling):
    """
    Args:
        keys: [batch, length]; within a block, lower is earlier and equal is together.
        level: [batch, length], the expected share of masked positions when a position is drawn, if the order has one.
    """

    def __init__(self, canvas: Canvas, keys: torch.Tensor, level: torch.Tensor | None = None) -> None:
        self.steps = dense_steps(canvas.to_fill, canvas.block, keys)
        self.level = level
        self.uniforms = canvas.uniforms[:, 0]
        self.passes_made = 0

    def next_pass(self, masked: torch.Tensor) -> Pass:
        asked = (self.steps == self.passes_made) & masked
        self.passes_made += 1
        level = None
        if self.level is not None:
            level = self.level.masked_fill(~asked, 0).amax(dim=1)
        return Pass(asked, self.uniforms, level)


def planned(keys: Callable[[DiffusionGenerationConfig, Canvas], torch.Tensor]) -> Callable[..., PlannedFilling]:
    """`Strategy.begin` of an order that is nothing but a key for every position."""
    return lambda config, canvas: PlannedFilling(canvas, keys(config, canvas))


def dense_steps(to_fill: torch.Tensor, block: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Passes numbered 0, 1, 2, ... in each row, in the order of (block, key); -1 where nothing is to be filled.

    Args:
        to_fill: bool [batch, length].
        block: long [batch, length].
        keys: [batch, length].
    """
    block = torch.where(to_fill, block, torch.iinfo(block.dtype).max)
    order = keys.argsort(dim=1, stable=True)
    order = order.gather(1, block.gather(1, order).argsort(dim=1, stable=True))
    block, keys = block.gather(1, order), keys.gather(1, order)
    begins = torch.zeros_like(block)
    begins[:, 1:] = (block[:, 1:] != block[:, :-1]) | (keys[:, 1:] != keys[:, :-1])
    steps = torch.empty_like(order).scatter_(1, order, begins.cumsum(1))
    return steps.masked_fill(~to_fill, -1)
