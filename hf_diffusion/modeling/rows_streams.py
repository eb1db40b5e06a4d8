"""Which rows a causal model is given to predict tokens of a text in any order, and what each row may read.

A causal model predicts a token from the row of its left neighbour. So the row of token c, at position c, which reads
all blocks up to its own, already is the query of token c + 1, if that comes in the next block: in strided decoding it
almost always does. Where it does not, a row is added:

- the left neighbour is known longer ("stale"): its token once more at its position, reading the blocks that have come
  since as well, the keys and values of the first time in place of its own;
- it is not known ("gap"): a vector of the model's in its place, which sees itself and is seen by nobody.

Added rows are answers only; no other row ever reads them, and they leave nothing in the cache.
"""

from dataclasses import dataclass

import torch

from ..diffusion.canvas import check_query_positions
from ..diffusion.orders import check_block_index
from .cache_streams import CausalStreamsCache
from .masks import NOWHERE


NOTHING = -1
"""Canvas index of a row that fills a gap in a ragged batch."""


@dataclass
class Rows:
    """The rows of one pass: first those that stay, the content, then those that are added.

    Attributes:
        token: long [batch, rows], canvas index of the token of each row; `NOTHING` if there is none.
        position: long [batch, rows], its place in the text, from 0.
        is_gap: bool [batch, rows], rows whose token is not known.
        reads_before: long [batch, rows]; a row reads the tokens of all blocks before this one.
        content_block: long [batch, content], the blocks of the tokens that stay; `NOWHERE` for none.
        answer: long [batch, asked], the row that answers for each query position, -1 if nothing can.
        plain: the rows are the tokens of a text from its first to its last, each reading those before it.
    """

    token: torch.Tensor
    position: torch.Tensor
    is_gap: torch.Tensor
    reads_before: torch.Tensor
    content_block: torch.Tensor
    answer: torch.Tensor
    plain: bool

    @property
    def num_content(self) -> int:
        return self.content_block.shape[1]


@dataclass
class Text:
    """The canvas of a pass.

    Attributes:
        masked, real: bool [batch, length], positions to fill; positions that are no padding.
        position: long [batch, length], the place of each token in its text, from 0, padding not counted.
        left: long [batch, length], canvas index of the left neighbour; `NOTHING` for the first token.
        block: long [batch, length], `NOWHERE` at padding.
    """

    masked: torch.Tensor
    real: torch.Tensor
    position: torch.Tensor
    left: torch.Tensor
    block: torch.Tensor


@torch.compiler.disable  # how many rows there are depends on values
def plan_rows(
    masked: torch.Tensor,
    real: torch.Tensor | None,
    block_index: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    cache: CausalStreamsCache | None,
) -> Rows:
    """The rows of a pass; see `CausalStreamsForMaskedDiffusion.forward` for the arguments.

    Raises:
        ValueError: for orders in which a row would have to read a token that is not known, and for queries that do not
            go with the cache.
    """
    text = _read_text(masked, real, block_index)
    length = masked.shape[1]
    if query_positions is None:
        query_positions = torch.arange(length, device=masked.device).expand_as(masked)
        if cache is not None:
            raise ValueError("`past_key_values` needs `query_positions`: the positions of the next block to predict.")
    check_query_positions(query_positions, *masked.shape)
    asked = query_positions >= 0
    target = query_positions.clamp(min=0)
    target_block = text.block.gather(1, target).masked_fill(~asked, -1)
    known = text.real & ~text.masked
    if cache is None:
        last_block = target_block.amax(dim=1, keepdim=True)
        if bool((text.masked & (text.block < last_block)).any()):
            raise ValueError(
                "`input_ids` holds `mask_token_id` in a block that later blocks would have to read, and the network "
                "never reads a mask. Put masked positions into the last block of `block_index`, or name with "
                "`query_positions` the block to predict."
            )
        content = known
    else:
        block_of_row = target_block.masked_fill(~asked, NOWHERE).amin(dim=1, keepdim=True)
        if bool(((target_block != block_of_row) & asked).any()):
            raise ValueError(
                f"`query_positions` asks for positions of several blocks at once: {query_positions.tolist()}. With a "
                "cache ask for one block of `block_index` per row and pass."
            )
        content = text.real & (text.block < block_of_row)
        content &= ~(text.masked & (block_of_row == NOWHERE))  # a row that asks for nothing
        if bool((content & text.masked).any()):
            raise ValueError(
                "`input_ids` holds `mask_token_id` at a position of a block before the one that is asked for. Write "
                "the tokens drawn there before the next pass."
            )
        content = content & ~cache.known_of(masked)
        cache.note_known(content)
    return _lay_rows(text, content, target, asked, target_block)


