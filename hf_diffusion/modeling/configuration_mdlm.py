"""Configuration of MDLM, the masked diffusion language model (arXiv 2406.07524)."""

from typing import Any, Literal

from ..diffusion.masking import TimeSampling
from ..diffusion.schedules import NoiseSchedule, describe_schedule, make_schedule
from .configuration_checks import checked
from .configuration_published import PublishedConfig


@checked
class MDLMConfig(PublishedConfig):
    r"""
    See `PublishedConfig` for the arguments that are not about noise.

    Args:
        conditioning_size (`int`, defaults to 128): width of the embedding of the noise level.
        time_conditioning (`bool`, defaults to `False`): the network reads the noise level `sigma`. If not, it is told 0
            always, and what its layers make of that is a constant.
        attend_to_padding (`bool`, defaults to `False`): treat padding as the reference implementation does, which takes
            no attention mask: padding is attended to, counts as positions, and is noised like text, though not counted
            in the loss. If `False`, what `attention_mask` hides has no effect on any other position.
        block_size (`int`, *optional*): block diffusion (BD3-LM, arXiv 2503.09573). The text falls into blocks of so
            many tokens, padding not counted; a position reads its own block and earlier ones, none that are later.
            1 is an autoregressive model. With no blocks, every position reads all others.
        noise_schedule (`str` or `dict`, defaults to `"loglinear"`): `type` and parameters of the noise schedule that
            `labels` and `t` are understood by (see `diffusion.schedules`).
        time_law (`"uniform"` or `"importance"`), least_time (`float`, defaults to 1e-3), low_discrepancy (`bool`,
            defaults to `True`), num_timesteps (`int`, *optional*): how training times are drawn (see
            `diffusion.masking.TimeSampling`). The defaults are those of the published models.
    """

    model_type = "mdlm"
    attribute_map = PublishedConfig.attribute_map | {"cond_dim": "conditioning_size"}

    conditioning_size: int = 128
    time_conditioning: bool = False
    attend_to_padding: bool = False
    block_size: int | None = None
    noise_schedule: str | dict = "loglinear"
    time_law: Literal["uniform", "importance"] = "uniform"
    least_time: float | int = 1e-3
    low_discrepancy: bool = True
    num_timesteps: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.noise_schedule = describe_schedule(make_schedule(self.noise_schedule))
        super().__post_init__(**kwargs)

    def make_schedule(self) -> NoiseSchedule:
        return make_schedule(self.noise_schedule)

    def make_time_sampling(self) -> TimeSampling:
        return TimeSampling(self.time_law, self.least_time, self.num_timesteps, self.low_discrepancy)

    def validate_noise(self) -> None:
        """Raise ValueError for a noise schedule or a law of times that is none, or not for this model (`@checked`)."""
        self.make_schedule()
        self.make_time_sampling()
        if self.time_conditioning and describe_schedule(self.make_schedule()).get("epsilon") == 0:
            raise ValueError(
                f"`noise_schedule` {self.noise_schedule} has an infinite noise level at t = 1, which the network would "
                "have to read because of `time_conditioning`. Give it a positive `epsilon`."
            )

    def validate_blocks(self) -> None:
        """Raise ValueError for blocks that are none, and for settings that they do not go with (`@checked`)."""
        if self.block_size is None:
            return
        if self.block_size < 1:
            raise ValueError(
                f"`block_size` must be at least 1, or None for a text without blocks, got {self.block_size}."
            )
        if self.time_conditioning:
            raise ValueError(
                f"`block_size` ({self.block_size}) does not go with `time_conditioning`: each block of a text has its "
                "own noise level, and the network can be told one for all. Leave one of them out."
            )
        if self.attend_to_padding:
            raise ValueError(
                f"`block_size` ({self.block_size}) does not go with `attend_to_padding`: blocks count the tokens of a "
                "text, and padding is in none. Leave one of them out."
            )


__all__ = ["MDLMConfig"]
