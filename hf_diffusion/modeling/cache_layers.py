"""Cache layers that write into buffers with room to spare, where `DynamicLayer` copies everything at every step."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose buffers double when they are full."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Any = None
        self.values: Any = None
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._filled: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [batch, heads, new, head_dim]; returns all keys and all values, views into the buffers."""
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        key_buffer, value_buffer = self._reserve(key_states, value_states, new)
        key_buffer[:, :, old:new] = key_states
        value_buffer[:, :, old:new] = value_states
        return self._show(new)

    def keep(self, length: int) -> None:
        """Forget everything after the first `length` keys and values."""
        if self.get_seq_length() > length:
            self._show(length)

    def reset(self) -> None:
        super().reset()
        self._buffers = self._filled = None

    def _reserve(
        self, key_states: torch.Tensor, value_states: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for `length` keys and values like these."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # `keys` may have been replaced from outside (crop, reorder, batch selection): the buffers are then out of date.
        if self._buffers is None or self.keys is not self._filled or self._buffers[0].shape[-2] < length:
            self._buffers = self._grow(key_states, self.keys, length), self._grow(value_states, self.values, length)
        return self._buffers

    def _grow(self, states: torch.Tensor, past: torch.Tensor, length: int) -> torch.Tensor:
        batch, heads, _, head_dim = states.shape
        old = self.get_seq_length()
        # Zeros, as attention multiplies what it does not read by 0, and chance bits may spell NaN.
        buffer = states.new_zeros(batch, heads, 2 * max(old, length), head_dim)
        if old:
            buffer[:, :, :old] = past
        return buffer

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        self._filled = self.keys
        return self.keys, self.values


class SlotLayer(GrowingLayer):
    """A `GrowingLayer` in which new states go where they are told to, over what is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write states [batch, heads, new, head_dim]; returns the keys and values of the first `length` slots.

        Args:
            args: `slots`, long [batch, new], and `length`, more than the greatest of them.
        """
        slots, length = args
        index = slots[:, None, :, None].expand_as(key_states)
        for buffer, states in zip(
            self._reserve(key_states, value_states, length), (key_states, value_states), strict=True
        ):
            buffer.scatter_(2, index, states)
        return self._show(length)
