"""Masks for whichever attention implementation is in use, from a rule that says who reads whom."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask


NOWHERE = 1 << 30
"""Number of a row that fills a gap in a ragged batch: later than everything, so no row of a text reads it."""


def build_mask(reads: Callable, config: Any, like: torch.Tensor, shape: tuple[int, int, int]) -> Any:
    """The mask in which query row q reads key k where `reads(batch, head, q, k)`, all four index tensors.

    Args:
        like: gives dtype and device.
        shape: (batch, queries, keys); the batch may be 1, for a mask that all of its rows share.

    Raises:
        ValueError: for an attention implementation that can hide nothing but padding and the future.
    """
    batch_size, num_queries, num_keys = shape
    build = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    if build is flash_attention_mask:
        raise ValueError(
            f"`attn_implementation`={config._attn_implementation!r} cannot read by blocks. Load the model with 'sdpa', "
            "'flex_attention' or 'eager'."
        )
    return build(
        batch_size=batch_size,
        q_length=num_queries,
        kv_length=num_keys,
        mask_function=reads,
        allow_is_causal_skip=False,
        dtype=like.dtype,
        device=like.device,
    )
