"""What `generate` returns with `return_dict_in_generate=True`."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """
    What belongs to a token is kept by position. `scores`, `logits` and `hidden_states` have one entry for every column
    from the first one that is to be filled in any row of the batch to the last: from left to right that is
    transformers' order, and `model.compute_transition_scores` takes them.

    Args:
        sequences: long [batch, length], prompt and generated text; padding after the end of a text, but no column that
            is padding in all rows.
        nfe: number of network evaluations (forward passes) of the whole batch.
        tokens_per_forward: float [batch], generated tokens up to and including the end-of-sequence token, divided by
            the number of passes that the row took part in.
        steps: long [batch, length], the row's pass in which each token was drawn, counted from 0; -1 for given tokens
            and padding.
        confidence: float32 [batch, length], the probability that the model gave to each token when it was drawn, before
            any processor; 1 for given tokens and padding.
        scores: with `output_scores`, each [batch, vocab_size], what the token was drawn from: unnormalised
            log-probabilities after all processors. A given token and padding have log-probability 0, others there -inf.
        logits: with `output_logits`, the same before the processors.
        hidden_states: with `output_hidden_states`, for every column one tensor [batch, 1, hidden_size] per layer and
            one before the first, of the row that predicted the token; zeros where none was drawn.
        cache_logit_error: with `approximate_cache`, float [batch]: by how much the logits of the last pass of a block
            have differed at most from those without it, over the blocks of the row. These are read once more to know,
            which counts neither in `nfe` nor in `tokens_per_forward`.
        past_key_values: the cache, if one was used and all rows went on to the last pass.
    """

    sequences: torch.Tensor | None = None
    nfe: int | None = None
    tokens_per_forward: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    cache_logit_error: torch.Tensor | None = None
    past_key_values: Cache | None = None
