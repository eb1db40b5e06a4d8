"""The bound of MDLM on the likelihood of a text, by drawing a number of masks: one pass for a draw."""

from typing import Any

import torch

from ..diffusion.any_order_bound import mask_random_number_of
from ..generation.scoring import BoundEstimator, ScoredText
from .loss import chunked_nll
from .rows_mdlm import places_in_text


class NumberOfMasks(BoundEstimator):
    """One draw of (2) in `diffusion.any_order_bound`: bounds first-hitting sampling, of the text or block by block.

    Args:
        model: an `MDLMForMaskedDiffusion`, with blocks or without.
        text: to score. Given tokens are never masked, and a block counts the positions that are scored.
    """

    num_planes = 2

    def __init__(self, model: Any, text: ScoredText) -> None:
        self.model, self.text = model, text
        length, size = text.labels.shape[1], model.config.block_size
        self.block = torch.zeros_like(text.labels)
        if size is not None:
            self.block = (places_in_text(text.labels, text.attention_mask.bool()) // size).expand_as(text.labels)
        block, columns = self.block.where(text.to_predict, 0), torch.arange(length, device=text.labels.device)
        first = torch.full((len(block), int(block.max()) + 1), length, device=block.device)
        columns = columns.expand_as(block).masked_fill(~text.to_predict, length)
        self.first_of_block = first.scatter_reduce(1, block, columns, "amin").clamp(max=length - 1)
        self.inputs = {} if model.config.time_conditioning else {"modulations": model.model.modulations()}

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        model, text = self.model, self.text
        token_uniforms, number_uniforms = uniforms[:, 0], uniforms[:, 1].gather(1, self.first_of_block)
        noised = mask_random_number_of(
            text.to_predict, self.block, text.input_ids, number_uniforms, token_uniforms, model.mask_token_id
        )
        level = -torch.expm1(-noised.sigma.amax(dim=1))  # of the one block of a model that is told
        outputs = model.model(
            noised.input_ids,
            text.attention_mask,
            clean_ids=None if model.config.block_size is None else text.input_ids,
            return_dict=True,
            **self.inputs,
            **model.inputs_at_level(level),
        )
        self.nfe += 1
        targets = text.labels.masked_fill(noised.input_ids != model.mask_token_id, -100)
        nll = chunked_nll(outputs.last_hidden_state, targets, model._logits, model.config.vocab_size)
        return -noised.weight * nll


__all__ = ["NumberOfMasks"]
