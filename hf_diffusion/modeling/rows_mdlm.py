"""Which rows go through MDLM in one pass, and which of them may read which.

A row has a *stage*, and reads its own stage and all earlier clean ones. Without blocks there is one stage. With blocks
of `block_size` tokens, padding not counted (BD3-LM, arXiv 2503.09573), it is 2b for a token of block b as long as the
block is noisy, and 2b + 1 once it is clean.
"""

from dataclasses import dataclass
from typing import Any

import torch

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


def places_in_text(like: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Long [batch or 1, length]: how many tokens of the text stand before each position (at padding, any number).

    Args:
        like: [batch, length, ...], gives length and device.
        real: bool [batch, length], False at padding; None for no padding.
    """
    if real is None:
        return torch.arange(like.shape[1], device=like.device)[None]
    return (real.cumsum(dim=1) - 1).clamp(min=0)


def whole_text(
    input_ids: torch.Tensor, real: torch.Tensor | None, query_positions: torch.Tensor | None, block_size: int | None
) -> Rows:
    """One row per position; all of one block if there are none."""
    places = places_in_text(input_ids, real)
    stage = clean_stage_of(places, block_size or places.shape[1], real)
    return Rows(input_ids, places, stage, stage, query_positions)


def clean_stage_of(places: torch.Tensor, block_size: int, exists: torch.Tensor | None) -> torch.Tensor:
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
