"""The exact cache of ARMD: keys and values, the running prefix state, and what has been read so far."""

import torch
from torch.nn import functional as F

from .batched_cache import BatchedCache
from .cache_layers import GrowingLayer


def mark(flags: torch.Tensor, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`flags` [batch, length] with True at `index` [batch, n] wherever `valid` [batch, n]."""
    length = flags.shape[1]
    return F.pad(flags, (0, 1)).scatter(1, index.masked_fill(~valid, length), True)[:, :length]


class ARMDCache(BatchedCache):
    """What ARMD has computed for the blocks generated so far; decoding with it recomputes nothing and loses nothing.

    Lower (two-stream) layers hold keys and values of the content stream, upper layers those of the query stream. Both
    are final once written: a row never depends on a later block. On top the cache keeps

    - `prefix_state` [batch, prefix_encoding_size, hidden_size]: sum of PE_i x_i over the content rows read (eq. 6);
    - `known` [batch, length]: which positions of the canvas have been read as content;
    - `pending` [batch, queried]: the positions asked for by the last pass (-1 for none). The next pass reads them;
    - `content_block`, `query_block` [batch, rows]: the block of every cached row, for batches whose rows differ in the
      number of given tokens or in what they ask for (`ragged`). Others need no mask at all.
    """

    row_state = ("prefix_state", "known", "pending", "content_block", "query_block")

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(num_hidden_layers)])
        self.num_passes = 0
        self.ragged = False
        self.prefix_state: torch.Tensor | None = None
        self.known: torch.Tensor | None = None
        self.pending: torch.Tensor | None = None
        self.content_block: torch.Tensor | None = None
        self.query_block: torch.Tensor | None = None

    def append_blocks(
        self, content_block: torch.Tensor, query_block: torch.Tensor, ragged: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the blocks of the rows of this pass; returns those of all rows cached, including them."""
        self.ragged |= ragged
        if self.content_block is not None and self.query_block is not None:
            content_block = torch.cat([self.content_block, content_block], dim=1)
            query_block = torch.cat([self.query_block, query_block], dim=1)
        self.content_block, self.query_block = content_block, query_block
        return content_block, query_block

    def advance(
        self, content: torch.Tensor, is_content: torch.Tensor, query_positions: torch.Tensor, length: int
    ) -> None:
        """Note that a pass has read `content` (canvas indices; `is_content` False in the gaps) and asked a block."""
        if self.known is None:
            self.known = torch.zeros(content.shape[0], length, dtype=torch.bool, device=content.device)
        self.known = mark(self.known, content, is_content & (content >= 0))
        self.pending = query_positions
        self.num_passes += 1

    def reset(self) -> None:
        super().reset()
        self.num_passes, self.ragged = 0, False


__all__ = ["ARMDCache"]
