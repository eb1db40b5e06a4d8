"""The approximate cache of a bidirectional MDLM: what is known keeps the keys and values that it has had once.

Every position of such a model reads all others, so keys and values change with every token that is drawn. At positions
that are known they change little (Fast-dLLM, arXiv 2505.22618), and this cache takes them as constant from one renewal
to the next. What is computed with it is not what the model says; `generate` can measure the difference.
"""

import torch
from torch.nn import functional as F

from ..diffusion.orders import positions_where
from .batched_cache import SlotCache
from .masks import NOWHERE
from .rows_mdlm import Rows, places_in_text


EMPTY, FROZEN, READ_AGAIN = 0, 1, 2
"""States of a slot: not computed yet; computed, and kept until renewal; computed anew in every pass."""


class ApproximateMDLMCache(SlotCache):
    """Keys and values of the tokens that were known when their row was last renewed.

    Attributes:
        slot_state: uint8 [batch, slots], what is to be done with each slot; None before the first pass.
    """

    row_state = ("slot_state",)
    slot_state: torch.Tensor | None = None

    def renew(self, rows: torch.Tensor) -> None:
        """Keep nothing of `rows` (bool [batch]): the next pass computes all of their text."""
        if self.slot_state is not None:
            self.slot_state = self.slot_state.masked_fill(rows[:, None], EMPTY)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens kept in the row that has most of them."""
        return 0 if self.slot_state is None else int((self.slot_state == FROZEN).sum(dim=1).max())


@torch.compiler.disable  # how many rows there are depends on values
def rows_not_kept(
    input_ids: torch.Tensor,
    real: torch.Tensor | None,
    query_positions: torch.Tensor,
    cache: ApproximateMDLMCache,
    mask_token_id: int,
) -> Rows:
    """The rows of a pass with a cache: all of the text but what is kept.

    Tells the cache where they go. For the arguments and the errors see `MDLMForMaskedDiffusion.forward`.
    """
    batch_size, length = input_ids.shape
    if real is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    state = input_ids.new_full((batch_size, 0), EMPTY, dtype=torch.uint8)
    if cache.slot_state is not None:
        state = cache.slot_state.to(input_ids.device)
    state = F.pad(state, (0, length - state.shape[1]), value=EMPTY)
    text = input_ids.gather(1, (~real).long().argsort(dim=1, stable=True))
    exists = torch.arange(length, device=input_ids.device) < real.sum(dim=1, keepdim=True)
    to_read = exists & (state != FROZEN)

    asked, asked_places = query_positions >= 0, places_in_text(input_ids, real).gather(1, query_positions.clamp(min=0))
    if bool((asked & ~(real.gather(1, query_positions.clamp(min=0)) & to_read.gather(1, asked_places))).any()):
        raise ValueError(
            f"`query_positions` asks for padding, or for tokens that the cache keeps: {query_positions.tolist()}. Ask "
            "for positions that were masked in the first pass, or renew the rows of the cache."
        )
    places = positions_where(to_read)
    is_gap = places < 0
    num_slots = length + bool(is_gap.any())  # rows that fill a gap write into a slot of their own
    places = places.masked_fill(is_gap, num_slots - 1)
    cache.begin(places, num_slots)
    known = torch.where(text == mask_token_id, READ_AGAIN, FROZEN).to(state.dtype)
    return Rows(
        input_ids=F.pad(text, (0, 1), value=mask_token_id).gather(1, places),
        places=places,
        stage=torch.zeros_like(places).masked_fill(is_gap, NOWHERE),
        key_stage=F.pad(torch.zeros_like(text).masked_fill(~exists, NOWHERE), (0, num_slots - length), value=NOWHERE),
        answer=(to_read.cumsum(dim=1) - 1).gather(1, asked_places).masked_fill(~asked, -1),
        state_after=torch.where(exists & (state == EMPTY), known, state),
    )


__all__ = ["ApproximateMDLMCache"]
