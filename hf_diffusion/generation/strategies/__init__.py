"""Strategies: which positions come next, and how many. One file each.

`semi_autoregressive` is blocks from left to right, filled one after another by one of the others (`block_strategy`).
"""

from ..configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig
from .adaptive import CONFIDENCE, ENTROPY, MARGIN
from .ancestral import ANCESTRAL
from .autoregressive import AUTOREGRESSIVE
from .filling import Strategy
from .first_hitting import FIRST_HITTING
from .learned_order import LEARNED_ANCESTRAL, LEARNED_FIRST_HITTING, VELOCITY
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
LEARNED_ORDERS = {strategy.name: strategy for strategy in (LEARNED_ANCESTRAL, LEARNED_FIRST_HITTING, VELOCITY)}
"""What does either in a model that has learned an order, under the names of what they do in others."""
BLOCK_FIELDS = {"block_length", "block_strategy", "sliding_window", "approximate_cache"}
"""Fields that semi-autoregressive decoding reads besides those of its block strategy."""


def find_strategy(config: DiffusionGenerationConfig, learns_order: bool = False) -> Strategy:
    """The strategy that fills the canvas, or each of its blocks.

    Args:
        learns_order: the model has learned an order, which is used unless `config.learned_order` is False.

    Raises:
        ValueError: if there is none of that name, or if it does not read what is set, or needs what is not.
    """
    in_blocks = config.strategy == SEMI_AUTOREGRESSIVE
    if in_blocks:
        argument, name, choices = "block_strategy", config.block_strategy, BLOCK_STRATEGIES
    else:
        argument, name, choices = "strategy", config.strategy, STRATEGIES
    if learns_order and config.learned_order is not False:
        choices = choices | LEARNED_ORDERS
    if name == VELOCITY.name and name not in choices:
        raise ValueError(
            f'`{argument}="{name}"` follows an order that the model has learned'
            + (", which `learned_order=False` ignores." if learns_order else "; this one has not learned any.")
        )
    if name not in choices:
        known = sorted(choices if in_blocks else [*choices, SEMI_AUTOREGRESSIVE])
        raise ValueError(f"`{argument}` must be one of {known}, got {name!r}.")
    strategy = choices[name]
    fields = {"strategy"} | strategy.fields | (BLOCK_FIELDS if in_blocks else set())
    if learns_order and name in LEARNED_ORDERS:
        fields.add("learned_order")
    required = strategy.required | ({"block_length"} if in_blocks else set())
    described = f'`strategy="{config.strategy}"`' + (f' and `block_strategy="{name}"`' if in_blocks else "")
    for field in DIFFUSION_FIELDS:
        value = getattr(config, field)
        if value is None and field in required:
            raise ValueError(f"{described} needs `{field}`.")
        if value is not None and (value is not False or field == "learned_order") and field not in fields:
            remedy = _readers_of(field)
            if strategy in LEARNED_ORDERS.values() and name in STRATEGIES and field in STRATEGIES[name].fields:
                remedy = "leave it out, or set `learned_order=False`, with which the strategy reads it."
            raise ValueError(f"`{field}`={value!r} has no effect with {described}; {remedy}")
    return strategy


def _readers_of(field: str) -> str:
    if field in BLOCK_FIELDS:
        return f'leave it out, or set `strategy="{SEMI_AUTOREGRESSIVE}"`.'
    alone = sorted(name for name, strategy in STRATEGIES.items() if field in strategy.fields)
    inside = sorted(name for name, strategy in BLOCK_STRATEGIES.items() if field in strategy.fields)
    if field == "learned_order":
        return f"leave it out, or take one of {sorted(LEARNED_ORDERS)} with a model that has learned an order."
    remedy = f"leave it out, or set `strategy` to one of {alone}"
    return f"{remedy}, or `block_strategy` to one of {inside}." if inside else f"{remedy}."
