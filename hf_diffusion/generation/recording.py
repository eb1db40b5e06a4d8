"""What is known afterwards of every generated token: when it was drawn, how sure the model was, from what scores."""

from typing import Any

import torch

from .configuration import DiffusionGenerationConfig


class Recording:
    """
    Everything is kept by position: entry k of `scores`, `logits` and `hidden_states` belongs to the k-th column from
    the first one that is to be filled in any row. From left to right that is transformers' order.

    Args:
        to_fill: bool [batch, length].

    Attributes:
        steps: long [batch, length], the row's pass in which each token was drawn; -1 where none was.
        log_probability: float64 [batch, length], of each token under the model's law when it was drawn, in nats.
    """

    def __init__(self, to_fill: torch.Tensor, config: DiffusionGenerationConfig) -> None:
        self.config = config
        self.first = _first_column(to_fill)
        self.steps = torch.full_like(to_fill, -1, dtype=torch.long)
        self.log_probability = torch.zeros_like(to_fill, dtype=torch.float64)
        self._scores: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._hidden_states: list[torch.Tensor] = []

    def note(
        self,
        drawn: torch.Tensor,
        passes: torch.Tensor,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        scores: torch.Tensor,
        hidden_states: tuple[torch.Tensor, ...] | None,
    ) -> None:
        """Note a pass.

        Args:
            drawn: bool [batch, length], the positions of `tokens` [drawn], `logits` and `scores` [drawn, vocab_size]
                and `hidden_states` (layers + 1 times [drawn, hidden_size]).
            passes: [batch], the number of this pass of each row.
        """
        self.steps = torch.where(drawn, passes[:, None], self.steps)
        self.log_probability[drawn] = logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].double()
        if self.config.output_scores:
            self._scores = self._put(self._scores, drawn, scores, -torch.inf)
        if self.config.output_logits:
            self._logits = self._put(self._logits, drawn, logits, -torch.inf)
        if hidden_states is not None:
            if not self._hidden_states:
                self._hidden_states = [None] * len(hidden_states)  # type: ignore[list-item]
            for layer, states in enumerate(hidden_states):
                self._hidden_states[layer] = self._put(self._hidden_states[layer], drawn, states, 0)

    def scores_of(self, text: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The scores of a beginning `text` [batch, columns] of the canvas, of which `drawn` (bool) was drawn; None if
        they are not kept.
        """
        if self._scores is None:
            return None
        return _with_certainty(self._scores, text[:, self.first :], drawn[:, self.first :])

    def outputs(self, sequences: torch.Tensor, generated: torch.Tensor) -> dict[str, Any]:
        """Fields of `DiffusionGenerateOutput`.

        Args:
            sequences: long [batch, width], what `generate` returns.
            generated: bool [batch, width], True at generated tokens that are text.
        """
        width = sequences.shape[1]
        tokens, drawn = sequences[:, self.first :], generated[:, self.first :]
        states = [
            buffer[:, : drawn.shape[1]].masked_fill(~drawn[..., None], 0)[:, :, None].unbind(dim=1)
            for buffer in self._hidden_states
        ]
        return {
            "steps": self.steps[:, :width].masked_fill(~generated, -1),
            "confidence": self.log_probability[:, :width].exp().float().masked_fill(~generated, 1),
            "scores": _with_certainty(self._scores, tokens, drawn) if self.config.output_scores else None,
            "logits": _with_certainty(self._logits, tokens, drawn) if self.config.output_logits else None,
            "hidden_states": tuple(zip(*states, strict=True)) if self.config.output_hidden_states else None,
        }

    def _put(
        self, buffer: torch.Tensor | None, drawn: torch.Tensor, values: torch.Tensor, empty: float
    ) -> torch.Tensor:
        drawn = drawn[:, self.first :]
        if buffer is None:
            buffer = values.new_full((*drawn.shape, values.shape[-1]), empty)
        buffer[drawn] = values
        return buffer


def _with_certainty(buffer: torch.Tensor | None, tokens: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`buffer` by column, with log-probability 0 for those of `tokens` [batch, columns] that are not `drawn`."""
    if buffer is None:  # nothing was drawn
        return ()
    buffer, vocabulary = buffer[:, : tokens.shape[1]], torch.arange(buffer.shape[-1], device=buffer.device)
    sure = torch.zeros_like(buffer).masked_fill(tokens[..., None] != vocabulary, -torch.inf)
    return torch.where(drawn[..., None], buffer, sure).unbind(dim=1)


def _first_column(to_fill: torch.Tensor) -> int:
    filled = to_fill.any(dim=0)
    return int(filled.int().argmax()) if bool(filled.any()) else to_fill.shape[1]
