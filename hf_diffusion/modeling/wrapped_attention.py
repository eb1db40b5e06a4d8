"""Attention that reads text on the right as if it stood before the text, for models with rotary positions.

A row at q reads a key at k > q at the distance q - k + C in place of q - k < 0. Rotations compose: keys keep their
rotation, and the query is turned once more, by C positions, for the keys on its right.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


WRAPPED = "causal_streams"
"""Name of this attention implementation. Without text on the right it is "sdpa"."""


def wrapped_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    on_the_right: torch.Tensor | None = None,
    turn: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        query: [batch, heads, rows, head_dim], rotated, as `key` [batch, key heads, keys, head_dim] is.
        attention_mask: bool [batch, 1, rows, keys].
        on_the_right: bool [batch, 1, rows, keys], keys that are read at the distance plus C.
        turn: cosine and sine [batch, 1, rotary_dim] of C positions.
    """
    if on_the_right is None or turn is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    turned = rotate(module, query, *turn)
    difference = (turned - query) @ repeat_kv(key, query.shape[1] // key.shape[1]).mT
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = torch.where(on_the_right, difference * scaling, 0)
    bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
    return sdpa_attention_forward(module, query, key, value, bias, **kwargs)


def rotate(module: nn.Module, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`states` [batch, heads, rows, head_dim] turned on, by the rotation of the model that `module` belongs to.

    Models may rotate a part of the channels, the first ones.
    """
    apply = rotation_of(module)
    num_rotated = cos.shape[-1]
    rotated, rest = states[..., :num_rotated], states[..., num_rotated:]
    rotated, _ = apply(rotated, rotated, cos, sin)
    return torch.cat([rotated, rest], dim=-1)


def rotation_of(module: nn.Module) -> Any:
    """The `apply_rotary_pos_emb` of the file that the class of `module` is written in; None if it has none."""
    return getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)


def register_wrapped_attention() -> None:
    """Make the implementation known to transformers; safe to call twice."""
    AttentionInterface.register(WRAPPED, wrapped_attention_forward)
    AttentionMaskInterface.register(WRAPPED, sdpa_mask)


__all__ = ["WRAPPED", "register_wrapped_attention", "rotate", "rotation_of", "wrapped_attention_forward"]
