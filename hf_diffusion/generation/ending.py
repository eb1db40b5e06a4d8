"""Where a text ends, in texts that are drawn in any order: end tokens, stopping criteria, and time.

A text may end at any position to fill that no given token follows. Whether it does is asked from left to right, as
soon as nothing before a position can change any more: the end is where it would be if the text had been written in
reading order. What has been drawn behind it becomes padding.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from .configuration import DiffusionGenerationConfig, as_list
from .constraints import without_padding_inside


class Ending:
    """
    Args:
        to_fill: bool [batch, length], positions to fill.
        real: bool [batch, length], False at padding.
        mask_token_id: of the model.
        config: for `eos_token_id`, tokens that end a text (before a given token they are tokens like others);
            `pad_token_id`, what is put after the end (the first of the end tokens if not given); `stop_strings`,
            `max_time`, `min_length`, `min_new_tokens`.
        stopping_criteria: as `generate` takes them.
        tokenizer: for `stop_strings`.

    Attributes:
        may_end: bool [batch, length], positions at which a text may end.
        ended: bool [batch], rows whose text has ended before the last column.
        too_early: bool [batch, length], positions at which no end token may be drawn.

    Raises:
        ValueError: for settings that cannot have their effect on these texts.
    """

    def __init__(
        self,
        to_fill: torch.Tensor,
        real: torch.Tensor,
        mask_token_id: int,
        config: DiffusionGenerationConfig,
        stopping_criteria: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.to_fill, self.real = to_fill, real
        given = (real & ~to_fill).long()
        self.may_end = to_fill & (given.flip(1).cumsum(1).flip(1) == 0)
        eos_token_ids = as_list(config.eos_token_id)
        self.eos_token_ids = torch.tensor(eos_token_ids, device=to_fill.device, dtype=torch.long)
        self.pad_token_id = config.pad_token_id if config.pad_token_id is not None else next(iter(eos_token_ids), None)
        self.criteria = _criteria(config, stopping_criteria, tokenizer)
        self._check(config, mask_token_id)
        columns = torch.arange(to_fill.shape[1], device=to_fill.device)
        early = (to_fill.cumsum(dim=1) <= (config.min_new_tokens or 0)) | (columns < (config.min_length or 0))
        self.too_early = self.may_end & early
        self.ended = torch.zeros_like(to_fill[:, 0])
        self._num_kept = torch.full_like(self.ended, to_fill.shape[1], dtype=torch.long)  # columns up to the end
        self._num_settled = torch.zeros_like(self._num_kept)

    def update(
        self,
        canvas: torch.Tensor,
        unsettled: torch.Tensor,
        scores_of: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...] | None],
    ) -> None:
        """Note the ends in what has settled since the last call.

        Args:
            canvas: long [batch, length].
            unsettled: bool [batch, length], masked positions, and those that may be masked again.
            scores_of: maps the first columns of `canvas`, and what of them was drawn, to their scores, for criteria
                that look at them.
        """
        if not len(self.eos_token_ids) and not self.criteria:
            return
        settled = (~unsettled).long().cumprod(dim=1).sum(dim=1)
        end = self._first_end_token(canvas, settled)
        if self.criteria:
            final = torch.minimum(settled, end)
            columns = torch.arange(canvas.shape[1], device=canvas.device)
            to_ask = self.may_end & (columns >= self._num_settled[:, None]) & (columns < final[:, None])
            for column in to_ask.any(dim=0).nonzero()[:, 0].tolist():
                due = to_ask[:, column] & ~self.ended
                if bool(due.any()):
                    # They see all rows, if one of them is asked: padding where another is not final yet.
                    drawn = self.to_fill & (columns < torch.minimum(final, self._num_kept)[:, None])
                    text = self._pad(canvas, self.to_fill & ~drawn)[:, : column + 1]
                    stops: Any = self.criteria(
                        without_padding_inside(text, self.real[:, : column + 1]),
                        scores_of(text, drawn[:, : column + 1]),
                    )
                    self._end(due & stops, column + 1)
        self._end(~self.ended & (end <= settled), end)
        self._num_settled = torch.maximum(self._num_settled, settled)

    def stop(self, unsettled: torch.Tensor) -> None:
        """End all texts at once, before the first position that is not settled."""
        settled = (~unsettled).long().cumprod(dim=1).sum(dim=1)
        self._end(~self.ended & (settled < unsettled.shape[1]), settled)

    @property
    def width(self) -> int:
        """Number of columns without those that are padding in all rows."""
        return int(self._num_kept.max())

    def after_end(self) -> torch.Tensor:
        """Bool [batch, length], generated positions after the end of their text."""
        columns = torch.arange(self.to_fill.shape[1], device=self.to_fill.device)
        return self.to_fill & (columns >= self._num_kept[:, None])

    def pad(self, canvas: torch.Tensor) -> torch.Tensor:
        """`canvas` with padding after the ends."""
        return self._pad(canvas, self.after_end())

    def _pad(self, canvas: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        if self.pad_token_id is None:  # then there is one row, and what is after its end is cut off
            return canvas
        return canvas.masked_fill(where, self.pad_token_id)

    def _first_end_token(self, canvas: torch.Tensor, settled: torch.Tensor) -> torch.Tensor:
        """Number of columns [batch] up to the first end token; more than there are if there is none that is settled."""
        ends = torch.isin(canvas, self.eos_token_ids) & self.may_end
        columns = torch.arange(1, canvas.shape[1] + 1, device=canvas.device).expand_as(canvas)
        first = columns.masked_fill(~ends, canvas.shape[1] + 1).amin(dim=1)
        return first.masked_fill(first > settled, canvas.shape[1] + 1)

    def _end(self, rows: torch.Tensor, num_kept: torch.Tensor | int) -> None:
        self._num_kept = torch.where(rows, num_kept, self._num_kept)
        self.ended = self.ended | rows

    def _check(self, config: DiffusionGenerationConfig, mask_token_id: int) -> None:
        given_later = self.to_fill.any(dim=1) & ~self.may_end.any(dim=1)
        for name, value in (("stopping_criteria", len(self.criteria)), ("max_time", config.max_time)):
            if value and bool(given_later.any()):
                name = "stop_strings" if name == "stopping_criteria" and config.stop_strings is not None else name
                raise ValueError(
                    f"`{name}` ends a text, and row {int(given_later.nonzero()[0])} is given to its end: its gaps must "
                    "be filled. Leave it out, or append masked positions with `max_new_tokens`."
                )
            if value and self.pad_token_id is None and len(self.to_fill) > 1:
                raise ValueError(
                    f"`{name}` ends rows of a batch at different places, and there is no token to put after their "
                    "ends. Set `pad_token_id`."
                )
            if value and self.pad_token_id == mask_token_id:
                raise ValueError(
                    f"`{name}` puts padding after the ends of texts, and `pad_token_id` ({mask_token_id}) is the mask "
                    "token, which is never left in a text. Name another one."
                )
        if config.max_time is not None and bool((self.to_fill & ~self.may_end).any()):
            raise ValueError(
                f"`max_time`={config.max_time!r} could leave gaps before given tokens. Leave it out where the prompt "
                "has positions to fill."
            )
        least, most = config.min_new_tokens or 0, int(self.to_fill.sum(dim=1).max())
        if least > most:
            raise ValueError(f"`min_new_tokens` ({least}) is more than there are positions to fill ({most}). Lower it.")
        if (config.min_length or 0) > self.to_fill.shape[1]:
            raise ValueError(
                f"`min_length` ({config.min_length}) is more than the length of prompt and generated text together "
                f"({self.to_fill.shape[1]}). Lower it, or raise `max_new_tokens`."
            )


def _criteria(config: DiffusionGenerationConfig, stopping_criteria: Any, tokenizer: Any) -> StoppingCriteriaList:
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError(
                f"`stop_strings`={config.stop_strings!r} needs the tokenizer, which knows how tokens are spelt. Pass "
                "`tokenizer` to `generate`."
            )
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings))
    return criteria
