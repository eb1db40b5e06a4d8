"""Which positions of a canvas make a block, where text is drawn block by block."""

from typing import Any

import torch

from .configuration import DiffusionGenerationConfig


def lay_blocks(
    model: Any, to_fill: torch.Tensor, attention_mask: torch.Tensor, config: DiffusionGenerationConfig
) -> torch.Tensor:
    """Block [batch, length] of every position to fill (see `strategies.filling.Canvas`).

    Args:
        model: a `DiffusionGenerationMixin`.
        to_fill: bool [batch, length].
        attention_mask: long [batch, length], 0 at padding.

    Raises:
        ValueError: for a text beyond the context that the model cannot read in windows, or with a block that does not
            fit into one.
    """
    rank, context = attention_mask.cumsum(dim=1) - 1, model.config.max_position_embeddings
    if config.block_length is None:
        return torch.zeros_like(attention_mask)
    if model.generation_block_size is not None:
        number = rank // config.block_length
    elif config.sliding_window:
        number = (rank - context).div(config.block_length, rounding_mode="floor").clamp(min=-1) + 1
    else:
        number = (to_fill.cumsum(dim=1) - 1) // config.block_length
    # Without the blocks in which everything is given.
    highest = number.masked_fill(~to_fill, -1).cummax(dim=1).values
    begins = to_fill & (number > torch.nn.functional.pad(highest, (1, 0), value=-1)[:, :-1])
    blocks = (begins.cumsum(dim=1) - 1).clamp(min=0)
    if int(attention_mask.sum(dim=1).max()) > context:
        _check_windows(model, blocks, to_fill, rank, attention_mask, config)
    return blocks


def _check_windows(
    model: Any,
    blocks: torch.Tensor,
    to_fill: torch.Tensor,
    rank: torch.Tensor,
    attention_mask: torch.Tensor,
    config: DiffusionGenerationConfig,
) -> None:
    context = model.config.max_position_embeddings
    if not model.hides_padding and not bool(attention_mask.all()):
        raise ValueError(
            f"`attention_mask` marks padding in a text of more tokens than the model's context ({context}), which is "
            "read in windows, and this model reads its padding. Generate from texts of one length."
        )
    for block in range(int(blocks.max()) + 1):
        here = to_fill & (blocks == block)
        first = rank.masked_fill(~here, rank.shape[1]).amin(dim=1)
        span = rank.masked_fill(~here, -1).amax(dim=1) - first + 1
        if int(span.max()) > context:
            raise ValueError(
                f"`block_length` ({config.block_length}): a block of these positions to fill spans {int(span.max())} "
                f"tokens, more than the model's context (`max_position_embeddings`={context}), in which it is drawn. "
                "Lower it."
            )
