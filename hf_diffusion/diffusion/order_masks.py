"""Masks for the bound of `diffusion.order_bound`: draws of a time, or of a number of tokens, and of masks given that.

All estimators have the same mean but for the least times, and differ in how heavy their tails are. With times uniform
the second moment of a position with exponent e is the integral of t^(e - 2), which only `least_time` keeps finite where
e <= 1. By the mask fraction u it is that of 1/u, whatever the exponents: still infinite, but slowly so. The jump chain
draws no time, and its weights have a bound.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch

from .masking import low_discrepancy
from .order_schedules import log_mask_probability, log_visible_probability
from .plackett_luce import draw_ranks, log_prob_of_first


_NEWTON_STEPS = 20  # twice what it takes for the hardest rows found with exponents in (0.01, 3)

OrderEstimator = Literal["uniform_time", "power_time", "mask_fraction", "jump_chain"]


class OrderMasks(NamedTuple):
    """
    Attributes:
        masked: bool [copies, batch, length], copies independent given the time, or the number, of their row.
        weight: [copies, batch], by which to multiply the sum of `bound_terms`. With "jump_chain", a function of the
            exponents that gradients flow through; a constant otherwise.
        log_prob: [copies, batch] in nats, differentiable, of drawing what was drawn: the masks given their time, or the
            visible tokens in their order given their number.
        t: [batch] in float64, the times, which may be 0 by underflow; None with "jump_chain", which has none.
    """

    masked: torch.Tensor
    weight: torch.Tensor
    log_prob: torch.Tensor
    t: torch.Tensor | None


@torch.compiler.disable  # draws at random, and checks values
def draw_masks(
    exponents: torch.Tensor,
    eligible: torch.Tensor,
    estimator: OrderEstimator,
    generator: torch.Generator | None = None,
    num_copies: int = 1,
    least_time: float = 1e-3,
    center: float = 1.0,
    uniforms: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> OrderMasks:
    """Draw masks such that the mean of weight * (token + velocity) of `bound_terms` is the bound.

    - "uniform_time": t uniform from `least_time` to 1, weight 1/t. As published.
    - "power_time": the probability t^center of a mask uniform instead, from that at `least_time` to 1, weight
      1 / (center t^center). With the exponents about `center`, this is what uniform times are to exponents about 1.
    - "mask_fraction": the expected fraction of masks uniform from 0 to 1, whatever the exponents.
    - "jump_chain": the number of visible tokens uniform from 0 to all but one, and these by Plackett-Luce; weight
      (number eligible) / (sum of exponents over masked). Recommended: no time, no tails, no truncation.

    In the first two, the mean over `least_time` to 1 stands for that over 0 to 1 (as in `TimeSampling`). What bounds
    the likelihood is (1 - least_time^center) times it, `center` being 1 in the first, plus the negative log-likelihood
    of the tokens still masked at `least_time` (`draw_masks_at`), for the sampler that draws all these in one last step.

    Times, or numbers, are spread evenly over the batch and dealt to its rows at random.

    Args:
        exponents: e [batch, length] in float32 or wider, positive where `eligible`; elsewhere anything.
        eligible: bool [batch, length], False at padding and given tokens, which are never masked and count nowhere.
        generator: source of randomness; torch's global one on the device of `exponents` if not given.
        num_copies: masks per row, all for the same time or number. `rloo_loss` takes 2.
        least_time: of the first two estimators.
        center: of "power_time".
        uniforms: [batch] for times or numbers and [num_copies, batch, length] for masks, in [0, 1), to draw from. Drawn
            themselves if not given, those of the times spread over the batch.

    Returns:
        Masks; nothing is masked, and what is weighted is 0, in rows without an eligible position.

    Raises:
        ValueError: for an unknown estimator, numbers out of range, exponents that are too narrow or not positive.
    """
    check_estimator(estimator)
    if not 0 < least_time < 1:
        raise ValueError(f"`least_time` must be more than 0 and less than 1, got {least_time}.")
    if not 0 < center < math.inf:
        raise ValueError(f"`center` must be positive, got {center}. Give the exponent about which all others lie.")
    exponents = _checked(exponents, eligible, num_copies)
    if uniforms is None:
        time_uniforms = _dealt_uniforms(exponents, generator)
        token_uniforms = _uniforms((num_copies, *exponents.shape), exponents, generator)
    else:
        time_uniforms, token_uniforms = (given.to(exponents.device, torch.float64) for given in uniforms)
        check_uniforms(uniforms, (num_copies, *exponents.shape))
    if estimator == "jump_chain":
        number_eligible = eligible.sum(dim=-1)
        number_visible = (time_uniforms * number_eligible).long()  # a product with less than 1 is not rounded up
        ranks = draw_ranks(exponents, token_uniforms, eligible)
        masked = ranks >= number_visible[:, None]
        rate = exponents.where(masked, 0).sum(dim=-1)
        weight = number_eligible / rate.where(number_eligible > 0, 1)
        log_prob = log_prob_of_first(exponents, ranks, number_visible.expand(num_copies, -1), eligible)
        return OrderMasks(masked, weight, log_prob, None)
    if estimator == "mask_fraction":
        log_t, weight = _time_of_mask_fraction(exponents, eligible, 1 - time_uniforms)
    else:
        power = center if estimator == "power_time" else 1.0
        least = least_time**power
        probability = least + (1 - least) * (1 - time_uniforms)
        log_t, weight = probability.log() / power, 1 / (power * probability)
    masked = _below_mask_probability(token_uniforms, exponents, eligible, log_t)
    log_prob = log_prob_of_masks(exponents, log_t.to(exponents.dtype), masked, eligible)
    return OrderMasks(masked, weight.to(exponents.dtype).expand(num_copies, -1), log_prob, log_t.exp())


def check_estimator(estimator: str) -> None:
    """Raise ValueError for an estimator that is none."""
    if estimator not in get_args(OrderEstimator):
        raise ValueError(f"`estimator` must be one of {list(get_args(OrderEstimator))}, got {estimator!r}.")


def check_uniforms(uniforms: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless `uniforms` are numbers in [0, 1), [batch] and [copies, batch, length] = `shape`."""
    found = tuple(tuple(values.shape) for values in uniforms)
    if found != (shape[1:2], shape):
        raise ValueError(f"`uniforms` must have shapes {shape[1:2]} and {shape}, got {' and '.join(map(str, found))}.")
    for values in uniforms:
        if values.numel() and not bool(((values >= 0) & (values < 1)).all()):
            raise ValueError(
                f"`uniforms` must lie in [0, 1), got {float(values.min())} to {float(values.max())}. `torch.rand` "
                "draws such numbers."
            )


