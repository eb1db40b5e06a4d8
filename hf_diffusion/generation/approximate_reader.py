"""Reading with an approximate cache, renewed at the start of every block of a row, and what that costs in accuracy."""

from typing import Any

import torch

from .reader import Reader, Reading
from .strategies.filling import Canvas


class ApproximateReader(Reader):
    """A `Reader` that computes what is known when a block of a row begins once per block.

    Rows do not know of each other: what is drawn does not depend on how they are batched.

    Args:
        measure: read the last pass of every block of every row once more without the cache. That pass differs most from
            the one that filled the cache. These readings are not counted as passes.
    """

    def __init__(
        self, model: Any, canvas: Canvas, attention_mask: torch.Tensor, inputs: dict[str, Any], measure: bool
    ) -> None:
        super().__init__(model, canvas, attention_mask, inputs, steps=None, use_cache=True)
        self.cache = self.approximate_cache = model.new_approximate_cache()
        self.block = torch.full_like(self.rows, -1)
        self.largest_error = torch.zeros(len(self.rows), device=self.rows.device) if measure else None
        self._last_pass: tuple[Any, ...] | None = None

    def read(
        self, rows: torch.Tensor, input_ids: torch.Tensor, asked: torch.Tensor, level: torch.Tensor | None
    ) -> Reading:
        block = self.canvas.block.masked_fill(~asked, -1).amax(dim=1)
        goes_on = torch.zeros_like(block, dtype=torch.bool)
        goes_on[rows] = block[rows] == self.block[rows]
        self._measure(~goes_on)
        self.leave_out_all_but(rows)
        self.approximate_cache.renew(~goes_on[rows])
        self.block = block
        reading = super().read(rows, input_ids, asked, level)
        if self.largest_error is not None:
            self._last_pass = rows, input_ids.clone(), asked, level, reading.logits.clone()
        return reading

    def cache_logit_error(self) -> torch.Tensor | None:
        self._measure(torch.ones_like(self.block, dtype=torch.bool))
        return self.largest_error

    def _measure(self, ended: torch.Tensor) -> None:
        """Compare the last pass of the rows `ended` (bool [batch]), if they took part in it, with an exact one."""
        if self._last_pass is None or self.largest_error is None:
            return
        rows, input_ids, asked, level, logits = self._last_pass
        ended_rows = rows[ended[rows]]
        if not len(ended_rows):
            return
        row = torch.repeat_interleave(rows, asked[rows].sum(dim=1))
        outputs, query_positions = self.run(ended_rows, input_ids, asked, level)
        exact, approximate = outputs.logits[query_positions >= 0], logits[ended[row]]
        # Where both are -inf they do not differ.
        error = torch.where(exact == approximate, 0.0, (exact - approximate).abs()).amax(dim=-1)
        self.largest_error.scatter_reduce_(0, row[ended[row]], error.to(self.largest_error.dtype), "amax")
