"""The bound of masked diffusion whose schedules state an order (OeMDM, arXiv 2602.02112, Prop. 3.2), term by term.

Position n of a text is masked at time t with probability t^e[n], e being a function of the text. In reverse time it is
revealed at rate e[n]/t, which the model, seeing but the masks, takes to be ê[n]/t. For p the model's probability of
the clean token, -log p(text) is at most

    integral from 0 to 1 of E[ sum over masked n of -e log p + e log(e/ê) - e + ê ] dt / t                           (1)

in nats. On the clock -log t nothing depends on the time but through the masks. So the same is a sum over the states of
a Plackett-Luce order, and with q = e/R for R the sum of e over the masked, q̂ and R̂ likewise, it is

    sum over k < length of E[ sum over masked n of -q log p + KL(q | q̂) + R̂/R - 1 - log(R̂/R) ]                      (2)

for the masks that are left after k positions. The last part is what the model pays for not knowing when the next token
comes. Without it, (2) is lower than (1) and bounds the same likelihood: that of drawing a position by q̂, then its
token, until none is masked, which is what the process of (1) does whenever it does it (LO-ARM, arXiv 2503.05979).
"""

from typing import NamedTuple

import torch


class BoundTerms(NamedTuple):
    """The integrand of (1), times t. Both [...], in nats, and sums over masked positions.

    Attributes:
        token: of -e log p.
        velocity: of e log(e/ê) - e + ê, at least 0, and 0 where the model knows every e.
    """

    token: torch.Tensor
    velocity: torch.Tensor


class JumpChainTerms(NamedTuple):
    """The summand of (2), for one set of masks. All [...], in nats.

    Attributes:
        token: mean of -log p of the token that comes next, over the law q of its position.
        order: KL(q | q̂), what not knowing that law costs.
        timing: R̂/R - 1 - log(R̂/R), what not knowing when it comes costs.
    """

    token: torch.Tensor
    order: torch.Tensor
    timing: torch.Tensor


def bound_terms(
    log_probs: torch.Tensor, exponents: torch.Tensor, reverse_exponents: torch.Tensor, masked: torch.Tensor
) -> BoundTerms:
    """What a state of masks counts in the bound (1). Of other schedules, with their velocities in place of exponents.

    Args:
        log_probs: [..., length] in nats, of the clean token at each position.
        exponents: e [..., length], at least 0.
        reverse_exponents: ê [..., length], positive wherever e is; the model's, from the masked text.
        masked: bool [..., length]. Elsewhere the others may hold anything. All are broadcast to one shape.
    """
    log_probs, exponents, reverse_exponents = _where_masked(log_probs, exponents, reverse_exponents, masked)
    velocity = _rate_divergence(exponents, reverse_exponents)
    return BoundTerms((-exponents * log_probs).sum(dim=-1), velocity.sum(dim=-1))


def jump_chain_terms(
    log_probs: torch.Tensor, exponents: torch.Tensor, reverse_exponents: torch.Tensor, masked: torch.Tensor
) -> JumpChainTerms:
    """The same with the choice of the position and its time apart, as in (2). Their sum, times R, is that of (1).

    Args:
        log_probs, exponents, reverse_exponents, masked: as in `bound_terms`; both exponents positive where masked.

    Returns:
        Terms that are 0 where nothing is masked.
    """
    log_probs, exponents, reverse_exponents = _where_masked(log_probs, exponents, reverse_exponents, masked)
    done = ~masked.any(dim=-1)
    rate = exponents.sum(dim=-1).masked_fill(done, 1)
    reverse_rate = reverse_exponents.sum(dim=-1).masked_fill(done, 1)
    law, reverse_law = exponents / rate[..., None], reverse_exponents / reverse_rate[..., None]
    return JumpChainTerms(
        (-law * log_probs).sum(dim=-1),
        _rate_divergence(law, reverse_law).sum(dim=-1),
        _rate_divergence(rate, reverse_rate) / rate,
    )


def rloo_loss(losses: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """The mean of two draws' losses, with the gradient of its expectation (OeMDM, eq. 8; leave-one-out REINFORCE).

    The masks of both depend on the exponents that are trained, and no gradient flows through a draw. So half of the
    difference of the losses, held fixed, times the gradient of that of the log-probabilities is added to the gradient,
    and nothing to the value: each draw has the other's loss as its baseline.

    Args:
        losses: [2, batch] in nats, of two independent draws.
        log_probs: [2, batch] in nats, differentiable, of drawing these masks (`OrderMasks.log_prob`).

    Returns:
        [batch] in nats.

    Raises:
        ValueError: unless both are of two draws.
    """
    if losses.shape[0] != 2 or losses.shape != log_probs.shape:
        raise ValueError(
            f"`losses` and `log_probs` must both have shape [2, batch], got {tuple(losses.shape)} and "
            f"{tuple(log_probs.shape)}. Draw masks with `num_copies`=2."
        )
    difference = log_probs[0] - log_probs[1]
    score = (difference - difference.detach()) * (losses[0] - losses[1]).detach()
    return losses.mean(dim=0) + score / 2


def _where_masked(
    log_probs: torch.Tensor, exponents: torch.Tensor, reverse_exponents: torch.Tensor, masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three with 0 where not `masked`, so that nothing there counts or has a gradient, not even an infinity."""
    return log_probs.where(masked, 0), exponents.where(masked, 0), reverse_exponents.where(masked, 0)


def _rate_divergence(rate: torch.Tensor, reverse_rate: torch.Tensor) -> torch.Tensor:
    """rate log(rate / reverse) - rate + reverse, elementwise: the divergence of Poisson processes, per unit of time.

    As rate (d - log(1 + d)) of the relative error d it keeps its digits, and its sign, where both are nearly equal.
    Of laws that sum to 1, the sum of it is KL.
    """
    waits = rate > 0
    error = ((reverse_rate - rate) / rate.where(waits, 1)).where(waits, 0)
    return torch.where(waits, rate * (error - torch.log1p(error)), reverse_rate)
