"""Which rows go through ARMD's network in one pass, and which of them may see which.

A *content* row carries a token and may be read by later blocks; a *query* row asks for the token at one position. Rows
are listed in the order of generation. The first content row is the start symbol, and the last token of a text needs no
content row, since nothing comes after it. So, for an order of singleton blocks, query row i may read exactly the
content rows 0..i, content row i itself and those before it, and query row i (upper layers) the query rows 0..i: three
times the plain causal pattern, and no row has an empty context.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ..diffusion.canvas import check_length, check_query_positions, check_tokens, real_positions
from ..diffusion.orders import check_block_index, fill_order
from .cache_armd import ARMDCache, mark
from .configuration_armd import ARMDConfig
from .masks import NOWHERE


START = -1
"""Canvas index, and block number, of the start symbol."""
UNKNOWN = -2
"""Canvas index of a left neighbour that is not known."""


@dataclass
class Canvas:
    """The text in natural order, given and masked positions alike.

    Attributes:
        masked: bool [batch, length], True at positions to fill.
        real: bool [batch, length], False at padding; None if there is none.
        position: [batch, length], 1 for the first token of a row, 0 being the start symbol's.
        left: [batch, length], canvas index of the token on the left; `START` for the first one.
    """

    masked: torch.Tensor
    real: torch.Tensor | None
    position: torch.Tensor
    left: torch.Tensor


@dataclass
class Rows:
    """The rows of one pass. Indices point into the canvas.

    Attributes:
        content: [batch, M], canvas index of each content row, `START` for the start symbol.
        query: [batch, Q], canvas index of each query row.
        neighbour: [batch, Q], canvas index of the token on each query's left if an earlier block holds it, else
            `UNKNOWN`.
        content_block, query_block: [batch, M] and [batch, Q], their blocks; a query reads content of lower number.
        pattern: "causal", where the three masks are the plain causal one; "open", where every row may read whatever is
            there, in the cache or new; "blocks", where the numbers decide.
        answer: [batch, asked], which of the query rows are the ones asked for; None for all, in position order.
        has_gaps: whether some rows only fill up a ragged batch.
        in_position_order: whether the query rows are the positions 0, 1, 2, ... of the canvas.
    """

    content: torch.Tensor
    query: torch.Tensor
    neighbour: torch.Tensor
    content_block: torch.Tensor
    query_block: torch.Tensor
    pattern: Literal["causal", "open", "blocks"]
    answer: torch.Tensor | None = None
    has_gaps: bool = False
    in_position_order: bool = False


def read_canvas(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ARMDConfig) -> Canvas:
    """Check the text and say where its positions are. Raises ValueError for what the network could not read."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"`input_ids` must have shape [batch, length >= 1], got {tuple(input_ids.shape)}.")
    real = real_positions(input_ids, attention_mask)
    check_length(input_ids, real, config.max_position_embeddings)
    check_tokens(input_ids, real, config.vocab_size, config.mask_token_id)
    masked: torch.Tensor = input_ids == config.mask_token_id  # type: ignore[assignment]
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if real is None:
        position, left = index + 1, index - 1
    else:
        position = real.cumsum(dim=1)
        last_real = torch.where(real, index, START).cummax(dim=1).values
        left = torch.cat([last_real.new_full((last_real.shape[0], 1), START), last_real[:, :-1]], dim=1)
    return Canvas(masked, real, position, left)


def plan_rows(
    canvas: Canvas,
    block_index: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    cache: ARMDCache | None,
) -> Rows:
    """The rows of a pass over `canvas`; see `ARMDForMaskedDiffusion.forward` for the arguments."""
    if query_positions is not None:
        check_query_positions(query_positions, *canvas.masked.shape)
    if cache is None:
        return _all_rows(canvas, _checked_blocks(canvas, block_index, query_positions))
    if query_positions is None:
        raise ValueError("`past_key_values` needs `query_positions`: the positions of the next block to predict.")
    _check_queries(canvas, query_positions, cache)
    if cache.num_passes:
        return _next_rows(canvas, cache, query_positions)
    return _first_rows(canvas, _checked_blocks(canvas, block_index, query_positions), query_positions)


