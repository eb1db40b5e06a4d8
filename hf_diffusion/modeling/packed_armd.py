"""ARMD over texts that are laid end to end in one row, with the paged cache of transformers' continuous batching.

The start symbol is the same for every text, so one stands in front of them all, and every row reads it. The prefix
aggregation (eq. 6) sums over the embeddings of a text, which no key or value holds: the paged cache has a layer more
than the network, for them.
"""

import copy
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from .causal_rows_armd import lay_rows, read_rows
from .masks_armd import attend_alike
from .modeling_armd import ARMDNetworkWithHead
from .prefix_aggregation import aggregate_visible


ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
"""Those that take a mask of scores, with another column than the one that transformers makes."""


class PagedTokens:
    """A paged cache, to layers whose first row belongs to no text.

    Args:
        cache: a `PagedAttentionCache` with a layer more than the network.
        places: which slots of it belong to the texts of this pass, in the arguments of its `update`.
    """

    def __init__(self, cache: Any, places: dict[str, Any]) -> None:
        self.cache, self.places = cache, places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the states [1, heads, 1 + new, head_dim] of the tokens; returns those of row 0 and of all texts."""
        # `update` writes into the arguments that it is given.
        keys, values = self.cache.update(key_states[:, :, 1:], value_states[:, :, 1:], layer_idx, dict(self.places))
        return torch.cat([key_states[:, :, :1], keys], dim=2), torch.cat([value_states[:, :, :1], values], dim=2)

    def update_embeddings(self, embeddings: torch.Tensor, num_heads: int, layer_idx: int) -> torch.Tensor:
        """Store the embeddings [1, new, hidden_size] of the tokens; returns those of all texts."""
        states = embeddings.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        # Pages have room for keys and values alike, and embeddings fill one of the two.
        stored, _ = self.cache.update(states, states, layer_idx, dict(self.places))
        return stored.transpose(1, 2).flatten(2)


class PackedARMD:
    """An `ARMDForCausalLM` as continuous batching calls it. Everything that is not here is the model's own.

    Attributes:
        config: what transformers makes the paged cache from, and the mask, whichever of the implementations of
            attention the layers use.
    """

    def __init__(self, model: ARMDNetworkWithHead) -> None:
        implementation = model.config._attn_implementation
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation`={implementation!r} cannot read the start symbol besides texts that are laid "
                "end to end, as continuous batching does. Load the model with 'sdpa' or 'eager'."
            )
        self.model = model
        self.config = copy.deepcopy(model.config)
        self.config.num_hidden_layers += 1
        self.config._attn_implementation = "sdpa"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def _cached_continuous_batching_manager(self) -> Any:
        """A manager that outlives its session; users ask the model for it."""
        return self.model._cached_continuous_batching_manager

    @_cached_continuous_batching_manager.setter
    def _cached_continuous_batching_manager(self, manager: Any) -> None:
        self.model._cached_continuous_batching_manager = manager

    def eval(self) -> "PackedARMD":
        self.model.eval()
        return self

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Any,
        cu_seq_lens_k: dict[str, torch.Tensor],
        max_length_k: dict[str, int],
        read_index: list[torch.Tensor],
        write_index: list[torch.Tensor],
        logits_to_keep: torch.Tensor,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids, position_ids: [1, new], the new tokens of all texts, and their places in these, from 0.
            attention_mask: [1, 1, new, keys], added to the scores: 0 for the tokens of a text up to a row's own.
            cache: holds the texts so far, and gets the new tokens.
            cu_seq_lens_k: for each kind of layer, [texts + 1], where each text begins among the keys.
            max_length_k, read_index, write_index: what else `cache` asks for.
            logits_to_keep: [kept], rows to compute logits of.
            others: what only other kinds of attention ask for.
        """
        network = self.model.model
        places = {
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_k": max_length_k,
            "read_index": read_index,
            "write_index": write_index,
        }
        tokens = PagedTokens(cache, places)
        embeddings = network.embed_tokens(input_ids)
        rows = lay_rows(network, embeddings, position_ids + 1)
        stored = tokens.update_embeddings(
            embeddings, network.config.num_attention_heads, network.config.num_hidden_layers
        )
        (starts,) = cu_seq_lens_k.values()
        key_position = _positions(starts, stored.shape[1]).clamp(max=network.config.max_position_embeddings)
        mask = _with_start(attention_mask)
        prefix = aggregate_visible(
            network.position_encoding(rows.query_position, embeddings.dtype),
            network.position_encoding(F.pad(key_position, (1, 0))[None], embeddings.dtype),
            torch.cat([rows.content[:, :1], stored], dim=1),
            mask[:, 0] == 0,
        )
        attends = attend_alike(mask, rows.content.shape[1])
        hidden_states = read_rows(network, rows, prefix, attends, tokens)[-1]
        return CausalLMOutputWithPast(logits=self.model.lm_head(hidden_states[:, logits_to_keep]))


def _positions(starts: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Position [keys] of each key in its text, from 1. The texts begin at `starts` [texts + 1], the last one ends."""
    key = torch.arange(num_keys, device=starts.device, dtype=starts.dtype)
    text = torch.searchsorted(starts[1:], key, right=True)
    return key - starts[text] + 1


def _with_start(mask: torch.Tensor) -> torch.Tensor:
    """`mask` [1, 1, new, keys] with the start symbol in front: it reads itself alone, and everything reads it."""
    mask = F.pad(mask, (0, 0, 1, 0), value=torch.finfo(mask.dtype).min)
    return F.pad(mask, (1, 0))
