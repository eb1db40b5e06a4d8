"""Drawing a token from logits, exactly."""

from collections.abc import Callable

import torch


Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps scores [drawn, vocab_size], uniforms [drawn] and where they are, bool [batch, length], to tokens [drawn]."""

NOT_A_DISTRIBUTION = "`logits` hold NaN, or exclude every token: there is nothing to draw from."


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token; long [...] for logits [..., vocab_size].

    Raises:
        ValueError: if a row of logits is no distribution.
    """
    greatest, token = logits.max(dim=-1)
    if not bool(torch.isfinite(greatest).all()):
        raise ValueError(NOT_A_DISTRIBUTION)
    return token


def sample_categorical(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits) by inverting the cumulative distribution.

    One uniform per draw, where the exponential race takes one per vocabulary entry and, in float32, never draws a token
    of probability below 6e-8 (arXiv 2409.02908). Here the sum runs in float64, and a token of probability 0 is never
    drawn.

    Args:
        logits: [..., vocab_size]; -inf excludes a token.
        uniforms: float64 [...], in [0, 1).

    Returns:
        Long tensor [...].

    Raises:
        ValueError: if a row of logits is no distribution.
    """
    cumulative = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).cumsum(
        dim=-1, dtype=torch.float64
    )
    total = cumulative[..., -1:]
    if not bool(torch.isfinite(total).all()):
        raise ValueError(NOT_A_DISTRIBUTION)
    # Rounding may make u * total equal to the total; the draw must stay below it.
    below_total = torch.minimum(uniforms[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below_total, right=True).squeeze(-1)


def draw_at_random(scores: torch.Tensor, uniforms: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A `Draw`: from the law that the scores are of."""
    return sample_categorical(scores, uniforms)


def draw_most_likely(scores: torch.Tensor, uniforms: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A `Draw`: without chance."""
    return most_likely(scores)


def exclude(token_id: int, logits: torch.Tensor) -> None:
    """In place: text never holds the sign for a position to fill, which may be in the vocabulary."""
    if token_id < logits.shape[-1]:
        logits[..., token_id] = -torch.inf
