"""Attention that reads text on the right as if it stood before the text, for models with rotary positions.

A row at q reads a key at k > q at the distance q - k + C in place of q - k < 0. Rotations compose: keys keep their
rotation, and the query is turned once more, by C positions, for the keys on its right. Layers without rotary positions
know no distances, and read all text alike.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


WRAPPED = "causal_streams"
"""Name of this attention implementation. Where no text is read as if it stood elsewhere it is "sdpa"."""


def wrapped_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    on_the_right: torch.Tensor | None = None,
    turn: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_layers: list[bool] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        query: [batch, heads, rows, head_dim], rotated, as `key` [batch, key heads, keys, head_dim] is.
        attention_mask: bool [batch, 1, rows, keys].
        on_the_right: bool [batch, 1, rows, keys], keys that are read at the distance plus C.
        turn: cosine and sine [batch, 1, rotary_dim] of C positions.
        rotary_layers: which layers of the model have rotary positions; all of them if not given.
    """
    is_rotary = rotary_layers is None or rotary_layers[module.layer_idx]  # type: ignore[index]
    if on_the_right is None or turn is None or not is_rotary:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert attention_mask is not None
    # By the key heads that they read, so that keys and values need not be repeated: [batch, key heads, .., head_dim].
    of_key_head = (key.shape[1], query.shape[1] // key.shape[1])
    both = torch.stack([query, rotate(module, query, *turn)], dim=2).unflatten(1, of_key_head).transpose(2, 3)
    both = both * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (both.flatten(2, 4) @ key.mT).unflatten(2, both.shape[2:5])
    own, wrapped = scores.unbind(dim=2)
    scores = torch.where(on_the_right[:, :, None], wrapped, own)
    scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    shares = nn.functional.dropout(shares, dropout, training=module.training)
    read = (shares.flatten(2, 3) @ value).unflatten(2, shares.shape[2:4])
    return read.flatten(1, 2).transpose(1, 2).contiguous(), None


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


def rotary_embedding(causal_lm: nn.Module) -> Any:
    """The module that makes the model's rotary angles; None if it has none."""
    return next((module for name, module in causal_lm.named_modules() if name.endswith("rotary_emb")), None)


def turn_by(causal_lm: nn.Module, length: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [batch, 1, rotary_dim], of the dtype of `like`, of turning by `length` [batch, 1] positions."""
    rotary = rotary_embedding(causal_lm)
    cos, sin = rotary(like, length)
    scaling = getattr(rotary, "attention_scaling", 1.0)
    return cos / scaling, sin / scaling


def check_asked_for(implementation: str | dict | None) -> None:
    """Raise ValueError for another attention than SDPA, which would read text on the right like text on the left."""
    if implementation not in (None, "sdpa"):
        raise ValueError(
            f'`attn_implementation` must be "sdpa", got {implementation!r}: how text on the right is read is part of '
            "the attention, and is there for SDPA only. Leave it out."
        )


def check_in_place(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a causal model whose attention was switched to another one."""
    implementation = causal_lm.config.get_text_config()._attn_implementation
    if implementation != WRAPPED:
        raise ValueError(
            f"The attention of `base_model` was switched to {implementation!r}, and text on the right is read by "
            f'"{WRAPPED}" (SDPA, in all that the model does alone). Call '
            f'`base_model.set_attn_implementation("{WRAPPED}")`.'
        )


def register_wrapped_attention() -> None:
    """Make the implementation known to transformers; safe to call twice."""
    AttentionInterface.register(WRAPPED, wrapped_attention_forward)
    AttentionMaskInterface.register(WRAPPED, sdpa_mask)


__all__ = [
    "WRAPPED",
    "check_asked_for",
    "check_in_place",
    "register_wrapped_attention",
    "rotary_embedding",
    "rotate",
    "rotation_of",
    "turn_by",
    "wrapped_attention_forward",
]
