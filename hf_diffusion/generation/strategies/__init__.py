"""Strategies: which positions come next, and how many. One file each.

`semi_autoregressive` is blocks from left to right, filled one after another by one of the others (`block_strategy`).
"""

from ..configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig
from .adaptive import CONFIDENCE, ENTROPY, MARGIN
from .ancestral import ANCESTRAL
from .autoregressive import AUTOREGRESSIVE
from .filling import Strategy
from .first_hitting import FIRST_HITTING
from .spread import SPREAD
from .strided import STRIDED


SEMI_AUTOREGRESSIVE = "semi_autoregressive"
STRATEGIES = {
    strategy.name: strategy
    for strategy in (AUTOREGRESSIVE, STRIDED, ANCESTRAL, FIRST_HITTING, CONFIDENCE, ENTROPY, MARGIN)
}
"""What fills a whole canvas."""
BLOCK_STRATEGIES = {
    strategy.name: strategy for strategy in (SPREAD, ANCESTRAL, FIRST_HITTING, CONFIDENCE, ENTROPY, MARGIN)
}
"""What fills a block of semi-autoregressive decoding."""
BLOCK_FIELDS = {"block_length", "block_strategy", "sliding_window", "approximate_cache"}
"""Fields that semi-autoregressive decoding reads besides those of its block strategy."""


def find_strategy(config: DiffusionGenerationConfig) -> Strategy:
    """The strategy that fills the canvas, or each of its blocks.

    Raises:
        ValueError: if there is none of that name, or if it does not read what is set, or needs what is not.
    """
    in_blocks = config.strategy == SEMI_AUTOREGRESSIVE
    if in_blocks:
        argument, name, choices = "block_strategy", config.block_strategy, BLOCK_STRATEGIES
    else:
        argument, name, choices = "strategy", config.strategy, STRATEGIES
    if name not in choices:
        known = sorted(choices if in_blocks else [*choices, SEMI_AUTOREGRESSIVE])
        raise ValueError(f"`{argument}` must be one of {known}, got {name!r}.")
    strategy = choices[name]
    fields = {"strategy"} | strategy.fields | (BLOCK_FIELDS if in_blocks else set())
    required = strategy.required | ({"block_length"} if in_blocks else set())
    described = f'`strategy="{config.strategy}"`' + (f' and `block_strategy="{name}"`' if in_blocks else "")
    for field in DIFFUSION_FIELDS:
        value = getattr(config, field)
        if value is None and field in required:
            raise ValueError(f"{described} needs `{field}`.")
        if value is not None and value is not False and field not in fields:
            raise ValueError(f"`{field}`={value!r} has no effect with {described}; {_readers_of(field)}")
    return strategy


def _readers_of(field: str) -> str:
    if field in BLOCK_FIELDS:
        return f'leave it out, or set `strategy="{SEMI_AUTOREGRESSIVE}"`.'
    alone = sorted(name for name, strategy in STRATEGIES.items() if field in strategy.fields)
    inside = sorted(name for name, strategy in BLOCK_STRATEGIES.items() if field in strategy.fields)
    remedy = f"leave it out, or set `strategy` to one of {alone}"
    return f"{remedy}, or `block_strategy` to one of {inside}." if inside else f"{remedy}."