def _check_queries(canvas: Canvas, query_positions: torch.Tensor, cache: ARMDCache) -> None:
    if not isinstance(cache, ARMDCache):
        raise ValueError(
            f"`past_key_values` must be an `ARMDCache`, got {type(cache).__name__}. Pass `use_cache=True` in the first "
            "pass, and what it returns in the next."
        )
    in_order = query_positions.sort(dim=1).values
    repeated = bool(((in_order.diff(dim=1) == 0) & (in_order[:, 1:] >= 0)).any())
    if cache.known is not None and cache.pending is not None:
        if cache.known.shape != canvas.masked.shape:
            raise ValueError(
                f"`input_ids` has shape {tuple(canvas.masked.shape)}, but the cache was started with "
                f"{tuple(cache.known.shape)}. A canvas keeps its length from the first pass to the last."
            )
        read = mark(cache.known, cache.pending.clamp(min=0), cache.pending >= 0)
        repeated |= bool((read.gather(1, query_positions.clamp(min=0)) & (query_positions >= 0)).any())
    if repeated:
        raise ValueError(
            "`query_positions` asks for a position twice, or for one that the cache has read already: "
            f"{query_positions.tolist()}. Each position is asked for once, in its block."
        )


def _checked_blocks(
    canvas: Canvas, block_index: torch.Tensor | None, query_positions: torch.Tensor | None
) -> torch.Tensor:
    if block_index is None:
        # The masked-LM reading: what is given is known, what is masked is asked for in one block.
        return fill_order(canvas.masked, canvas.real, lambda count: torch.zeros(count, dtype=torch.long))
    if block_index.shape != canvas.masked.shape:
        raise ValueError(
            f"`block_index` must have the shape of `input_ids` {tuple(canvas.masked.shape)}, got "
            f"{tuple(block_index.shape)}."
        )
    check_block_index(block_index, canvas.real)
    real_blocks = block_index if canvas.real is None else block_index.masked_fill(~canvas.real, START)
    asked = real_blocks if query_positions is None else _blocks_at(real_blocks, query_positions, START)
    if bool((canvas.masked & (real_blocks < asked.amax(dim=1, keepdim=True)) & (real_blocks > START)).any()):
        raise ValueError(
            "`input_ids` holds `mask_token_id` in a block that later blocks would have to read, and the network never "
            "reads a mask. Put masked positions into the last block of `block_index`, or name with `query_positions` "
            "the block to predict."
        )
    return block_index


def _all_rows(canvas: Canvas, block_index: torch.Tensor) -> Rows:
    """Rows of a whole text: every position is asked for, each within its block."""
    if canvas.real is not None:
        # Padding goes to the end of the order, one block each: no text row reads it, and causal stays causal.
        last = block_index.shape[1] + torch.arange(block_index.shape[1], device=block_index.device)
        block_index = torch.where(canvas.real, block_index, last)
    query_block, query = block_index.sort(dim=-1, stable=True)
    return Rows(
        content=_with_start(query[:, :-1]),
        query=query,
        neighbour=_known_neighbour(canvas, block_index, query),
        content_block=_with_start(query_block[:, :-1]),
        query_block=query_block,
        pattern="causal" if _singletons(query_block) else "blocks",
        in_position_order=bool((query.diff(dim=-1) > 0).all()),
    )


