"""The bound of LoMDM on the likelihood of a text, by any of four estimators.

Two of them bound the sampler `generate(strategy="first_hitting")`: position by position, each in proportion to its
exponent. The other two stop at a small time, and bound one that reveals at once what is masked there, which `generate`
has not. Ancestral sampling comes close to both with many steps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..diffusion.order_bound import bound_terms, jump_chain_terms
from ..diffusion.order_masks import OrderEstimator, check_estimator, draw_masks, draw_masks_at


@dataclass(frozen=True)
class BoundEstimate:
    """Upper bounds on the negative log-likelihood of each text of a batch, in nats, from drawn masks.

    Attributes:
        bound: float64 [batch], (1) of `diffusion.order_bound`, which prices tokens, their order and its times.
        standard_error: [batch], of `bound`: how far other masks would have led.
        bound_without_timing: [batch], a tighter bound for the same sampler, which draws no times; with `"jump_chain"`
            only.
        standard_error_without_timing: [batch], of `bound_without_timing`.
        num_tokens: long [batch], the labels that the bound is on.
        estimator: how masks were drawn.
        sampler: the sampler whose law is bounded.
    """

    bound: torch.Tensor
    standard_error: torch.Tensor
    bound_without_timing: torch.Tensor | None
    standard_error_without_timing: torch.Tensor | None
    num_tokens: torch.Tensor
    estimator: str
    sampler: str


@torch.no_grad()
def estimate_lomdm_bound(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    estimator: OrderEstimator = "jump_chain",
    num_draws: int = 16,
    generator: torch.Generator | None = None,
) -> BoundEstimate:
    """Estimate the bound from independent draws of masks.

    Args:
        model: a `LoMDMForMaskedDiffusion`, in evaluation mode.
        input_ids: long [batch, length], texts without masks.
        attention_mask: [batch, length], 0 at padding.
        labels: long [batch, length], `input_ids` with -100 at tokens that are given; all are predicted if not given.
        estimator: `"jump_chain"` (recommended: the least variance, and nothing is cut off), `"mask_fraction"`,
            or `"power_time"` and `"uniform_time"` (the paper's), which stop at time `config.least_time` and add what it
            costs to reveal at once what is masked there: bounds for the sampler that does that.
        num_draws: passes of the network for each text, at least 2; twice as many with the last two.
        generator: source of randomness; torch's global one if not given.

    Raises:
        ValueError: before any pass, for a model in training mode, whose dropout would not be that of any sampler, and
            for fewer than two draws.
    """
    if model.training:
        raise ValueError("`model` is in training mode, and dropout would change the bound. Call `model.eval()`.")
    if num_draws < 2:
        raise ValueError(f"`num_draws` must be at least 2, got {num_draws}: the standard error comes from several.")
    if not getattr(model, "learns_order", False):
        raise ValueError(f"`model` must be a `LoMDMForMaskedDiffusion`, got {type(model).__name__}.")
    check_estimator(estimator)
    text, labels = model.read_text_and_labels(input_ids, attention_mask, input_ids if labels is None else labels)
    to_predict = labels != -100
    exponents = model.forward_exponents(text, attention_mask)
    least_time, center = model.config.least_time, model.config.c1
    truncated = {"uniform_time": 1 - least_time, "power_time": 1 - least_time**center}
    bounds, without_timing = [], []
    for _ in range(num_draws):
        masks = draw_masks(exponents, to_predict, estimator, generator, least_time=least_time, center=center)
        copies = model.read_masked_copies(text, labels, attention_mask, masks.masked)
        terms = bound_terms(copies.log_probs, exponents, copies.exponents, masks.masked)
        bound = (masks.weight * (terms.token + terms.velocity))[0].double()
        if estimator in truncated:
            masked = draw_masks_at(exponents, to_predict, least_time, generator=generator)
            copies = model.read_masked_copies(text, labels, attention_mask, masked)
            bound = truncated[estimator] * bound - copies.log_probs[0].sum(dim=-1).double()
        bounds.append(bound)
        if estimator == "jump_chain":
            chain = jump_chain_terms(copies.log_probs, exponents, copies.exponents, masks.masked)
            without_timing.append(((chain.token + chain.order)[0] * to_predict.sum(dim=-1)).double())
    sampler = 'generate(strategy="first_hitting")'
    if estimator in truncated:
        sampler += f", but for what is masked at time {least_time}, which is revealed at once (not in `generate`)"
    mean, error = _mean_and_error(bounds)
    mean_without, error_without = _mean_and_error(without_timing) if without_timing else (None, None)
    return BoundEstimate(mean, error, mean_without, error_without, to_predict.sum(dim=-1), estimator, sampler)


def _mean_and_error(draws: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.stack(draws)
    return values.mean(dim=0), values.std(dim=0) / len(draws) ** 0.5
