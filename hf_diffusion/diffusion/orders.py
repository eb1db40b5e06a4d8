"""Orders of generation and their blocks, as one tensor: `block_index`.

`block_index[b, n]` is the step in which position n of row b is generated: lower is earlier, equal is together. Numbers
run from 0 without a gap; padding carries `NEVER`. Left to right is `arange`, a permutation is its inverse, and strided
decoding (ARMD, section 3.1) is the interleaved one. Given tokens come first, one block each in position order, because
that is how the models read a prompt in training.
"""

from collections.abc import Callable

import torch


NEVER = -1
"""Block number of a position that is not part of the text (padding)."""


def left_to_right(batch_size: int, length: int, device: torch.device | str | None = None) -> torch.Tensor:
    """`block_index` [batch_size, length] in which every position is a block of its own, from left to right."""
    return torch.arange(length, device=device).expand(batch_size, length)


def block_index_from_order(order: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation: singleton blocks generated in the order given.

    Args:
        order: long tensor [..., length]; `order[k]` is the position generated k-th.

    Returns:
        `block_index` of the same shape.

    Raises:
        ValueError: if a row of `order` is not a permutation of 0..length-1.
    """
    length = order.shape[-1]
    expected = torch.arange(length, device=order.device)
    if order.is_floating_point() or not torch.equal(order.sort(dim=-1).values, expected.expand_as(order)):
        raise ValueError(
            f"`order` must hold every position 0..{length - 1} exactly once in each row, got {_preview(order)}. "
            "Pass a permutation; to generate several positions together, build a `block_index` instead."
        )
    return torch.empty_like(order).scatter_(-1, order, expected.expand_as(order))


def strided_steps(length: int, num_streams: int, staggered: bool = False) -> torch.Tensor:
    """Steps of strided decoding for `length` new positions in `num_streams` streams (ARMD, section 3.1).

    The positions are cut into contiguous streams whose lengths differ by at most one, longer ones first. The head of
    every stream is generated alone, in order; then all streams advance by one position per step. The number of steps
    is `num_streams + ceil(length / num_streams) - 1`.

    Args:
        staggered: not as in the paper, every stream goes on from its head at once, and the next one starts one step
            later. That takes no more steps.

    Returns:
        Long tensor [length]: the step of each position.

    Raises:
        ValueError: if `num_streams` is not between 1 and `length`.
    """
    if not 1 <= num_streams <= length:
        raise ValueError(
            f"`num_streams` must be between 1 and the number of positions to fill ({length}), got {num_streams}. "
            "Lower `num_streams` or raise `max_new_tokens`."
        )
    shorter, longer_streams = divmod(length, num_streams)
    lengths = [shorter + (stream < longer_streams) for stream in range(num_streams)]
    if staggered:
        return torch.cat([stream + torch.arange(size) for stream, size in enumerate(lengths)])
    steps = [
        torch.cat([torch.tensor([stream]), num_streams + torch.arange(size - 1)]) for stream, size in enumerate(lengths)
    ]
    return torch.cat(steps)


def semi_autoregressive_steps(length: int, block_length: int, steps_per_block: int) -> torch.Tensor:
    """Steps of semi-autoregressive decoding: contiguous blocks left to right, each in `steps_per_block` steps.

    Inside a block the positions of one step are spread as far apart as possible (step i takes positions i, i + m,
    i + 2m, ... for m steps): distant tokens depend least on each other, which is what drawing them together assumes.

    Returns:
        Long tensor [length]: the step of each position. A last block that is shorter takes at most as many steps.

    Raises:
        ValueError: if `block_length` < 1 or `steps_per_block` is not between 1 and `block_length`.
    """
    if block_length < 1:
        raise ValueError(f"`block_length` must be at least 1, got {block_length}.")
    check_steps_per_block(steps_per_block, block_length)
    position = torch.arange(length)
    return position // block_length * steps_per_block + position % block_length % steps_per_block


def check_steps_per_block(steps_per_block: int, block_length: int) -> None:
    """Raise ValueError unless a block of that length can be drawn in so many steps."""
    if not 1 <= steps_per_block <= block_length:
        raise ValueError(
            f"`max_denoising_steps` must be between 1 and `block_length` ({block_length}) in semi-autoregressive "
            f"decoding, where it counts the steps of one block; got {steps_per_block}."
        )


def fill_order(
    to_fill: torch.Tensor,
    attention_mask: torch.Tensor | None,
    steps: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """`block_index` of a text of which some positions are given and others are to be generated.

    Args:
        to_fill: bool tensor [batch, length], True at positions to generate.
        attention_mask: [batch, length], 0 at padding; None for no padding.
        steps: maps a number of positions to their steps, a long tensor of that length (`strided_steps`, ...). Streams
            and blocks are laid over the positions to fill, in position order, whatever is given between them.

    Returns:
        Long tensor [batch, length]: given tokens first, one block each, then the steps; `NEVER` at padding.
    """
    real = torch.ones_like(to_fill) if attention_mask is None else attention_mask.to(torch.bool)
    fill = real & to_fill
    step, counts = torch.full_like(fill, -1, dtype=torch.long), fill.sum(dim=-1)
    for count in counts.unique().tolist():
        rows = counts == count
        if count:
            step[fill & rows[:, None]] = steps(count).to(step.device).repeat(int(rows.sum()))
    return after_given(step, real)


def after_given(steps: torch.Tensor, real: torch.Tensor, suffix_first: bool = False) -> torch.Tensor:
    """`block_index` [batch, length] of a text whose given tokens come first, one block each in position order.

    Args:
        steps: long [batch, length], the step of each position to generate, from 0; negative for given tokens.
        real: bool [batch, length], False at padding, which gets `NEVER`.
        suffix_first: of the given tokens, those behind the first position to generate come right after the first of
            all, and the rest of those before it after them: suffix, prefix, middle, as models learn to fill gaps.
    """
    given = real & (steps < 0)
    rank = given.cumsum(-1) - 1
    if suffix_first:
        suffix = given & ((real & ~given).cumsum(-1) > 0)
        num_before = (given & ~suffix).sum(dim=-1, keepdim=True)
        in_suffix = suffix.cumsum(-1) - 1 + num_before.clamp(max=1)
        rank = torch.where(suffix, in_suffix, rank + (rank > 0) * suffix.sum(dim=-1, keepdim=True))
    block_index = torch.where(given, rank, steps + given.sum(dim=-1, keepdim=True))
    return block_index.masked_fill(~real, NEVER)


def shuffle_subset(length: int, num_shuffled: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """An order in which `num_shuffled` random positions trade places and all others stay: ARMD's curriculum.

    Returns:
        Long tensor [length], a permutation. `num_shuffled` of 0 or 1 gives left to right.
    """
    slots = torch.randperm(length, generator=generator)[: min(num_shuffled, length)].sort().values
    order = torch.arange(length)
    order[slots] = slots[torch.randperm(len(slots), generator=generator)]
    return order


def shuffle_windows(length: int, window: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """An order that is random inside contiguous windows of `window` positions and left to right between them.

    Returns:
        Long tensor [length], a permutation.
    """
    window = max(window, 1)
    starts = range(0, length, window)
    windows = [start + torch.randperm(min(window, length - start), generator=generator) for start in starts]
    return torch.cat(windows)


def move_to_random_ranks(length: int, num_moved: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """An order in which `num_moved` random positions are taken out and put back at random ranks.

    Returns:
        Long tensor [length], a permutation. The positions that are not moved keep their relative order.
    """
    num_moved = min(num_moved, length)
    moved = torch.randperm(length, generator=generator)[:num_moved]
    ranks = torch.randperm(length, generator=generator)[:num_moved]
    order = torch.empty(length, dtype=torch.long)
    stays = torch.ones(length, dtype=torch.bool)
    free = torch.ones(length, dtype=torch.bool)
    order[ranks], stays[moved], free[ranks] = moved, False, False
    order[free] = torch.arange(length)[stays]
    return order


def check_block_index(block_index: torch.Tensor, real: torch.Tensor | None = None) -> None:
    """Raise ValueError unless the blocks of each row are numbered 0, 1, 2, ... without a gap.

    Args:
        block_index: [batch, length].
        real: bool tensor [batch, length], False at padding, whose numbers are not looked at; None for no padding.
    """
    if block_index.is_floating_point() or block_index.dtype == torch.bool:
        raise ValueError(f"`block_index` must be an integer tensor, got {block_index.dtype}.")
    if real is not None:
        # A padding position repeats the row's first real number, which changes neither the least one nor the gaps.
        first = block_index.gather(1, real.int().argmax(-1, keepdim=True))
        block_index = torch.where(real, block_index, first)
    in_order = block_index.sort(dim=-1).values
    steps = in_order.diff(dim=-1)
    if bool((in_order[:, 0] != 0).any()) or bool((steps > 1).any()):
        raise ValueError(
            "`block_index` must number the blocks of each row 0, 1, 2, ... without a gap (padding aside), got "
            f"{_preview(block_index)}. Renumber the blocks, e.g. with `torch.unique(..., return_inverse=True)`."
        )


def _preview(tensor: torch.Tensor) -> str:
    values = tensor.flatten().tolist()
    return str(values if len(values) <= 16 else [*values[:16], "..."])


def positions_where(flags: torch.Tensor) -> torch.Tensor:
    """Positions of the True entries of each row of `flags` [batch, length], in order, filled up with -1."""
    counts = flags.sum(dim=1, keepdim=True)
    width = int(counts.max())
    positions = flags.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return positions.masked_fill(torch.arange(width, device=flags.device) >= counts, -1)
