"""Ancestral sampling that takes tokens back (ReMDM, arXiv 2503.00307): a drawn position may be masked again.

From time t to s a drawn position is masked again with probability sigma, and a masked one is revealed with probability
(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the share of masked positions is that of plain sampling. sigma
is at most sigma_max = min(1, (1 - alpha_s) / alpha_t); `"cap"` takes min(strength, sigma_max), `"rescale"` takes
strength * sigma_max. The last step masks nothing.
"""

import itertools

import torch

from ..configuration import DiffusionGenerationConfig
from .filling import Canvas, Filling, Pass


def num_planes(config: DiffusionGenerationConfig) -> int:
    """For remasking a token and a decision in every step; else one of each for every position."""
    return 2 if config.remasking is None else 2 * config.max_denoising_steps


def remasking_probability(kind: str, strength: float, masked_before: float, masked_after: float) -> float:
    """sigma of a step between two shares 1 - alpha of masked positions."""
    most = min(1.0, masked_after / (1 - masked_before)) if masked_before < 1 else 1.0
    return min(strength, most) if kind == "cap" else strength * most


class RemaskingFilling(Filling):
    """Each row goes on by itself to its next step in which a position is revealed: only those need a pass."""

    def __init__(self, config: DiffusionGenerationConfig, canvas: Canvas) -> None:
        assert config.max_denoising_steps is not None
        self.to_fill, self.block = canvas.to_fill, canvas.block
        self.num_steps = config.max_denoising_steps
        self.levels = canvas.mask_levels(self.num_steps).to(canvas.uniforms.device)
        levels = self.levels.tolist()
        self.sigma = self.levels.new_tensor(
            [
                remasking_probability(config.remasking, config.remasking_strength, before, after)
                for before, after in itertools.pairwise(levels)
            ]
        )
        self.decisions, self.tokens = canvas.uniforms.split(self.num_steps, dim=1)
        self.rows = torch.arange(len(self.block), device=self.block.device)
        self.last_step = self.num_steps * (torch.where(self.to_fill, self.block, -1).amax(dim=1) + 1)
        self.steps_taken = torch.zeros_like(self.last_step)
        self.to_remask = torch.zeros_like(self.to_fill)

    def next_pass(self, masked: torch.Tensor) -> Pass:
        # What the step of the last pass takes back, it takes back after that pass.
        remasked, self.to_remask = self.to_remask, torch.zeros_like(masked)
        masked, asked = masked | remasked, torch.zeros_like(masked)
        waiting = self.steps_taken < self.last_step
        while bool(waiting.any()):
            taken = self.steps_taken.clamp(max=self.last_step - 1)
            step, here = taken % self.num_steps, self.to_fill & (self.block == (taken // self.num_steps)[:, None])
            before, after, sigma = self.levels[step], self.levels[step + 1], self.sigma[step]
            reveal = (before - after + sigma * (1 - before)) / before
            uniforms, here = self.decisions[self.rows, step], here & waiting[:, None]
            revealed = here & masked & (uniforms < reveal[:, None])
            taken_back = here & ~masked & (uniforms < sigma[:, None])
            found = revealed.any(dim=1)
            asked |= revealed
            self.to_remask |= taken_back & found[:, None]
            remasked = remasked | (taken_back & ~found[:, None])
            masked = masked | remasked
            self.steps_taken += waiting
            waiting = (self.steps_taken < self.last_step) & ~asked.any(dim=1)
        step = (self.steps_taken - 1).clamp(min=0) % self.num_steps
        return Pass(asked, self.tokens[self.rows, step], self.levels[step], remasked)

    def unsettled(self, masked: torch.Tensor) -> torch.Tensor:
        """All of a block until its last step, which masks nothing, and what is behind it."""
        blocks_done = self.steps_taken // self.num_steps
        return masked | (self.to_fill & (self.block >= blocks_done[:, None]))
