"""Noise schedules: how likely a token is to be masked at time t, and every other quantity that follows from that.

Time runs from 0 (the text) to 1 (all masks). `alpha(t)` is the probability that a token is still visible at time t,
`sigma(t) = -log alpha(t)` the noise level in nats. A network that is conditioned on noise reads `sigma`, never `t`; the
two are told apart by name everywhere.

The functions keep the dtype of their argument. None of them subtracts an alpha close to 1 from 1, so that small
probabilities of a mask keep their digits in float32.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """A noise schedule. Times are tensors with values in [0, 1], of any shape; results have the same shape."""

    name: ClassVar[str]

    @abstractmethod
    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level -log alpha(t), in nats."""

    @abstractmethod
    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        """Derivative of `sigma` by t."""

    @abstractmethod
    def time_at_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time t at which the noise level is `sigma`: the inverse of `sigma`."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Probability that a token is still visible at time t."""
        return torch.exp(-self.sigma(t))

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """Probability 1 - alpha(t) that a token is masked at time t."""
        return -torch.expm1(-self.sigma(t))

    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor:
        """The time t at which a token is masked with `probability`: the inverse of `mask_probability`."""
        return self.time_at_sigma(-torch.log1p(-probability))

    def velocity(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha'(t) / (1 - alpha(t)) = dsigma / expm1(sigma): the rate at which a masked token is revealed in reverse
        time, and the weight of its negative log-likelihood in the continuous-time bound. Infinite where nothing is
        masked."""
        return self.dsigma(t) / torch.expm1(self.sigma(t))


class _MaskProbabilitySchedule(NoiseSchedule):
    """A schedule that is given by its probability of a mask; everything else is derived from that."""

    @abstractmethod
    def mask_probability(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def velocity(self, t: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor: ...

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - self.mask_probability(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.log1p(-self.mask_probability(t))

    def time_at_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.time_at_mask_probability(-torch.expm1(-sigma))


@dataclass(frozen=True)
class LogLinear(_MaskProbabilitySchedule):
    """1 - alpha = (1 - epsilon) t, so that the velocity is 1/t. Masked-diffusion models are trained with this one.

    With `epsilon` > 0 a token survives at t = 1 with probability `epsilon`, which keeps sigma finite; with 0, time 1 is
    all masks, as sampling takes it to be, and bounds are exact there.
    """

    name = "loglinear"
    epsilon: float = 1e-3

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * t

    def velocity(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / t

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) / (1 - (1 - self.epsilon) * t)

    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor:
        return probability / (1 - self.epsilon)


@dataclass(frozen=True)
class Polynomial(_MaskProbabilitySchedule):
    """1 - alpha = (1 - epsilon) t^power; `power` 1 is loglinear, more of it keeps the text visible for longer."""

    name = "polynomial"
    power: float = 2.0
    epsilon: float = 1e-3

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * t**self.power

    def velocity(self, t: torch.Tensor) -> torch.Tensor:
        return self.power / t

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * self.power * t ** (self.power - 1) / (1 - self.mask_probability(t))

    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor:
        return (probability / (1 - self.epsilon)) ** (1 / self.power)


@dataclass(frozen=True)
class Cosine(_MaskProbabilitySchedule):
    """alpha = epsilon + (1 - epsilon) cos(pi t / 2)."""

    name = "cosine"
    epsilon: float = 1e-3

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        return 2 * (1 - self.epsilon) * torch.sin(math.pi / 4 * t) ** 2

    def velocity(self, t: torch.Tensor) -> torch.Tensor:
        return math.pi / 2 / torch.tan(math.pi / 4 * t)

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * math.pi / 2 * torch.sin(math.pi / 2 * t) / (1 - self.mask_probability(t))

    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor:
        return 4 / math.pi * torch.asin(torch.sqrt(probability / (2 * (1 - self.epsilon))))


@dataclass(frozen=True)
class CosineSquared(_MaskProbabilitySchedule):
    """alpha = epsilon + (1 - epsilon) cos(pi t / 2)^2."""

    name = "cosine_squared"
    epsilon: float = 1e-3

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * torch.sin(math.pi / 2 * t) ** 2

    def velocity(self, t: torch.Tensor) -> torch.Tensor:
        return math.pi / torch.tan(math.pi / 2 * t)

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.epsilon) * math.pi / 2 * torch.sin(math.pi * t) / (1 - self.mask_probability(t))

    def time_at_mask_probability(self, probability: torch.Tensor) -> torch.Tensor:
        return 2 / math.pi * torch.asin(torch.sqrt(probability / (1 - self.epsilon)))


@dataclass(frozen=True)
class Linear(NoiseSchedule):
    """sigma = sigma_min + t (sigma_max - sigma_min). Some tokens are masked at t = 0 already if `sigma_min` > 0."""

    name = "linear"
    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def time_at_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Geometric(NoiseSchedule):
    """sigma = sigma_min^(1-t) sigma_max^t. Some tokens are masked at t = 0 already."""

    name = "geometric"
    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def dsigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def time_at_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    schedule.name: schedule for schedule in (LogLinear, Cosine, CosineSquared, Linear, Geometric, Polynomial)
}


def make_schedule(description: str | Mapping[str, Any] | NoiseSchedule) -> NoiseSchedule:
    """The schedule that `description` names: a name, or a dict of `type` and the schedule's parameters.

    Raises:
        ValueError: for a name or parameter that there is not, and for a value out of range.
    """
    if isinstance(description, NoiseSchedule):
        return description
    parameters = {"type": description} if isinstance(description, str) else dict(description)
    name = parameters.pop("type", None)
    if name not in SCHEDULES:
        raise ValueError(f"`noise_schedule` must name one of {sorted(SCHEDULES)} as its `type`, got {name!r}.")
    known = [field.name for field in fields(SCHEDULES[name])]
    for parameter, value in parameters.items():
        if parameter not in known:
            raise ValueError(f"`noise_schedule` of type {name!r} takes {known}, got {parameter!r} ({value!r}).")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"`{parameter}` of the noise schedule must be a number of at least 0, got {value!r}.")
    schedule = SCHEDULES[name](**parameters)
    values = asdict(schedule)
    if values.get("epsilon", 0) >= 1:
        raise ValueError(f"`epsilon` of the noise schedule must be less than 1, got {values['epsilon']}.")
    if values.get("power", 1) <= 0:
        raise ValueError(f"`power` of the noise schedule must be positive, got {values['power']}.")
    if "sigma_min" in values and not values["sigma_min"] < values["sigma_max"]:
        raise ValueError(
            f"`sigma_min` of the noise schedule must be less than `sigma_max` ({values['sigma_max']}), got "
            f"{values['sigma_min']}."
        )
    if name == "geometric" and values["sigma_min"] == 0:
        raise ValueError("`sigma_min` of a geometric noise schedule must be positive, got 0.")
    return schedule


def describe_schedule(schedule: NoiseSchedule) -> dict[str, Any]:
    """The dict from which `make_schedule` makes the same schedule again."""
    return {"type": schedule.name, **asdict(schedule)}
