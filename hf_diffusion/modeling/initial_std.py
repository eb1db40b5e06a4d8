"""Linear layers that start with a scale of their own.

transformers initialises models from outside its own code module by module, and only modules that hold parameters
themselves. A layer that needs another scale than the rest therefore has to carry it.
"""

from torch import nn
from transformers import initialization as init


def linear_with_std(in_features: int, out_features: int, std: float, bias: bool = False) -> nn.Linear:
    """An ordinary `nn.Linear` whose weight starts as N(0, std^2) and whose bias starts at 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.initial_std = std  # type: ignore[assignment]
    return linear


def init_with_own_std(module: nn.Module) -> bool:
    """Initialise a layer made by `linear_with_std`; False if `module` is none."""
    std = getattr(module, "initial_std", None)
    if std is None or not isinstance(module, nn.Linear):
        return False
    init.normal_(module.weight, std=std)
    if module.bias is not None:
        init.zeros_(module.bias)
    return True
