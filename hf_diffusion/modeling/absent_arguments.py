"""Arguments that tools pass to any language model, such as PEFT to every causal one: None is as good as left out."""

from collections.abc import Callable
from functools import wraps
from typing import Any


ABSENT = {
    "inputs_embeds": "what is masked is told by its id: pass `input_ids`",
    "output_attentions": "attention runs in kernels that do not keep their weights: leave it out",
}
"""Name of an argument that `forward` does not have, and why."""


def without_absent_arguments(forward: Callable) -> Callable:
    """Makes `forward` accept None (or False) for the arguments that it does not have, and refuse anything else."""

    @wraps(forward)
    def forward_without(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, reason in ABSENT.items():
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"`{name}` is not supported by {type(self).__name__}: {reason}.")
        return forward(self, *args, **kwargs)

    return forward_without


__all__ = ["without_absent_arguments"]
