"""Schedules per position, which may read the text: in them masked diffusion states an order (OeMDM, arXiv 2602.02112).

Given a text, every position is masked on its own schedule alpha[n](text, t), independently of the others. In reverse
time a masked position is revealed at its velocity -alpha' / (1 - alpha), so a position with a greater one comes
earlier. The order of MDM is random, that of left to right or of blocks is fixed, GenMD4's depends on the token. The
powers alpha = 1 - t^e are all that LoMDM needs: their velocity e/t depends on the time in the same way everywhere.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .schedules import NoiseSchedule


def reveal_probability(alpha_s: torch.Tensor, alpha_t: torch.Tensor) -> torch.Tensor:
    """Probability that a position masked at time t is visible at the earlier time s (posterior of OeMDM, section 3).

    (alpha_s - alpha_t) / (1 - alpha_t) of any schedule; 0 where alpha_t is 1, as nothing is masked there. Of powers, at
    small times, `reveal_probability_of_exponents` is more exact.

    Args:
        alpha_s, alpha_t: probabilities that a token is visible, alpha_s >= alpha_t, of one shape.
    """
    masked = 1 - alpha_t
    return torch.where(masked > 0, (alpha_s - alpha_t) / masked.where(masked > 0, 1), 0)


def reveal_probability_of_exponents(exponents: torch.Tensor, s_over_t: torch.Tensor | float) -> torch.Tensor:
    """`reveal_probability` of alpha = 1 - t^e: 1 - (s/t)^e, the same at all times with the same quotient.

    Args:
        exponents: e > 0, of any shape.
        s_over_t: in [0, 1], a number or a tensor that broadcasts to `exponents`. At 0 everything is revealed.
    """
    s_over_t = torch.as_tensor(s_over_t, dtype=exponents.dtype, device=exponents.device)
    return -torch.expm1(exponents * s_over_t.log())


def log_mask_probability(exponents: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """log(1 - alpha) = e log t of alpha = 1 - t^e (OeMDM, eq. 4), in nats.

    Args:
        exponents: e > 0, [..., length].
        log_t: [...], at most 0. A position of little e is masked at times that no float holds, hence the logarithm.
    """
    return exponents * log_t[..., None]


def log_visible_probability(exponents: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
    """log(alpha) = log(1 - t^e) of the same, in nats; -inf, with gradient 0, at t = 1, where nothing is visible.

    Values and gradients are finite wherever t < 1, and exact to rounding at either end.
    """
    log_masked = log_mask_probability(exponents, log_t)
    nothing_visible = log_masked == 0
    log_masked = log_masked.masked_fill(nothing_visible, -1)
    # Either form is inexact where the other is exact. What is not chosen must have a finite gradient nevertheless,
    # for 0 times infinity is none.
    near_0 = torch.log(-torch.expm1(log_masked))
    far_from_0 = torch.log1p(-torch.exp(log_masked.clamp(max=-math.log(2))))
    log_visible = torch.where(log_masked > -math.log(2), near_0, far_from_0)
    return log_visible.masked_fill(nothing_visible, -torch.inf)


class OrderSchedule(ABC):
    """alpha and velocity of every position. What of `text` is read, clean or noisy, is up to the schedule.

    Both methods take `text` long [batch, length] and t [batch] in (0, 1], and return [batch, length] in the dtype of t.
    """

    @abstractmethod
    def alpha(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is still visible at time t."""

    @abstractmethod
    def velocity(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """-alpha' / (1 - alpha): the rate, per unit of t, at which a masked token is revealed in reverse time."""


@dataclass(frozen=True)
class Shared(OrderSchedule):
    """One noise schedule for all positions, so that all orders are equally likely: MDM."""

    schedule: NoiseSchedule

    def alpha(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.schedule.alpha(t)[:, None].expand(text.shape)

    def velocity(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.schedule.velocity(t)[:, None].expand(text.shape)


@dataclass(frozen=True)
class Blocks(OrderSchedule):
    """Blocks one after another, from left to right, each on an interval of its own; block size 1 is left to right.

    With B blocks, numbered from 0, block b is masked on 1 - (b + 1)/B < t <= 1 - b/B: the first one last of all, so it
    is revealed first. Outside of it alpha stands still and the velocity is 0. A limit of schedules that fall strictly.

    Args:
        block_size: positions in a block; the last one may be shorter.
        schedule: alpha within a block, as its own interval runs from 0 to 1.
    """

    block_size: int
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {self.block_size}.")

    def alpha(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.schedule.alpha(self._own_time(text, t).clamp(0, 1))

    def velocity(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        own_time = self._own_time(text, t)
        inside = (own_time > 0) & (own_time <= 1)
        velocity = self.schedule.velocity(own_time.where(inside, 1)) * self._number(text)
        return velocity.where(inside, 0)

    def _number(self, text: torch.Tensor) -> int:
        return -(-text.shape[1] // self.block_size)

    def _own_time(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        block = torch.arange(text.shape[1], device=t.device) // self.block_size
        number = self._number(text)
        return t[:, None] * number - (number - 1 - block)


@dataclass(frozen=True)
class Powers(OrderSchedule):
    """alpha = 1 - t^e and velocity e/t, with exponents e that are a function of the text (OeMDM, eq. 4 and 5).

    Args:
        exponents: from `text` long [batch, length] to positive [batch, length].
    """

    exponents: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of_positions(cls, weights: torch.Tensor) -> "Powers":
        """The same exponents `weights` [length] for every text (arXiv 2511.19152)."""
        return cls(lambda text: weights.expand(text.shape))

    @classmethod
    def of_tokens(cls, weights: torch.Tensor) -> "Powers":
        """The exponent of a position is that of its token, `weights` [vocab_size]: GenMD4 (arXiv 2406.04329)."""
        return cls(lambda text: weights[text])

    def alpha(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -torch.expm1(log_mask_probability(self._positive(text), t.log()))

    def velocity(self, text: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self._positive(text) / t[:, None]

    def _positive(self, text: torch.Tensor) -> torch.Tensor:
        exponents = self.exponents(text)
        if not bool((exponents > 0).all()):
            raise ValueError(
                f"`exponents` must be positive, got {float(exponents.min())}: with less, tokens are visible at t = 1. "
                "Raise them, for example by softplus."
            )
        return exponents


def genmd4_reverse(log_probs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GenMD4's reverse process (arXiv 2406.04329): a position waits for each token v at rate probability[v] w[v] / t.

    Args:
        log_probs: [..., vocab_size] in nats, the classifier's.
        weights: w [vocab_size], positive: the exponents of the tokens, as in `Powers.of_tokens`.

    Returns:
        The exponents sum over v of probability[v] w[v], [...], and the law of the token that is revealed,
        probability[v] w[v] over that sum, [..., vocab_size], as log-probabilities in nats.
    """
    log_rates = log_probs + weights.log()
    log_exponents = log_rates.logsumexp(dim=-1)
    return log_exponents.exp(), log_rates - log_exponents[..., None]
