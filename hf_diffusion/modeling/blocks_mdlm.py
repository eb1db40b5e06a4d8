"""Which rows go through a block-causal MDLM in one pass, and which of them may read which.

A text falls into blocks of `block_size` tokens, padding not counted (BD3-LM, arXiv 2503.09573). A row has a *stage*: 2b
if it stands for a token of block b as long as the block is noisy, 2b + 1 once it is clean. It reads its own stage and
all earlier clean ones. Training runs the noisy and the clean text through the network together, so that a noisy block
reads itself and the clean blocks before it, and a clean block what it will have read in generation: itself, and the
clean blocks before it. Generation has one row per token and needs no noisy stages: the block being drawn is the last.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .cache_mdlm import MDLMCache
from .masks import NOWHERE, build_mask


@dataclass
class Rows:
    """The rows of one pass.

    Attributes:
        input_ids: long [batch, rows], the token that each row reads.
        places: long [batch or 1, rows], the place of that token in the text, padding not counted: its rotary position.
        stage: long [batch or 1, rows]; `NOWHERE` for padding and for rows that fill a gap in the batch.
        key_stage: long [batch or 1, keys], the stages of what may be read: of the rows themselves, or of the slots of
            a cache.
        answer: long [batch or 1, asked], the rows that predict, negative for none; None if all do.
        state_after: [batch, ...], with a cache: what it knows of its rows after this pass.
    """

    input_ids: torch.Tensor
    places: torch.Tensor
    stage: torch.Tensor
    key_stage: torch.Tensor
    answer: torch.Tensor | None = None
    state_after: torch.Tensor | None = None

    def masks(self, config: Any, like: torch.Tensor) -> tuple[Any, Any]:
        """Who reads whom: for all rows, and for those that predict. None where everybody reads everything."""
        everyone = _mask(self.stage, self.key_stage, config, like)
        if self.answer is None:
            return everyone, everyone
        answering = torch.take_along_dim(self.stage, self.answer.clamp(min=0), dim=1)
        return everyone, _mask(answering, self.key_stage, config, like)


def places_in_text(input_ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Long [batch or 1, length]: how many tokens of the text stand before each position (at padding, any number).

    Args:
        real: bool [batch, length], False at padding; None for no padding.
    """
    if real is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (real.cumsum(dim=1) - 1).clamp(min=0)


def whole_text(
    input_ids: torch.Tensor, real: torch.Tensor | None, query_positions: torch.Tensor | None, block_size: int | None
) -> Rows:
    """One row per position; all of one block if there are none."""
    places = places_in_text(input_ids, real)
    stage = _clean_stage(places, block_size or places.shape[1], real)
    return Rows(input_ids, places, stage, stage, query_positions)


def two_copies(noisy_ids: torch.Tensor, clean_ids: torch.Tensor, real: torch.Tensor | None, block_size: int) -> Rows:
    """The rows of training: the noisy text, whose rows predict, and the clean one."""
    length = noisy_ids.shape[1]
    places = places_in_text(noisy_ids, real)
    stage = _clean_stage(places, block_size, real)
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
        stage=_clean_stage(new_places, config.block_size, new_places < end[:, None]),
        key_stage=_clean_stage(slots, config.block_size, slots < num_tokens[:, None]),
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


def _clean_stage(places: torch.Tensor, block_size: int, exists: torch.Tensor | None) -> torch.Tensor:
    stage = 2 * (places // block_size) + 1
    return stage if exists is None else stage.masked_fill(~exists, NOWHERE)


def _mask(stage: torch.Tensor, key_stage: torch.Tensor, config: Any, like: torch.Tensor) -> Any:
    # No stage lies behind the first one that reads: all are the same, or what is earlier is clean.
    if not torch.compiler.is_compiling() and bool(key_stage.max() <= stage.min()):
        return None
    key_stage = key_stage.expand(len(stage), -1)
    clean_stage = torch.where(key_stage % 2 == 1, key_stage, NOWHERE)

    def reads(batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = batch if len(stage) > 1 else 0
        return (key_stage[row, key] == stage[row, query]) | (clean_stage[row, key] < stage[row, query])

    return build_mask(reads, config, like, (len(stage), stage.shape[1], key_stage.shape[1]))
