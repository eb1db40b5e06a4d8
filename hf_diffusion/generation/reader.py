"""The network as one call of `generate` sees it: pass after pass over the rows that are not finished yet."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..diffusion.orders import after_given, positions_where
from .strategies.filling import Canvas


@dataclass
class Reading:
    """What a pass says of the positions that it was asked for, in the order of (row, position).

    Attributes:
        logits: [asked, vocab_size], float32 or wider.
        exponents: [asked], from a model that has learned an order and was asked for it.
        hidden_states: layers + 1 times [asked, hidden_size], if asked for.
    """

    logits: torch.Tensor
    exponents: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None


class Reader:
    """Turns positions that are asked for into logits.

    Rows that are finished leave the passes, and the cache, for good. Where the canvas is longer than the context, a
    pass reads the window that ends with the block being filled.

    Args:
        model: a `DiffusionGenerationMixin`.
        canvas: what is being filled.
        attention_mask: [batch, length], 0 at padding.
        inputs: arguments of the model's `forward` that are the same in every pass.
        steps: [batch, length], the pass of every position, for models that must know (`reads_block_index`).
        use_cache: let the model keep a cache from pass to pass.
    """

    def __init__(
        self,
        model: Any,
        canvas: Canvas,
        attention_mask: torch.Tensor,
        inputs: dict[str, Any],
        steps: torch.Tensor | None,
        use_cache: bool,
    ) -> None:
        self.model, self.canvas, self.real = model, canvas, attention_mask.bool()
        self.context = model.config.max_position_embeddings
        self.inputs = inputs
        self.block_index = None
        if model.reads_block_index:
            assert steps is not None
            self.block_index = after_given(steps, self.real, model.reads_suffix_first)
        self.use_cache = use_cache
        self.cache: Cache | None = None
        self.rows = torch.arange(len(self.real), device=self.real.device)
        self.passes = torch.zeros_like(self.rows)
        self.nfe = 0

    def read(
        self, rows: torch.Tensor, input_ids: torch.Tensor, asked: torch.Tensor, level: torch.Tensor | None
    ) -> Reading:
        """One pass.

        Args:
            rows: long [rows], the rows of the batch to read; never one that was left out before.
            input_ids: long [batch, length].
            asked: bool [batch, length], the positions to predict.
            level: [batch], the expected share of masked positions; the actual one if not given.
        """
        self.leave_out_all_but(rows)
        cache = {"past_key_values": self.cache, "use_cache": True} if self.use_cache else {}
        outputs, query_positions = self.run(rows, input_ids, asked, level, **cache)
        self.cache = outputs.past_key_values
        self.passes[rows] += 1
        self.nfe += 1
        asks = query_positions >= 0
        logits, exponents = outputs.logits[asks], outputs.get("exponents")
        if exponents is not None:
            exponents = exponents.gather(1, query_positions.clamp(min=0))[asks]
            if not bool((exponents > 0).all()):
                raise ValueError("`exponents` hold NaN, or are not positive: they say no order. Are the weights sound?")
        hidden_states = outputs.hidden_states
        if hidden_states is not None:
            hidden_states = tuple(states[asks] for states in hidden_states)
        return Reading(logits.to(torch.promote_types(logits.dtype, torch.float32)), exponents, hidden_states)

    def leave_out_all_but(self, rows: torch.Tensor) -> None:
        """Forget all other rows of the batch, which are finished."""
        if len(rows) < len(self.rows):
            if self.cache is not None:
                self.cache.batch_select_indices(torch.isin(self.rows, rows).nonzero()[:, 0])
            self.rows = rows

    def run(
        self,
        rows: torch.Tensor,
        input_ids: torch.Tensor,
        asked: torch.Tensor,
        level: torch.Tensor | None,
        **cache: Any,
    ) -> tuple[Any, torch.Tensor]:
        """What the model answers, and the `query_positions` [rows, queried] that it was asked for (see `read`)."""
        input_ids, asked, real = input_ids[rows], asked[rows], self.real[rows]
        inputs = {**self.inputs, **cache}
        if self.block_index is not None:
            inputs["block_index"] = self.block_index[rows]
        if int(real.sum(dim=1).max()) > self.context:
            columns = self._window(rows, asked)
            inside, index = columns >= 0, columns.clamp(min=0)
            input_ids, asked, real = input_ids.gather(1, index), asked.gather(1, index) & inside, inside
        if level is None:
            masked = real & (input_ids == self.model.config.mask_token_id)
            level = masked.sum(dim=1) / real.sum(dim=1)
        else:
            level = level[rows]
        inputs.update(self.model.inputs_at_level(level))
        query_positions = positions_where(asked)
        outputs = self.model(
            input_ids=input_ids, attention_mask=real.long(), query_positions=query_positions, return_dict=True, **inputs
        )
        return outputs, query_positions

    def cache_logit_error(self) -> torch.Tensor | None:
        """Float [batch], the largest difference that the cache has made to a logit; None where it is exact."""
        return None

    def _window(self, rows: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Columns [rows, window] of the canvas to read, -1 for none: a context full, up to the end of the block."""
        real, block = self.real[rows], self.canvas.block[rows]
        rank = real.cumsum(dim=1) - 1
        current = block.masked_fill(~asked, -1).amax(dim=1, keepdim=True)
        end = rank.masked_fill(~self.canvas.to_fill[rows] | (block != current), -1).amax(dim=1, keepdim=True) + 1
        start = (end - self.context).clamp(min=0)
        return positions_where(real & (rank >= start) & (rank < start + self.context))
