"""How the masked positions of a canvas are filled: what a strategy is, once it has a canvas before it.

A filling says which positions the next pass is asked for and which of its answers are kept. It knows neither the tokens
nor the model nor the cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..configuration import DiffusionGenerationConfig


@dataclass(frozen=True)
class Canvas:
    """What a filling is laid over.

    Attributes:
        to_fill: bool [batch, length], the positions to fill.
        block: long [batch, length], the number of the block of a position to fill, 0, 1, 2, ... from left to right; a
            block is filled before the next begins.
        uniforms: float64 [batch, planes, length] in [0, 1), as many planes as the strategy asks for.
        mask_levels: maps a number of steps T to T + 1 falling numbers from 1 to 0, float64: the share of the positions
            that are still masked after each step, at equal steps of the model's time.
    """

    to_fill: torch.Tensor
    block: torch.Tensor
    uniforms: torch.Tensor
    mask_levels: Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """What comes next.

    Attributes:
        asked: bool [batch, length], the positions that the network is to predict; a row without any is finished.
        uniforms: float64 [batch, length], from which the tokens of this pass are drawn.
        level: [batch], the expected share of masked positions, where the strategy knows it.
        remasked: bool [batch, length], positions whose tokens are given up before this pass.
    """

    asked: torch.Tensor
    uniforms: torch.Tensor
    level: torch.Tensor | None = None
    remasked: torch.Tensor | None = None


class Filling(ABC):
    """One canvas being filled.

    Attributes:
        steps: [batch, length], the pass of every position, if that is known beforehand.
        reads_exponents: `choose` needs them.
    """

    steps: torch.Tensor | None = None
    reads_exponents = False

    @abstractmethod
    def next_pass(self, masked: torch.Tensor) -> Pass:
        """
        Args:
            masked: bool [batch, length], what is still to be filled.
        """

    def choose(self, asked: torch.Tensor, logits: torch.Tensor, exponents: torch.Tensor | None = None) -> torch.Tensor:
        """Which of the positions `asked` [batch, length] (bool) are kept.

        Args:
            logits: [asked, vocab_size], of these positions.
            exponents: [asked], from a model that has learned an order.
        """
        return asked

    def unsettled(self, masked: torch.Tensor) -> torch.Tensor:
        """Positions whose token may still change, of which `masked` ones are some; bool [batch, length]."""
        return masked


class BlockwiseFilling(Filling):
    """Asks for all masked positions of the first block that is not finished, and chooses among the answers.

    Attributes:
        block: long [batch, length], of the canvas.
        begins: bool [batch], rows whose current block is not that of the pass before.
    """

    def __init__(self, canvas: Canvas) -> None:
        self.block, self.uniforms = canvas.block, canvas.uniforms[:, 0]
        self._current = self.block.new_full((len(self.block),), -1)
        self.begins = torch.ones_like(self._current, dtype=torch.bool)

    def next_pass(self, masked: torch.Tensor) -> Pass:
        first = torch.where(masked, self.block, torch.iinfo(self.block.dtype).max).amin(dim=1)
        self.begins, self._current = first != self._current, first
        return Pass(masked & (self.block == first[:, None]), self.uniforms)


@dataclass(frozen=True)
class Strategy:
    """
    Attributes:
        name: what `generate(strategy=...)` takes.
        begin: maps (config, canvas) to a `Filling`.
        fields: the fields of the generation config that it reads besides `strategy`.
        required: those of them that must be set.
        planned: the pass of every position is known before the first one.
        num_planes: maps the config to the number of planes of uniforms that it needs.
    """

    name: str
    begin: Callable[[DiffusionGenerationConfig, Canvas], Filling]
    fields: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    planned: bool = True
    num_planes: Callable[[DiffusionGenerationConfig], int] = lambda config: 1


def ranks(flags: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Number the True positions within their blocks, from left to right.

    Args:
        flags: bool [batch, length].
        block: long [batch, length], 0 or more and not falling along the True positions of a row.

    Returns:
        Long [batch, length], from 0; 0 at False positions too.
    """
    block = torch.where(flags, block, 0)
    num_blocks = int(block.max()) + 1 if block.numel() else 1
    counts = torch.zeros(flags.shape[0], num_blocks, dtype=torch.long, device=flags.device)
    counts.scatter_add_(1, block, flags.long())
    before = counts.cumsum(1) - counts
    return (flags.cumsum(1) - 1 - before.gather(1, block)).masked_fill(~flags, 0)
