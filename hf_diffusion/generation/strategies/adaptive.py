"""Orders that follow the model: the positions of which it is surest come first.

Which positions are kept is decided by their distributions before any token is drawn, so a token is drawn from the
model's own law wherever it is kept. The law of the text is that of this order, not of a random one.
"""

from collections.abc import Callable

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import BlockwiseFilling, Canvas, Pass, Strategy


class AdaptiveFilling(BlockwiseFilling):
    """
    In every pass all masked positions of the block are predicted, and those of the highest score kept: as many as it
    takes to finish the block within `max_denoising_steps` passes (one, if that is not given), or more where
    `enough` says so.

    Args:
        score: maps log-probabilities [positions, vocab_size] to scores [positions].
        enough: maps scores [batch, length], falling along a row and -inf where there is no position, to bool [batch,
            length]: those that may be kept together. None for no such rule.
    """

    def __init__(
        self,
        config: DiffusionGenerationConfig,
        canvas: Canvas,
        score: Callable[[torch.Tensor], torch.Tensor],
        enough: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        super().__init__(canvas)
        self.score, self.enough = score, enough
        self.max_steps = config.max_denoising_steps
        self.passes_made = torch.zeros_like(self.block[:, 0])

    def next_pass(self, masked: torch.Tensor) -> Pass:
        step = super().next_pass(masked)
        self.passes_made = torch.where(self.begins, 0, self.passes_made + 1)
        return step

    def choose(self, asked: torch.Tensor, logits: torch.Tensor, exponents: torch.Tensor | None = None) -> torch.Tensor:
        scores = torch.full(asked.shape, -torch.inf, dtype=logits.dtype, device=asked.device)
        scores[asked] = self.score(logits.log_softmax(dim=-1))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        fewest: int | torch.Tensor = 1
        if self.max_steps is not None:
            passes_left = (self.max_steps - self.passes_made).clamp(min=1)
            fewest = (asked.sum(dim=1) / passes_left).ceil()[:, None]
        kept = torch.arange(asked.shape[1], device=asked.device) < fewest
        if self.enough is not None:
            kept = kept | self.enough(scores)
        return torch.zeros_like(asked).scatter(1, order, kept.expand_as(asked)) & asked


def confidence(log_probs: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely token."""
    return log_probs.amax(dim=-1).exp()


def margin(log_probs: torch.Tensor) -> torch.Tensor:
    """Difference of probability between the two most likely tokens."""
    first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def negative_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Minus the entropy, in nats."""
    return -torch.special.entr(log_probs.exp()).sum(dim=-1)


def above(threshold: float | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Positions whose score is above the threshold (parallel decoding of Fast-dLLM, arXiv 2505.22618)."""
    return None if threshold is None else lambda scores: scores > threshold


def within_entropy(bound: float | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The most positions, of the lowest entropies, whose entropies but for the highest sum to the bound at most.

    That sum bounds what drawing them independently can lose to their joint distribution (EB-sampler, arXiv 2505.24857).
    """
    if bound is None:
        return None

    def enough(scores: torch.Tensor) -> torch.Tensor:
        entropies = -scores
        return entropies.cumsum(dim=1) - entropies <= bound

    return enough


CONFIDENCE = Strategy(
    "confidence",
    lambda config, canvas: AdaptiveFilling(config, canvas, confidence, above(config.confidence_threshold)),
    frozenset({"max_denoising_steps", "confidence_threshold"}),
    planned=False,
)
ENTROPY = Strategy(
    "entropy",
    lambda config, canvas: AdaptiveFilling(config, canvas, negative_entropy, within_entropy(config.entropy_bound)),
    frozenset({"max_denoising_steps", "entropy_bound"}),
    planned=False,
)
MARGIN = Strategy(
    "margin",
    lambda config, canvas: AdaptiveFilling(config, canvas, margin, None),
    frozenset({"max_denoising_steps"}),
    planned=False,
)