def _read_text(masked: torch.Tensor, real: torch.Tensor | None, block_index: torch.Tensor | None) -> Text:
    index = torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
    if block_index is None:
        # Left to right; masked positions are predicted together, from everything that is known.
        real_ = torch.ones_like(masked) if real is None else real
        known = real_ & ~masked
        block = torch.where(masked, known.sum(dim=1, keepdim=True), known.cumsum(dim=1) - 1)
    elif block_index.shape != masked.shape:
        raise ValueError(
            f"`block_index` must have the shape of `input_ids` {tuple(masked.shape)}, got {tuple(block_index.shape)}."
        )
    else:
        check_block_index(block_index, real)
        block = block_index
    if real is None:
        return Text(masked, torch.ones_like(masked), index, index - 1, block)
    last_real = torch.where(real, index, NOTHING).cummax(dim=1).values
    left = torch.cat([last_real.new_full((len(last_real), 1), NOTHING), last_real[:, :-1]], dim=1)
    return Text(masked, real, (real.cumsum(dim=1) - 1).clamp(min=0), left, block.masked_fill(~real, NOWHERE))


def _lay_rows(
    text: Text, content: torch.Tensor, target: torch.Tensor, asked: torch.Tensor, target_block: torch.Tensor
) -> Rows:
    """Rows for the `content` tokens (bool [batch, length]) and the targets [batch, asked]."""
    token, is_content = _packed(content)
    block = text.block.gather(1, token).masked_fill(~is_content, NOWHERE)
    left = text.left.gather(1, target)
    has_left, left = asked & (left >= 0), left.clamp(min=0)
    left_block, left_known = text.block.gather(1, left), ~text.masked.gather(1, left)
    row_of_token = torch.zeros_like(text.block).scatter_(
        1,
        token,
        torch.arange(token.shape[1], device=token.device).expand_as(token) * is_content,
    )
    in_content = content.gather(1, left)
    shared = has_left & in_content & (left_block == target_block - 1)
    added, is_added = _packed(has_left & ~shared)
    added_left = left.gather(1, added)
    stale = left_known.gather(1, added) & (left_block < target_block).gather(1, added)
    rank = (has_left & ~shared).long().cumsum(dim=1) - 1
    answer = torch.where(shared, row_of_token.gather(1, left), token.shape[1] + rank).masked_fill(~has_left, -1)
    reads_before = torch.cat([block + 1, target_block.gather(1, added).masked_fill(~is_added, 0)], dim=1)
    plain = bool(
        added.shape[1] == 0
        and is_content.all()
        and (text.position.gather(1, token) == block).all()
        and (block[:, 1:] > block[:, :-1]).all()
    )
    return Rows(
        token=torch.cat([token.masked_fill(~is_content, NOTHING), added_left.masked_fill(~is_added, NOTHING)], dim=1),
        position=text.position.gather(1, torch.cat([token, added_left], dim=1)),
        is_gap=torch.cat([torch.zeros_like(is_content), is_added & ~stale], dim=1),
        reads_before=reads_before,
        content_block=block,
        answer=answer,
        plain=plain,
    )


def _packed(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the True entries of each row of `flags` [batch, n], in order, filled up to the longest; which are."""
    width = int(flags.sum(dim=1).max()) if flags.numel() else 0
    order = (~flags).long().argsort(dim=1, stable=True)[:, :width]
    return order, flags.gather(1, order)


__all__ = ["NOTHING", "Rows", "plan_rows"]
