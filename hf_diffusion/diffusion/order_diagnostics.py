"""What a learned order is like: numbers to watch while it is trained."""

import torch

from .order_bound import jump_chain_terms
from .plackett_luce import next_pick_entropy


@torch.compiler.disable  # of how many positions depends on values, and nothing is gained
def diagnostics(
    log_probs: torch.Tensor,
    exponents: torch.Tensor,
    reverse_exponents: torch.Tensor,
    masked: torch.Tensor,
    losses: torch.Tensor,
    to_predict: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Means over the rows of a batch, as scalars.

    Args:
        log_probs, reverse_exponents, masked: [copies, batch, length], of masked copies of a text.
        exponents: [batch, length], of the text itself.
        losses: [copies, batch], the estimate of the bound from each copy, in nats.
        to_predict: bool [batch, length].

    Returns:
        - `exponent_std`, `reverse_exponent_std`: spread of e over a text, and of its estimate over masked positions. 0
          is no order at all.
        - `order_entropy`: of the next position to be revealed, as a share of the greatest possible. 1 is no order.
        - `confidence_correlation`: of e with the log-probability of the token, over masked positions. Positive where
          easy tokens come first.
        - `order_kl`, `timing_cost`: what the bound pays, in nats per reveal, for an order and for times that are not
          those of the reverse process (see `jump_chain_terms`).
        - `copy_difference`: how much the estimates from two copies differ, in nats per token; its square is the
          variance that the gradient of the order has to do with.
    """
    exponents = exponents.expand_as(masked)
    terms = jump_chain_terms(log_probs, exponents, reverse_exponents, masked)
    several = masked.sum(dim=-1) > 1
    most = masked.sum(dim=-1).clamp(min=2).log()
    num_tokens = to_predict.sum().clamp(min=1)
    described = {
        "exponent_std": _std(exponents[0], to_predict).mean(),
        "reverse_exponent_std": _std(reverse_exponents, masked).mean(),
        "order_entropy": (next_pick_entropy(exponents, masked) / most * several).sum() / several.sum().clamp(min=1),
        "confidence_correlation": _correlation(exponents[masked], log_probs[masked]),
        "order_kl": terms.order.mean(),
        "timing_cost": terms.timing.mean(),
    }
    if len(losses) == 2:
        described["copy_difference"] = (losses[0] - losses[1]).abs().sum() / num_tokens
    return described


def _std(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row [..., length] over the positions `where`; 0 for a row without any."""
    count = where.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = (values * where).sum(dim=-1, keepdim=True) / count
    return (((values - mean) * where).square().sum(dim=-1, keepdim=True) / count).sqrt()[..., 0]


def _correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Pearson's; 0 where one of them does not vary."""
    first, second = first - first.mean(), second - second.mean()
    scale = first.norm() * second.norm()
    return torch.where(scale > 0, (first * second).sum() / scale, 0.0)
