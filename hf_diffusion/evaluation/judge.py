"""Texts as an ordinary causal language model sees them: how likely, and where they lie in its space of features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class JudgedTexts:
    """
    Attributes:
        nats: float64 [texts], negative log-likelihood of all tokens of a text but the first, given those before.
        num_tokens: long [texts], how many these are, in the judge's tokens.
        features: float32 [texts, hidden_size], the judge's last hidden state at the last token of a text.
    """

    nats: torch.Tensor
    num_tokens: torch.Tensor
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
        """
        Args:
            texts: one at least; an empty one has no likelihood to add, but has no features either.

        Raises:
            ValueError: for no texts, an empty one, and one that is longer than the judge's context.
        """
        if not texts:
            raise ValueError("`texts` is empty: there is nothing to judge.")
        ids = [
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            for text in texts
        ]
        context = getattr(self.model.config, "max_position_embeddings", None)
        for number, tokens in enumerate(ids):
            if not tokens:
                raise ValueError(f"`texts`: number {number} is {texts[number]!r}, of which the judge has no token.")
            if context is not None and len(tokens) > context:
                raise ValueError(
                    f"`texts`: number {number} has {len(tokens)} of the judge's tokens, and its context holds "
                    f"{context}. Cut it, or take another judge."
                )
        order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
        nats = torch.zeros(len(ids), dtype=torch.float64)
        features: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            of_texts, last_states = self._read_batch([ids[number] for number in numbers])
            nats[numbers] = of_texts
            for number, state in zip(numbers, last_states, strict=True):
                features[number] = state
        return JudgedTexts(nats, torch.tensor([len(tokens) - 1 for tokens in ids]), torch.stack(features))

    @torch.no_grad()
    def _read_batch(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(tokens) for tokens in ids])
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        device = self.model.device
        outputs = self.model(
            padded.to(device), attention_mask=mask.long().to(device), output_hidden_states=True, use_cache=False
        )
        log_probability = outputs.logits[:, :-1].double().log_softmax(-1).cpu()
        nats = -log_probability.gather(-1, padded[:, 1:, None])[..., 0].where(mask[:, 1:], 0.0).sum(dim=1)
        last = outputs.hidden_states[-1].float().cpu()[torch.arange(len(ids)), lengths - 1]
        return nats, last


__all__ = ["Judge", "JudgedTexts"]
