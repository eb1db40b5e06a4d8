"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class QueryModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state: [batch, length, hidden_size], row n belongs to position n; [batch, queried, hidden_size] if
            `query_positions` was given.
        past_key_values: the cache, if one was used.
        hidden_states: of the rows that predict, before the first layer and after every layer, if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """
    Args:
        loss: the family's training objective, in nats per token; a bound on the negative log-likelihood or that itself.
        logits: [batch, length, vocab_size], row n predicts token n; [batch, queried, vocab_size] if `query_positions`
            was given; None in training with `labels`, where they are never held at once.
        past_key_values: the cache, if one was used.
        hidden_states: see the model's own output.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
