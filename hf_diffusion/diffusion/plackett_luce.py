"""Orders drawn without replacement by weights: Plackett-Luce, the order in which powers 1 - t^e reveal a text.

On the clock -log t, position n of a masked text is revealed after a time that is exponential with rate e[n]. So of
those still masked, n is next with probability e[n] / (sum of their e). Probabilities are in nats.
"""

import torch

from .orders import NEVER


def draw_ranks(exponents: torch.Tensor, uniforms: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """The rank of each position in an order drawn by Plackett-Luce, by the race of exponential times.

    Args:
        exponents: [..., length], positive where `eligible`.
        uniforms: [..., length] in [0, 1), independent. In float64 if there are many positions: in float32, some of a
            thousand have the same time.
        eligible: bool [..., length], the positions to order. The three are broadcast to one shape.

    Returns:
        Long [..., length], 0 for the first; `NEVER` where not eligible.
    """
    times = -torch.log1p(-uniforms) / exponents.detach()
    ranks = times.where(eligible, torch.inf).argsort(dim=-1).argsort(dim=-1)  # what is not eligible comes last
    return ranks.where(eligible, NEVER)


def log_prob_of_first(
    exponents: torch.Tensor, ranks: torch.Tensor, k: torch.Tensor, eligible: torch.Tensor
) -> torch.Tensor:
    """Log-probability that the first k of an order are these, in this order, in nats.

    The sum over j < k of log(e[j-th] / sum of e over all that come j-th or later).

    Args:
        exponents: [..., length], positive where `eligible`; gradients flow to these only.
        ranks: long [..., length], from `draw_ranks`.
        k: long [...], from 0 to the number of eligible positions.
        eligible: bool [..., length]. All broadcast to the shape of `ranks`.

    Returns:
        [...]; 0 for k = 0.
    """
    eligible = eligible.expand_as(ranks)
    order = ranks.where(eligible, ranks.shape[-1]).argsort(dim=-1)
    in_order = exponents.where(eligible, 0).gather(-1, order)
    rest = in_order.flip(-1).cumsum(dim=-1).flip(-1)
    among_first = torch.arange(ranks.shape[-1], device=ranks.device) < k[..., None]
    return (in_order.where(among_first, 1).log() - rest.where(among_first, 1).log()).sum(dim=-1)


def next_pick_entropy(exponents: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Entropy, in nats, of which position comes next: log of their number where it is all chance, 0 where it is none.

    Args:
        exponents: [..., length], positive where `masked`.
        masked: bool [..., length], the positions that have not come yet.

    Returns:
        [...]; 0 where nothing is masked.
    """
    weights = exponents.where(masked, 0)
    probability = weights / weights.sum(dim=-1, keepdim=True).where(masked.any(dim=-1, keepdim=True), 1)
    return -(probability * probability.where(masked, 1).log()).sum(dim=-1)
