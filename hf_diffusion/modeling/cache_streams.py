"""The exact cache of a causal model that writes in parallel streams: keys and values of the tokens known so far."""

import torch

from .batched_cache import BatchedCache
from .cache_layers import GrowingLayer
from .masks import NOWHERE


class CausalStreamsCache(BatchedCache):
    """
    Attributes:
        plain: the tokens were read from the first to the last, as a causal model does.
        known: bool [batch, length], positions of the canvas whose token is in the cache.
        key_block, key_position: long [batch, keys], block and place in the text of the tokens whose keys are cached;
            block `NOWHERE` for none.
    """

    row_state = ("known", "key_block", "key_position")

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(num_hidden_layers)])
        self.plain = True
        self.known: torch.Tensor | None = None
        self.key_block: torch.Tensor | None = None
        self.key_position: torch.Tensor | None = None

    def known_of(self, canvas: torch.Tensor) -> torch.Tensor:
        """What of a canvas, any tensor [batch, length], is in the cache: bool [batch, length].

        Raises:
            ValueError: if the cache was started with a canvas of another shape.
        """
        if self.known is None:
            return torch.zeros_like(canvas, dtype=torch.bool)
        if self.known.shape != canvas.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(canvas.shape)}, but the cache was started with "
                f"{tuple(self.known.shape)}. A canvas keeps its length from the first pass to the last."
            )
        return self.known

    def note_known(self, content: torch.Tensor) -> None:
        """Note that the tokens `content` (bool [batch, length]) are read in this pass."""
        self.known = self.known_of(content) | content

    def keys_with(self, block: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note block and position [batch, content] of the tokens of this pass; returns those of all keys."""
        if self.key_block is not None and self.key_position is not None:
            block = torch.cat([self.key_block, block], dim=1)
            position = torch.cat([self.key_position, position], dim=1)
        self.key_block, self.key_position = block, position
        return block, position

    def drop_added_rows(self) -> None:
        """Forget the keys and values of rows that only gave answers."""
        assert self.key_block is not None
        for layer in self.layers:
            layer.keep(self.key_block.shape[1])  # type: ignore[attr-defined]


def visible(reads_before: torch.Tensor, key_block: torch.Tensor) -> torch.Tensor:
    """Which rows [batch, rows] read which keys [batch, keys]: bool [batch, rows, keys]."""
    return key_block[:, None] < reads_before[..., None].clamp(max=NOWHERE)


__all__ = ["CausalStreamsCache"]
