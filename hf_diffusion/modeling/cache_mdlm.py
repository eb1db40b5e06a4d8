"""The exact cache of a block-causal MDLM: keys and values of the blocks that are finished."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_layers import SlotLayer


class MDLMCache(Cache):
    """What a block-causal MDLM has computed for finished blocks; decoding with it recomputes nothing and loses nothing.

    A row never depends on a later block, so keys and values of a block are final as soon as its tokens are. Slot p of
    a row of the batch is for the p-th token of its text, padding not counted, and the first `num_final` slots are
    finished. Behind them lies the block that is being drawn, which every pass writes again.

    Attributes:
        num_final: long [batch], the number of tokens whose keys and values are final; None before the first pass.
    """

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_hidden_layers)])
        self.num_final: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._num_slots = 0

    def begin(self, slots: torch.Tensor, num_slots: int) -> None:
        """Say where the rows of the coming pass belong: `slots`, long [batch, rows], of the first `num_slots`."""
        self._slots, self._num_slots = slots, num_slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states [batch, heads, rows, head_dim] of this pass; returns keys and values of all slots in use."""
        return super().update(key_states, value_states, layer_idx, self._slots, self._num_slots)

    def finish(self, num_final: torch.Tensor) -> None:
        """End a pass, after which the first `num_final` [batch] tokens of each row are finished."""
        self.num_final, self._slots = num_final, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of finished tokens in the row that has most of them."""
        return 0 if self.num_final is None else int(self.num_final.max())

    def reset(self) -> None:
        super().reset()
        self.num_final = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.num_final is not None:
            self.num_final = self.num_final.index_select(0, beam_idx.to(self.num_final.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.num_final is not None:
            self.num_final = self.num_final.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.num_final is not None:
            self.num_final = self.num_final[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: rows of the batch hold different numbers of finished blocks."""
        if tokens_to_remove:
            raise NotImplementedError(
                f"An MDLMCache cannot be cropped (`tokens_to_remove`={tokens_to_remove}): its rows hold different "
                "numbers of finished blocks. Start from a new cache."
            )


__all__ = ["MDLMCache"]
