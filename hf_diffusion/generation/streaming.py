"""What a streamer is given to see while text is drawn out of order."""

from typing import Any

import torch


class StreamerFeed:
    """Feeds a transformers streamer.

    First `put` with the text before the first position to fill. Then, after every step, `put_draft` with the canvas
    from there on for streamers that take drafts (`TextDiffusionStreamer`), or `put` with what has no gap before it any
    more for those that do not. Drafts are followed by one `put` of the finished text. Last `end`.
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
            self._put_until_gap(canvas, unsettled)

    def end(self, sequences: torch.Tensor) -> None:
        """Show what is left of the finished `sequences` [batch, length]."""
        self._put_until_gap(sequences, torch.zeros_like(sequences, dtype=torch.bool))
        self.streamer.end()

    def _put_until_gap(self, canvas: torch.Tensor, masked: torch.Tensor) -> None:
        until = _first_gap(masked)
        if until > self.shown:
            self.streamer.put(canvas[:, self.shown : until].cpu())
            self.shown = until


def _first_gap(masked: torch.Tensor) -> int:
    """The first position that is masked in some row of `masked` [batch, length]; the length if there is none."""
    gap = masked.any(dim=0).int()
    return int(gap.argmax()) if bool(gap.any()) else masked.shape[1]