def draw_masks_at(
    exponents: torch.Tensor,
    eligible: torch.Tensor,
    t: float,
    generator: torch.Generator | None = None,
    num_copies: int = 1,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masks at one time, for the reconstruction term: each eligible position with probability t^e.

    Args:
        exponents, eligible, generator, num_copies: as in `draw_masks`.
        t: in (0, 1].
        uniforms: [num_copies, batch, length] in [0, 1), to draw from; drawn themselves if not given.

    Returns:
        Bool [copies, batch, length].

    Raises:
        ValueError: as `draw_masks`.
    """
    if not 0 < t <= 1:
        raise ValueError(f"`t` must be more than 0 and at most 1, got {t}.")
    exponents = _checked(exponents, eligible, num_copies)
    if uniforms is None:
        uniforms = _uniforms((num_copies, *exponents.shape), exponents, generator)
    log_t = uniforms.new_full(exponents.shape[:1], math.log(t))
    return _below_mask_probability(uniforms, exponents, eligible, log_t)


def log_prob_of_masks(
    exponents: torch.Tensor, log_t: torch.Tensor, masked: torch.Tensor, eligible: torch.Tensor
) -> torch.Tensor:
    """log q(masks | text, t): of masking each eligible position with probability t^e, and these were. In nats.

    Args:
        exponents: e [batch, length], positive where `eligible`; gradients flow to these.
        log_t: [batch], at most 0.
        masked: bool [..., batch, length], False where not eligible.
        eligible: bool [batch, length].

    Returns:
        [..., batch].
    """
    exponents = exponents.where(eligible, 1)
    log_masked, log_visible = log_mask_probability(exponents, log_t), log_visible_probability(exponents, log_t)
    return torch.where(masked, log_masked, log_visible).where(eligible, 0).sum(dim=-1)


def _checked(exponents: torch.Tensor, eligible: torch.Tensor, num_copies: int) -> torch.Tensor:
    """`exponents` with 1 where not eligible, where anything may be, not-a-number included."""
    if num_copies < 1:
        raise ValueError(f"`num_copies` must be at least 1, got {num_copies}.")
    if eligible.shape != exponents.shape or eligible.dtype != torch.bool:
        raise ValueError(
            f"`eligible` must be a bool tensor of the shape of `exponents` {tuple(exponents.shape)}, got "
            f"{eligible.dtype} {tuple(eligible.shape)}."
        )
    if torch.finfo(exponents.dtype).bits < 32:
        raise ValueError(f"`exponents` must be float32 or wider, got {exponents.dtype}. Compute them in float32.")
    exponents = exponents.where(eligible, 1)
    if not bool((exponents > 0).all()):
        raise ValueError(
            f"`exponents` must be positive where `eligible`, got {float(exponents.min())}. c1 > c2 makes them so, "
            "unless weights or text are not sound (NaN)."
        )
    return exponents


def _uniforms(shape: tuple[int, ...], exponents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    # Float64: multiples of 2^-24 are too coarse for masks at small times and for races of a thousand tokens.
    device = exponents.device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device).to(exponents.device)


def _dealt_uniforms(exponents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """[batch] in [0, 1), one in each of as many equal parts, in random order: rows that are scored again and again
    must not get the same part each time."""
    uniforms = low_discrepancy(_uniforms(exponents.shape[:1], exponents, generator))
    device = exponents.device if generator is None else generator.device
    return uniforms[torch.randperm(len(uniforms), generator=generator, device=device).to(exponents.device)]


def _below_mask_probability(
    uniforms: torch.Tensor, exponents: torch.Tensor, eligible: torch.Tensor, log_t: torch.Tensor
) -> torch.Tensor:
    return (uniforms < log_mask_probability(exponents.detach().double(), log_t).exp()) & eligible


def _time_of_mask_fraction(
    exponents: torch.Tensor, eligible: torch.Tensor, fraction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log t [batch] at which the mean of t^e over eligible positions is `fraction` [batch] in (0, 1], and the weight.

    The weight 1 / (mean of e t^e) is 1/t over the density of t. Neither has a gradient.
    """
    counted = eligible | ~eligible.any(dim=-1, keepdim=True)  # a row without any has to have some time or other
    exponents = exponents.detach().double()
    number = counted.sum(dim=-1)

    def at(log_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The log of the mean of t^e, and its derivative by log t."""
        log_masked = log_mask_probability(exponents, log_t).where(counted, -torch.inf)
        share = log_masked.softmax(dim=-1)
        return log_masked.logsumexp(dim=-1) - number.log(), (share * exponents).sum(dim=-1)

    # The log of the mean is a convex, increasing function of log t. So Newton's method, from a point where it is too
    # large, comes down to the root without ever passing it.
    log_t = fraction.log() / exponents.where(counted, 0).amax(dim=-1)
    for _ in range(_NEWTON_STEPS):
        value, slope = at(log_t)
        log_t = log_t - (value - fraction.log()) / slope
    value, slope = at(log_t)
    return log_t, 1 / (value.exp() * slope)
