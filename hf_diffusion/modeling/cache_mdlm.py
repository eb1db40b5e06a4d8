"""The exact cache of a block-causal MDLM: keys and values of the blocks that are finished."""

import torch

from .batched_cache import SlotCache


class MDLMCache(SlotCache):
    """What a block-causal MDLM has computed for finished blocks; decoding with it recomputes nothing and loses nothing.

    A row never depends on a later block, so keys and values of a block are final as soon as its tokens are. The first
    `num_final` slots are finished. Behind them lies the block that is being drawn, which every pass writes again.

    Attributes:
        num_final: long [batch], the number of tokens whose keys and values are final; None before the first pass.
    """

    row_state = ("num_final",)
    num_final: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of finished tokens in the row that has most of them."""
        return 0 if self.num_final is None else int(self.num_final.max())


__all__ = ["MDLMCache"]
