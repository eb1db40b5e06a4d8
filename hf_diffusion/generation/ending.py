"""Where a text ends: the end-of-sequence token in texts that are drawn in any order."""

import torch


class Ending:
    """
    Args:
        to_fill: bool [batch, length], positions to fill.
        attention_mask: [batch, length], 0 at padding.
        eos_token_ids: the tokens that end a text. Before a given token they are tokens like others.
        pad_token_id: what is put after the end; the first of `eos_token_ids` if not given.
    """

    def __init__(
        self,
        to_fill: torch.Tensor,
        attention_mask: torch.Tensor,
        eos_token_ids: list[int],
        pad_token_id: int | None,
    ) -> None:
        self.to_fill = to_fill
        given = (attention_mask.bool() & ~to_fill).long()
        self.may_end = to_fill & (given.flip(1).cumsum(1).flip(1) == 0)
        self.eos_token_ids = torch.tensor(eos_token_ids, device=to_fill.device, dtype=torch.long)
        self.pad_token_id = pad_token_id if pad_token_id is not None else next(iter(eos_token_ids), None)

    def _ends(self, canvas: torch.Tensor) -> torch.Tensor:
        return torch.isin(canvas, self.eos_token_ids) & self.may_end

    def reached(self, canvas: torch.Tensor, unsettled: torch.Tensor) -> torch.Tensor:
        """Bool [batch]: rows whose text has ended, as no position up to the end may still change.

        Args:
            canvas: long [batch, length].
            unsettled: bool [batch, length], masked positions, and those that may be masked again.
        """
        if not len(self.eos_token_ids):
            return torch.zeros(len(canvas), dtype=torch.bool, device=canvas.device)
        return (self._ends(canvas) & (unsettled.cumsum(dim=1) == 0)).any(dim=1)

    def cut(self, canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padding at the generated positions after the token that ends the text.

        Returns:
            The canvas, and a bool tensor [batch, length] that is True at generated tokens that are text.
        """
        if not len(self.eos_token_ids):
            return canvas, self.to_fill
        ends = self._ends(canvas)
        after_end = (ends.cumsum(dim=1) - ends.long() > 0) & self.to_fill
        assert self.pad_token_id is not None
        return canvas.masked_fill(after_end, self.pad_token_id), self.to_fill & ~after_end
