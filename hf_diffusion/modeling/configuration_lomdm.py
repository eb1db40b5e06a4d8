"""Configuration of LoMDM, masked diffusion with a learned order of generation (arXiv 2602.02112)."""

from typing import Literal

from ..diffusion.schedules import describe_schedule, make_schedule
from .configuration_checks import checked
from .configuration_mdlm import MDLMConfig


@checked
class LoMDMConfig(MDLMConfig):
    r"""
    See `MDLMConfig` for the backbone. A token at position i is masked at time t with probability t^e(i), where

        e(i) = c1 + c2 (sigmoid(s(i)) - mean over the text of sigmoid(s))

    and s is the score that a head gives it (eq. 4). c1 is a change of time; c2 / c1 says how far orders may differ.

    Args:
        c1 (`float`, defaults to 0.7): exponent of a fresh model.
        c2 (`float`, defaults to 0.65): how far exponents may differ; 0 is MDLM.
        bound_estimator (`"uniform_time"`, `"power_time"`, `"mask_fraction"` or `"jump_chain"`, defaults to
            `"jump_chain"`): how masks are drawn in training (see `diffusion.order_masks`). All have the same mean, but
            for times below `least_time`, which the first two leave out; the first is the paper's.
    """

    model_type = "lomdm"
    keys_to_ignore_at_inference = ["past_key_values", "diagnostics"]

    c1: float | int = 0.7
    c2: float | int = 0.65
    bound_estimator: Literal["uniform_time", "power_time", "mask_fraction", "jump_chain"] = "jump_chain"

    def validate_exponents(self) -> None:
        """Raise ValueError for exponents that could be 0 or less (`@checked`)."""
        if not 0 <= self.c2 < self.c1:
            raise ValueError(
                f"`c2` ({self.c2}) must be at least 0 and less than `c1` ({self.c1}): the exponent of the probability "
                "of a mask goes down to `c1 - c2`, and from 0 on tokens would not become visible. Lower `c2`."
            )

    def validate_own_schedule(self) -> None:
        """Raise ValueError for settings of MDLM's that a learned order has no use for (`@checked`)."""
        reasons = {
            "time_conditioning": "positions have no common noise level that the network could be told",
            "block_size": "the order is learned over the whole text",
            "attend_to_padding": "padding has no place in an order",
            "noise_schedule": "the schedule is learned",
            "time_law": "`bound_estimator` says how times are drawn",
            "num_timesteps": "the bound is that of continuous time",
            "low_discrepancy": "times are always spread over the batch",
        }
        for name, reason in reasons.items():
            value, default = getattr(self, name), getattr(MDLMConfig, name)
            if name == "noise_schedule":
                default = describe_schedule(make_schedule(default))
            if value != default:
                raise ValueError(f"`{name}`={value!r} does not go with LoMDM: {reason}. Leave it out.")
        if not 0 < self.least_time < 1:
            raise ValueError(f"`least_time` must be more than 0 and less than 1, got {self.least_time}.")


__all__ = ["LoMDMConfig"]