def _first_rows(canvas: Canvas, block_index: torch.Tensor, query_positions: torch.Tensor) -> Rows:
    """Rows of the first pass with a cache: the given tokens, as content and as queries, and the first block asked for.

    Given are the tokens whose block is earlier than the ones asked for. They are queried too, because upper layers
    read query rows.
    """
    asked = query_positions >= 0
    asked_blocks = block_index.gather(1, query_positions.clamp(min=0))
    block_of_row = asked_blocks.masked_fill(~asked, NOWHERE).amin(dim=1, keepdim=True)
    if bool(((asked_blocks != block_of_row) & asked).any()):
        raise ValueError(
            "`query_positions` asks for positions of several blocks at once, which would see each other's places: "
            f"{query_positions.tolist()}. Ask for one block of `block_index` per row and pass."
        )
    # A row that asks for nothing yet has all its tokens given.
    given = (block_index < block_of_row) & ~(canvas.masked & (block_of_row == NOWHERE))
    if canvas.real is not None:
        given = given & canvas.real
    num_given = given.sum(dim=1, keepdim=True)
    key = torch.where(given, block_index, NOWHERE)
    alone = query_positions.shape[1] == 1 and bool(asked.all())
    if alone:
        # Sorted in between the given tokens and the gaps, a single query keeps the causal pattern for uneven rows too.
        key = key.scatter(1, query_positions, NOWHERE - 1)
    block, index = key.sort(dim=-1, stable=True)
    width = int(num_given.max())
    queries = torch.arange(query_positions.shape[1], device=key.device).expand_as(query_positions)
    asked_block = _block_of_pass(0, asked, block_index.shape[1])
    if alone:
        query, query_block = index[:, : width + 1], block[:, : width + 1].scatter(1, num_given, asked_block)
        answer = num_given
    else:
        query = torch.cat([index[:, :width], query_positions.clamp(min=0)], dim=1)
        query_block = torch.cat([block[:, :width], asked_block], dim=1)
        answer = width + queries
    index, block = index[:, :width], block[:, :width]
    content_block = block.masked_fill(torch.arange(width, device=key.device) >= num_given, NOWHERE)
    gaps = NOWHERE + torch.arange(width, device=key.device)
    singletons = _singletons(torch.where(content_block < NOWHERE, content_block, gaps))
    return Rows(
        content=_with_start(index),
        query=query,
        neighbour=_known_neighbour(canvas, block_index, query),
        content_block=_with_start(content_block),
        query_block=query_block,
        pattern="causal" if alone and singletons else "blocks",
        answer=answer,
        has_gaps=not bool(asked.all()) or bool((num_given < width).any()),
    )


def _next_rows(canvas: Canvas, cache: ARMDCache, query_positions: torch.Tensor) -> Rows:
    """Rows of a later pass: what the last one asked for comes in as content, and the next block asks."""
    assert cache.pending is not None and cache.known is not None
    length = canvas.masked.shape[1]
    content, was_asked, asked = cache.pending.clamp(min=0), cache.pending >= 0, query_positions >= 0
    if bool((canvas.masked.gather(1, content) & was_asked).any()):
        raise ValueError(
            "`input_ids` still holds `mask_token_id` at a position that the last pass with this cache asked for. "
            "Write the tokens drawn there before the next pass."
        )
    has_gaps = cache.ragged or not bool(asked.all())
    query = query_positions.clamp(min=0)
    left = canvas.left.gather(1, query)
    read = mark(cache.known, content, was_asked)
    return Rows(
        content=content,
        query=query,
        neighbour=torch.where((left == START) | read.gather(1, left.clamp(min=0)), left, UNKNOWN),
        content_block=_block_of_pass(cache.num_passes - 1, was_asked, length),
        query_block=_block_of_pass(cache.num_passes, asked, length),
        pattern="blocks" if has_gaps else "open",
        answer=torch.arange(query.shape[1], device=query.device).expand_as(query),
        has_gaps=has_gaps,
    )


def _known_neighbour(canvas: Canvas, block_index: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    left = canvas.left.gather(1, query)
    known = (left == START) | (block_index.gather(1, left.clamp(min=0)) < block_index.gather(1, query))
    return torch.where(known, left, UNKNOWN)


def _blocks_at(block_index: torch.Tensor, positions: torch.Tensor, elsewhere: int) -> torch.Tensor:
    return block_index.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, elsewhere)


def _block_of_pass(number: int, asked: torch.Tensor, length: int) -> torch.Tensor:
    # Passes are numbered after every block that a canvas of this length can have.
    return torch.full_like(asked, length + number, dtype=torch.long).masked_fill(~asked, NOWHERE)


def _singletons(sorted_blocks: torch.Tensor) -> bool:
    return bool((sorted_blocks.diff(dim=-1) > 0).all())


def _with_start(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows.new_full((rows.shape[0], 1), START), rows], dim=1)
