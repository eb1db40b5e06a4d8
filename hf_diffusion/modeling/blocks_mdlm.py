"""The rows of a block-causal MDLM: in training two copies of the text, in generation what is not finished.

In training the noisy and the clean text go through the network together, so that a noisy block reads itself and the
clean blocks before it, and a clean block what it will have read in generation: itself, and the clean blocks before it.
Generation has one row per token and needs no noisy stages: the block being drawn is the last.
"""

from typing import Any

import torch

from .cache_mdlm import MDLMCache
from .masks import NOWHERE
from .rows_mdlm import Rows, clean_stage_of, places_in_text


def two_copies(noisy_ids: torch.Tensor, clean_ids: torch.Tensor, real: torch.Tensor | None, block_size: int) -> Rows:
    """The rows of training: the noisy text, whose rows predict, and the clean one."""
    length = noisy_ids.shape[1]
    places = places_in_text(noisy_ids, real)
    stage = clean_stage_of(places, block_size, real)
    # Nobody reads the last block when it is clean. Padded rows end it in different places, and keep it.
    num_clean = length if real is not None else (length - 1) // block_size * block_size
    stage = torch.cat([stage - 1, stage[:, :num_clean]], dim=1)
    return Rows(
        input_ids=torch.cat([noisy_ids, clean_ids[:, :num_clean]], dim=1),
        places=torch.cat([places, places[:, :num_clean]], dim=1),
        stage=stage,
        key_stage=stage,
        answer=torch.arange(length, device=noisy_ids.device)[None] if num_clean else None,
    )


@torch.compiler.disable  # how many rows there are depends on values
def next_rows(
    input_ids: torch.Tensor,
    real: torch.Tensor | None,
    query_positions: torch.Tensor,
    cache: MDLMCache,
    config: Any,
) -> Rows:
    """The rows of a pass with a cache: all that is not finished, up to the end of the block that is asked for.

    Tells the cache where they go. For the arguments and the errors see `MDLMForMaskedDiffusion.forward`.
    """
    batch_size, length = input_ids.shape
    if real is None:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    num_final = input_ids.new_zeros(batch_size)
    if cache.num_final is not None:
        num_final = cache.num_final.to(input_ids.device)
    places, num_tokens = places_in_text(input_ids, real), real.sum(dim=1)
    block = (places // config.block_size).masked_fill(~real, NOWHERE)
    asked_block = _asked_block(block, query_positions, num_final // config.block_size)
    asks = asked_block < NOWHERE
    if bool(((input_ids == config.mask_token_id) & (block < asked_block[:, None]) & asks[:, None]).any()):
        raise ValueError(
            f"`input_ids` holds `mask_token_id` ({config.mask_token_id}) in a block before the one that "
            "`query_positions` asks for, whose keys and values would become final. Fill earlier blocks first."
        )

    start = torch.where(asks, (asked_block * config.block_size).minimum(num_tokens), num_final)
    end = torch.where(asks, (start + config.block_size).minimum(num_tokens), num_final)
    width = max(1, int((end - num_final).max()))
    new_places = num_final[:, None] + torch.arange(width, device=input_ids.device)
    slots = torch.arange(int(num_final.max()) + width, device=input_ids.device)[None]
    cache.begin(new_places, slots.shape[1])
    in_text_order = (~real).long().argsort(dim=1, stable=True)
    return Rows(
        input_ids=input_ids.gather(1, in_text_order.gather(1, new_places.clamp(max=length - 1))),
        places=new_places,
        stage=clean_stage_of(new_places, config.block_size, new_places < end[:, None]),
        key_stage=clean_stage_of(slots, config.block_size, slots < num_tokens[:, None]),
        answer=(places.gather(1, query_positions.clamp(min=0)) - num_final[:, None]).where(query_positions >= 0, -1),
        state_after=start,
    )


def _asked_block(block: torch.Tensor, query_positions: torch.Tensor, num_finished: torch.Tensor) -> torch.Tensor:
    """The block [batch] that each row asks for, `NOWHERE` for none, given `block` [batch, length] of all positions."""
    asked = query_positions >= 0
    blocks = block.gather(1, query_positions.clamp(min=0))
    if bool((asked & (blocks == NOWHERE)).any()):
        raise ValueError(
            f"`query_positions` asks for padding: {query_positions.tolist()}. Put -1 where a row asks for nothing."
        )
    asked_block = torch.cat([blocks.masked_fill(~asked, NOWHERE), torch.full_like(block[:, :1], NOWHERE)], 1).amin(1)
    if bool((asked & (blocks != asked_block[:, None])).any()):
        raise ValueError(
            f"`query_positions` asks for positions of several blocks of a row at once: {query_positions.tolist()}. "
            "With a cache, ask for one block per row and pass."
        )
    if bool((asked_block < num_finished).any()):
        raise ValueError(
            f"`query_positions` asks for a block that is finished in the cache: {query_positions.tolist()}. Go on with "
            "later blocks, or start from a new cache."
        )
    return asked_block
