"""Strategies: which positions come next, and how many. One file each.

A strategy lays steps over the positions to fill, before the first of them is drawn. It knows neither the tokens nor the
model nor the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig
from . import autoregressive, semi_autoregressive, strided


@dataclass(frozen=True)
class Strategy:
    """
    Attributes:
        name: what `generate(strategy=...)` takes.
        fields: the fields of the generation config that it reads besides `strategy`.
        required: those of them that must be set.
        steps: maps (number of positions to fill, config) to the step of each position, a long tensor.
    """

    name: str
    fields: frozenset[str]
    required: frozenset[str]
    steps: Callable[[int, DiffusionGenerationConfig], torch.Tensor]


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("autoregressive", frozenset(), frozenset(), autoregressive.steps),
        Strategy("strided", frozenset({"num_streams"}), frozenset({"num_streams"}), strided.steps),
        Strategy(
            "semi_autoregressive",
            frozenset({"block_length", "max_denoising_steps"}),
            frozenset({"block_length"}),
            semi_autoregressive.steps,
        ),
    )
}


def find_strategy(config: DiffusionGenerationConfig) -> Strategy:
    """The strategy that `config` names. Raises ValueError if there is none, or if it does not read what is set."""
    strategy = STRATEGIES.get(config.strategy)
    if strategy is None:
        raise ValueError(f"`strategy` must be one of {sorted(STRATEGIES)}, got {config.strategy!r}.")
    for field in DIFFUSION_FIELDS.keys() - {"strategy"}:
        value = getattr(config, field)
        if value is None and field in strategy.required:
            raise ValueError(f'`strategy="{strategy.name}"` needs `{field}`.')
        if value is not None and field not in strategy.fields:
            reading = sorted(name for name, other in STRATEGIES.items() if field in other.fields)
            raise ValueError(
                f'`{field}`={value!r} has no effect with `strategy="{strategy.name}"`; leave it out, or set `strategy` '
                f"to one of {reading}."
            )
    return strategy
