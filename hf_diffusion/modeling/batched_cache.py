"""What the caches of all families share: what they know of each row of the batch goes where that row goes."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_layers import SlotLayer


class BatchedCache(Cache):
    """A cache that knows more of a row of the batch than its keys and values.

    Attributes:
        row_state: names of the attributes that hold it, each a tensor [batch, ...], or None before the first pass.
    """

    row_state: tuple[str, ...] = ()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self.row_state:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, function(value))

    def reset(self) -> None:
        super().reset()
        for name in self.row_state:
            setattr(self, name, None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda value: value[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: what is kept is more than a list of tokens, or differs from row to row."""
        if tokens_to_remove:
            raise NotImplementedError(
                f"{type(self).__name__} cannot be cropped (`tokens_to_remove`={tokens_to_remove}): what it keeps "
                "is not a list of tokens with an end that could be taken away. Start from a new cache."
            )


class SlotCache(BatchedCache):
    """A cache of texts: slot p of a row of the batch is for the p-th token of its text, padding not counted."""

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(num_hidden_layers)])
        self._slots: torch.Tensor | None = None
        self._num_slots = 0

    @property
    def num_rows(self) -> int | None:
        """Number of rows of the batch; None before the first pass."""
        (name,) = self.row_state
        state = getattr(self, name)
        return None if state is None else len(state)

    def begin(self, slots: torch.Tensor, num_slots: int) -> None:
        """Say where the rows of the coming pass belong: `slots`, long [batch, rows], of the first `num_slots`."""
        self._slots, self._num_slots = slots, num_slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states [batch, heads, rows, head_dim] of this pass; returns keys and values of all slots in use."""
        return super().update(key_states, value_states, layer_idx, self._slots, self._num_slots)

    def finish(self, state: torch.Tensor) -> None:
        """End a pass: `state` [batch, ...] is the row state after it."""
        (name,) = self.row_state
        setattr(self, name, state)
        self._slots = None
