"""What a streamer is given to see while text is drawn out of order."""

from typing import Any

import torch


class StreamerFeed:
    """Feeds a transformers streamer.

    First `put` with the text before the first position to fill, [batch, n]. Then, for streamers that take drafts
    (`TextDiffusionStreamer`), after every step `put_draft` with the canvas from there on, [batch, n], and one `put` of
    the finished text, [batch, n]. Others get it in reading order, position by position as transformers hands it on:
    `put` [batch] for every column that is settled in all rows, as is all before it. Last `end`. Rows of a batch that
    have ended go on with padding.
    """

    def __init__(self, streamer: Any, canvas: torch.Tensor, masked: torch.Tensor) -> None:
        self.streamer = streamer
        self.takes_drafts = hasattr(streamer, "put_draft")
        # Streamers take the first `put` for the prompt, so it is made even where the text begins with a gap.
        self.shown = _first_gap(masked)
        streamer.put(canvas[:, : self.shown].cpu())

    def step(self, canvas: torch.Tensor, unsettled: torch.Tensor) -> None:
        """Show `canvas` [batch, length] after a step; `unsettled` (bool) marks what may still change."""
        if self.takes_drafts:
            self.streamer.put_draft(canvas[:, self.shown :].cpu())
        else:
            self._put_columns(canvas, _first_gap(unsettled))

    def end(self, sequences: torch.Tensor) -> None:
        """Show what is left of the finished `sequences` [batch, length]."""
        if not self.takes_drafts:
            self._put_columns(sequences, sequences.shape[1])
        elif self.shown < sequences.shape[1]:
            self.streamer.put(sequences[:, self.shown :].cpu())
        self.streamer.end()

    def _put_columns(self, canvas: torch.Tensor, until: int) -> None:
        for column in canvas[:, self.shown : until].cpu().unbind(dim=1):
            self.streamer.put(column)
        self.shown = max(self.shown, until)


def _first_gap(masked: torch.Tensor) -> int:
    """The first position that is masked in some row of `masked` [batch, length]; the length if there is none."""
    gap = masked.any(dim=0).int()
    return int(gap.argmax()) if bool(gap.any()) else masked.shape[1]
