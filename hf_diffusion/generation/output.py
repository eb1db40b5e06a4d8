"""What `generate` returns with `return_dict_in_generate=True`."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """
    Args:
        sequences: long [batch, length], prompt and generated text; padding after the end-of-sequence token.
        nfe: number of network evaluations (forward passes) of the whole batch.
        tokens_per_forward: float [batch], generated tokens up to and including the end-of-sequence token, divided by
            the number of passes that the row took part in.
        steps: long [batch, length], the row's pass in which each token was drawn, counted from 0; -1 for given tokens
            and padding.
        cache_logit_error: with `approximate_cache`, float [batch]: by how much the logits of the last pass of a block
            have differed at most from those without it, over the blocks of the row. These are read once more to know,
            which counts neither in `nfe` nor in `tokens_per_forward`.
        past_key_values: the cache, if one was used and all rows went on to the last pass.
    """

    sequences: torch.Tensor | None = None
    nfe: int | None = None
    tokens_per_forward: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    cache_logit_error: torch.Tensor | None = None
    past_key_values: Cache | None = None
