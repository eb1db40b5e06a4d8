"""Orders that a model has learned: it gives every masked position an exponent, its rate in the time -log t (LoMDM).

Position i, still masked at time t, is masked at s < t with probability (s/t)^e(i): it waits an exponential time of rate
e(i) on the scale of -log t. The exponents change whenever a token is drawn. So each position gets one exponential
budget beforehand, which it spends at its rate of the moment, and is revealed when it has none left: that is the same
law, and one uniform for each position decides the whole order.
"""

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import BlockwiseFilling, Canvas, Pass, Strategy


class LearnedOrderFilling(BlockwiseFilling):
    """
    With `max_denoising_steps` T, time goes from 1 to 0 in T equal steps: all positions whose time falls into a step are
    drawn together, from what was known before it, and the last step reveals whatever is left. Without, each is drawn
    at its own time, so the next position is drawn in proportion to its exponent.
    """

    reads_exponents = True

    def __init__(self, config: DiffusionGenerationConfig, canvas: Canvas) -> None:
        super().__init__(canvas)
        self.budget = -torch.log1p(-canvas.uniforms[:, 1])
        self.num_steps = config.max_denoising_steps
        self.steps_left = torch.zeros_like(self.block[:, 0])

    def next_pass(self, masked: torch.Tensor) -> Pass:
        step = super().next_pass(masked)
        self.steps_left = torch.where(self.begins, self.num_steps or 0, self.steps_left)
        return step

    def choose(self, asked: torch.Tensor, logits: torch.Tensor, exponents: torch.Tensor | None = None) -> torch.Tensor:
        assert exponents is not None
        rate = torch.zeros_like(self.budget).masked_scatter(asked, exponents.to(self.budget.dtype))
        waiting = (self.budget / rate).masked_fill(~asked, torch.inf)  # on the scale of -log t
        soonest = waiting.amin(dim=1)
        if self.num_steps is None:
            passed, kept = soonest, waiting <= soonest[:, None]
        else:
            # To the end of the step in which the first of them is revealed; the last step ends at time 0.
            reached = torch.ceil(self.steps_left * torch.exp(-soonest)).long() - 1
            left = reached.minimum(self.steps_left - 1).clamp(min=0)
            passed = torch.log(self.steps_left / left)
            kept = waiting <= passed[:, None]
            self.steps_left = torch.where(asked.any(dim=1), left, self.steps_left)
        kept = kept & asked
        self.budget = torch.where(asked & ~kept, self.budget - rate * passed[:, None], self.budget)
        return kept


class FastestFirst(BlockwiseFilling):
    """The position of the highest exponent next, without chance; the first of several that are equal."""

    reads_exponents = True

    def choose(self, asked: torch.Tensor, logits: torch.Tensor, exponents: torch.Tensor | None = None) -> torch.Tensor:
        assert exponents is not None
        rate = torch.full(asked.shape, -torch.inf, dtype=exponents.dtype, device=asked.device)
        rate[asked] = exponents
        return torch.zeros_like(asked).scatter(1, rate.argmax(dim=1, keepdim=True), True) & asked


def two_planes(config: DiffusionGenerationConfig) -> int:
    return 2


LEARNED_ANCESTRAL = Strategy(
    "ancestral",
    LearnedOrderFilling,
    frozenset({"max_denoising_steps"}),
    frozenset({"max_denoising_steps"}),
    planned=False,
    num_planes=two_planes,
)
LEARNED_FIRST_HITTING = Strategy("first_hitting", LearnedOrderFilling, planned=False, num_planes=two_planes)
VELOCITY = Strategy("velocity", lambda config, canvas: FastestFirst(canvas), planned=False)
