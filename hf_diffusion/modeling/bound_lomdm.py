"""The bound of LoMDM on the likelihood of a text, by any of four estimators.

Two of them bound the sampler `generate(strategy="first_hitting")`: position by position, each in proportion to its
exponent. The other two stop at a small time, and bound one that reveals at once what is masked there, which `generate`
has not. Ancestral sampling comes close to both with many steps.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..diffusion.order_bound import bound_terms, jump_chain_terms
from ..diffusion.order_masks import OrderEstimator, check_estimator, draw_masks, draw_masks_at
from ..generation.scoring import BoundEstimator, ScoredText


WITHOUT_TIMING = "jump_chain_without_timing"
SCORE_ESTIMATORS = (WITHOUT_TIMING, *get_args(OrderEstimator)[::-1])
"""What `score` takes, the best first."""


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
    bound = OrderBound(model, text, labels, attention_mask, estimator)
    draws = [bound.draw(generator=generator) for _ in range(num_draws)]
    mean, error = _mean_and_error([draw[0] for draw in draws])
    mean_without, error_without = None, None
    if estimator == "jump_chain":
        mean_without, error_without = _mean_and_error([draw[1] for draw in draws if draw[1] is not None])
    num_tokens = (labels != -100).sum(dim=-1)
    return BoundEstimate(mean, error, mean_without, error_without, num_tokens, estimator, bound.sampler)


class OrderBound:
    """One text, and draws of its bound.

    Args:
        model, attention_mask, estimator: as in `estimate_lomdm_bound`.
        text, labels: from `model.read_text_and_labels`.

    Attributes:
        sampler: whose law is bounded.
        nfe: passes made so far.
    """

    def __init__(
        self,
        model: Any,
        text: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        estimator: OrderEstimator,
    ) -> None:
        self.model, self.text, self.labels, self.attention_mask = model, text, labels, attention_mask
        self.estimator, self.to_predict = estimator, labels != -100
        self.exponents = model.forward_exponents(text, attention_mask)
        self.nfe = 1
        least_time = model.config.least_time
        self.left_out = {"uniform_time": least_time, "power_time": least_time**model.config.c1}.get(estimator)
        self.sampler = 'generate(strategy="first_hitting")'
        if self.left_out is not None:
            self.sampler += (
                f", but for what is masked at time {least_time}, which is revealed at once (not in `generate`)"
            )

    def draw(
        self, generator: torch.Generator | None = None, uniforms: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The bound (1) of `diffusion.order_bound`, and with "jump_chain" that without timing; float64 [batch] in nats.

        Args:
            generator: source of randomness; torch's global one if neither is given.
            uniforms: [batch, 3, length] in [0, 1), in its place.
        """
        least_time, mask_uniforms = self.model.config.least_time, None
        if uniforms is not None:
            first = self.to_predict.int().argmax(dim=1, keepdim=True)
            mask_uniforms = (uniforms[:, 1].gather(1, first)[:, 0], uniforms[None, :, 0])
        masks = draw_masks(
            self.exponents,
            self.to_predict,
            self.estimator,
            generator,
            least_time=least_time,
            center=self.model.config.c1,
            uniforms=mask_uniforms,
        )
        copies = self._read(masks.masked)
        terms = bound_terms(copies.log_probs, self.exponents, copies.exponents, masks.masked)
        bound = (masks.weight * (terms.token + terms.velocity))[0].double()
        if self.estimator == "jump_chain":
            chain = jump_chain_terms(copies.log_probs, self.exponents, copies.exponents, masks.masked)
            return bound, ((chain.token + chain.order)[0] * self.to_predict.sum(dim=-1)).double()
        if self.left_out is not None:
            last_uniforms = None if uniforms is None else uniforms[None, :, 2]
            masked = draw_masks_at(
                self.exponents, self.to_predict, least_time, generator=generator, uniforms=last_uniforms
            )
            bound = (1 - self.left_out) * bound - self._read(masked).log_probs[0].sum(dim=-1).double()
        return bound, None

    def _read(self, masked: torch.Tensor) -> Any:
        self.nfe += 1
        return self.model.read_masked_copies(self.text, self.labels, self.attention_mask, masked)


class LearnedOrderBound(BoundEstimator):
    """The bound as `score` estimates it.

    Args:
        model: a `LoMDMForMaskedDiffusion`.
        name: an `OrderEstimator`, or "jump_chain_without_timing", the tighter bound of `BoundEstimate`.
        text: to score.
    """

    num_planes = 3

    def __init__(self, model: Any, name: str, text: ScoredText) -> None:
        self.with_timing = name != WITHOUT_TIMING
        estimator: Any = name if self.with_timing else "jump_chain"
        self.bound = OrderBound(model, text.input_ids, text.labels, text.attention_mask, estimator)
        self.sampler = self.bound.sampler

    def draw(self, uniforms: torch.Tensor) -> torch.Tensor:
        bound, without_timing = self.bound.draw(uniforms=uniforms)
        self.nfe = self.bound.nfe
        if self.with_timing:
            return -bound
        assert without_timing is not None
        return -without_timing


def _mean_and_error(draws: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.stack(draws)
    return values.mean(dim=0), values.std(dim=0) / len(draws) ** 0.5
