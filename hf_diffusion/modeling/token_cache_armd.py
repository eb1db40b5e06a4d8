"""transformers' own caches for ARMD left to right, with one entry for every token and nothing else.

Whoever holds a cache of tokens may crop, reorder and repeat it, so all that a pass needs of the past must be there
token by token. ARMD needs two things besides keys and values. The start symbol, and the query for the first token,
depend on the weights alone: they are computed in every pass and never stored. The prefix aggregation (eq. 6) sums over
the embeddings of the text: they lie behind the values of the first layer, which are twice as wide as the others.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .cache_layers import GrowingLayer


class TokenCache:
    """A cache of tokens, to layers whose first row belongs to none.

    Args:
        cache: holds the text so far, and gets the tokens of this pass.
        embeddings: [batch, new, hidden_size], of the tokens of this pass.
    """

    def __init__(self, cache: Cache, embeddings: torch.Tensor) -> None:
        self.cache, self.embeddings = cache, embeddings

    def past_embeddings(self) -> torch.Tensor | None:
        """Embeddings [batch, slots, hidden_size] of the text before this pass; None before the first one.

        Slots of a static cache that are not filled yet hold zeros.
        """
        if not self.cache.layers or not self.cache.layers[0].is_initialized:
            return None
        if self.cache.offloading:
            # The first layer is on its way back, since the last one was computed.
            torch.accelerator.current_stream().wait_stream(self.cache.prefetch_stream)
        layer = self.cache.layers[0]
        embeddings = layer.values[..., layer.keys.shape[-1] :].transpose(1, 2).flatten(2)
        return embeddings.to(self.embeddings.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the states [batch, heads, 1 + new, head_dim] of the tokens; returns those of row 0 and all tokens."""
        new_values = value_states[:, :, 1:]
        if layer_idx == 0:
            embeddings = self.embeddings.unflatten(-1, (-1, value_states.shape[-1])).transpose(1, 2)
            new_values = torch.cat([new_values, embeddings.to(new_values.dtype)], dim=-1)
        keys, values = self.cache.update(key_states[:, :, 1:], new_values, layer_idx)
        keys = torch.cat([key_states[:, :, :1], keys], dim=2)
        return keys, torch.cat([value_states[:, :, :1], values[..., : value_states.shape[-1]]], dim=2)


def check_token_cache(cache: Cache, num_new: int) -> None:
    """Raise ValueError for a cache that does not keep every token as it was, or has no room for `num_new` more."""
    if not isinstance(cache, Cache):
        raise ValueError(
            f"`past_key_values` must be a `Cache` of transformers, got {type(cache).__name__}. Pass a `DynamicCache`, "
            "or what a pass with `use_cache=True` has returned."
        )
    layer_types = {type(layer) for layer in getattr(cache, "layers", ())}
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        layer_types.add(cache.layer_class_to_replicate)
    unfit = layer_types - {DynamicLayer, StaticLayer, GrowingLayer}
    if unfit or not layer_types or hasattr(cache, "row_state"):
        kind = min(layer_type.__name__ for layer_type in unfit) if unfit else type(cache).__name__
        raise ValueError(
            f"`past_key_values` ({kind}) does not hold the keys, values and embeddings of all tokens as they were "
            "computed, which ARMD's causal form reads. Pass a `DynamicCache` or a `StaticCache`."
        )
    if not cache.layers or not cache.layers[0].is_initialized:
        return
    layer = cache.layers[0]
    if layer.values.shape[-1] != 2 * layer.keys.shape[-1]:
        raise ValueError(
            f"`past_key_values` has values of width {layer.values.shape[-1]} in its first layer, where ARMD keeps "
            f"values and embeddings, of width {2 * layer.keys.shape[-1]}. Pass a cache that this model has filled, or "
            "an empty one without `early_initialization`."
        )
    room = layer.get_max_length()
    if room >= 0 and int(layer.get_seq_length()) + num_new > room:
        raise ValueError(
            f"`past_key_values` has room for {room} tokens, and holds {int(layer.get_seq_length())} before this pass "
            f"of {num_new}. Make it longer (`max_cache_len`)."
        )


__all__ = ["TokenCache"]
