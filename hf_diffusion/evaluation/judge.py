"""Texts as an ordinary causal language model sees them: how likely, and where they lie in its space of features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .windows import Window, cut_windows


@dataclass(frozen=True)
class JudgedTexts:
    """
    Attributes:
        nats: float64 [texts], negative log-likelihood of all tokens of a text but the first, given those before.
        num_tokens: long [texts], how many these are, in the judge's tokens.
        is_empty: bool [texts], where the judge has no token of a text; its `nats` and `num_tokens` are 0.
        features: float32 [texts that are not empty, hidden_size], the judge's last hidden state at their last token.
    """

    nats: torch.Tensor
    num_tokens: torch.Tensor
    is_empty: torch.Tensor
    features: torch.Tensor


class Judge:
    """
    Args:
        model: a causal language model of transformers', in evaluation mode: row n of its logits predicts token n + 1.
        tokenizer: that belongs to it. It reads the plain text, and adds no special tokens.
        batch_size: texts read together.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        if model.training:
            raise ValueError("`model` is in training mode, and dropout would change what it says. Call `model.eval()`.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def read(self, texts: Sequence[str]) -> JudgedTexts:
        """Read texts, one longer than the judge's context in windows that overlap by half of it.

        Then every token is scored once, given half a context at least, and features are those of the last window.

        Args:
            texts: one at least.

        Raises:
            ValueError: for no texts.
        """
        if not texts:
            raise ValueError("`texts` is empty: there is nothing to judge.")
        ids = [
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            for text in texts
        ]
        windows = [(number, window) for number, tokens in enumerate(ids) for window in self._windows(len(tokens))]
        windows.sort(key=lambda of_text: of_text[1].start - of_text[1].end)  # the longest first, none padded much
        nats = torch.zeros(len(ids), dtype=torch.float64)
        features: dict[int, torch.Tensor] = {}
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            of_windows, last_states = self._read_batch([(ids[number], window) for number, window in batch])
            for (number, window), of_window, state in zip(batch, of_windows, last_states, strict=True):
                nats[number] += of_window
                if window.end == len(ids[number]):
                    features[number] = state
        return JudgedTexts(
            nats=nats,
            num_tokens=torch.tensor([max(len(tokens) - 1, 0) for tokens in ids]),
            is_empty=torch.tensor([not tokens for tokens in ids]),
            features=torch.stack([features[number] for number in sorted(features)]) if features else torch.empty(0, 0),
        )

    def _windows(self, num_tokens: int) -> list[Window]:
        if num_tokens == 0:
            return []
        context = getattr(self.model.config, "max_position_embeddings", None) or num_tokens
        return cut_windows(num_tokens, context, None if num_tokens <= context else context // 2)

    @torch.no_grad()
    def _read_batch(self, texts: list[tuple[list[int], Window]]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([window.end - window.start for _, window in texts])
        padded = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        scored_from = torch.ones(len(texts), 1, dtype=torch.long)  # nothing is before the first token
        for row, (tokens, window) in enumerate(texts):
            padded[row, : lengths[row]] = torch.tensor(tokens[window.start : window.end])
            scored_from[row] = max(1, window.scored_from - window.start)
        positions = torch.arange(padded.shape[1])
        mask = positions < lengths[:, None]
        device = self.model.device
        outputs = self.model(
            padded.to(device), attention_mask=mask.long().to(device), output_hidden_states=True, use_cache=False
        )
        log_probability = outputs.logits[:, :-1].double().log_softmax(-1).cpu()
        nats = -log_probability.gather(-1, padded[:, 1:, None])[..., 0]
        nats = nats.where((mask & (positions >= scored_from))[:, 1:], 0.0).sum(dim=1)
        last = outputs.hidden_states[-1].float().cpu()[torch.arange(len(texts)), lengths - 1]
        return nats, last


__all__ = ["Judge", "JudgedTexts"]
