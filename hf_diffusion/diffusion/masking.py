"""Masking a text at random times, and the bound on its likelihood that follows (MDLM, arXiv 2406.07524).

With SUBS, -log p(text) is at most

    integral from 0 to 1 of velocity(t) * E[ sum over masked n of -log p(text[n] | text masked at time t) ] dt     (1)

in nats, if nothing is masked at t = 0 and everything at t = 1. One draw of t and of the masks estimates it: the
negative log-likelihood of every masked token, times a weight that only depends on t and on how t was drawn.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .schedules import NoiseSchedule


class NoisedText(NamedTuple):
    """
    Attributes:
        input_ids: long [batch, length], a text of which some tokens are masked.
        weight: [batch, length], what the negative log-likelihood of a masked token counts in the bound; [batch, 1]
            where all tokens of a row have the same time.
        sigma: [batch, length] or [batch, 1], the noise level that the masks were drawn at, in nats.
    """

    input_ids: torch.Tensor
    weight: torch.Tensor
    sigma: torch.Tensor


@dataclass(frozen=True)
class TimeSampling:
    """How training times are drawn, and with that what a masked token weighs.

    Args:
        law: `"uniform"` draws t uniformly from `least_time` to 1, and a token weighs velocity(t). `"importance"` draws
            it in proportion to velocity(t), which is log-uniform in the probability of a mask, and every token weighs
            the same.
        least_time: the times below are left out. They hold few masks and great weights; without a lower end the
            variance of the uniform law is infinite. As published, the uniform law's mean over `least_time` to 1 stands
            for the mean over 0 to 1. Both laws are exact for (1) at `least_time` 0, where "importance" has no density.
        num_timesteps: T, to train on the bound in discrete time: t is one of 1/T, 2/T, ..., 1, all equally likely, and
            `least_time` has no part in it. None for continuous time.
        low_discrepancy: spread the times of a batch evenly (see `low_discrepancy`); independent times if not.
    """

    law: Literal["uniform", "importance"] = "uniform"
    least_time: float = 1e-3
    num_timesteps: int | None = None
    low_discrepancy: bool = True

    def __post_init__(self) -> None:
        if self.law not in ("uniform", "importance"):
            raise ValueError(f"`law` must be 'uniform' or 'importance', got {self.law!r}.")
        if not 0 <= self.least_time < 1:
            raise ValueError(f"`least_time` must be at least 0 and less than 1, got {self.least_time}.")
        if self.law == "importance" and self.least_time == 0:
            raise ValueError("`law`='importance' needs a positive `least_time`, got 0: its density ends there.")
        if self.num_timesteps is not None and self.num_timesteps < 1:
            raise ValueError(
                f"`num_timesteps` must be at least 1, or None for continuous time; got {self.num_timesteps}."
            )
        if self.num_timesteps is not None and self.law == "importance":
            raise ValueError(
                f"`num_timesteps` ({self.num_timesteps}) draws its times uniformly: leave out `law`='importance'."
            )


def low_discrepancy(uniforms: torch.Tensor) -> torch.Tensor:
    """One uniform in each of n equal parts of [0, 1): (U_i + i) / n.

    Taken together they are uniform, so means over the batch keep their expectation and lose most of their variance.

    Args:
        uniforms: [n], independent and uniform in [0, 1).
    """
    count = uniforms.shape[0]
    offsets = torch.arange(count, device=uniforms.device, dtype=uniforms.dtype) / count
    return (uniforms / count + offsets) % 1


def importance_times(uniforms: torch.Tensor, schedule: NoiseSchedule, least: float, most: float) -> torch.Tensor:
    """Times at which the probability of a mask is log-uniform between `least` and `most`.

    That is the law in proportion to the velocity, as velocity(t) dt = d log(1 - alpha(t)). The weight that belongs to
    it is log(most / least) for every token.

    Args:
        uniforms: [n] in [0, 1).
        least, most: probabilities of a mask, 0 < least < most <= 1.
    """
    most_log = torch.log(torch.as_tensor(most, dtype=torch.float64, device=uniforms.device))
    least_log = torch.log(torch.as_tensor(least, dtype=torch.float64, device=uniforms.device))
    probability = torch.exp(least_log + uniforms * (most_log - least_log))
    return schedule.time_at_mask_probability(probability).to(uniforms.dtype)


def draw_times(
    uniforms: torch.Tensor, schedule: NoiseSchedule, sampling: TimeSampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Times and the weights that belong to them.

    Args:
        uniforms: float [n], independent and uniform in [0, 1).

    Returns:
        t [n] in (0, 1], and the weight [n] of a masked token. In discrete time that is T times what the token
        counts in the divergence of step s = t - 1/T from t, T (alpha(s) - alpha(t)) / (1 - alpha(t)): finite at every
        step, the first one included.
    """
    if sampling.low_discrepancy:
        uniforms = low_discrepancy(uniforms)
    if sampling.num_timesteps is not None:
        steps = sampling.num_timesteps
        index = (uniforms * steps).floor().clamp(max=steps - 1)
        t, s = (index + 1) / steps, index / steps
        return t, steps * (1 - schedule.mask_probability(s) / schedule.mask_probability(t))
    if sampling.law == "importance":
        ends = torch.tensor([sampling.least_time, 1.0], dtype=torch.float64)
        least, most = schedule.mask_probability(ends).tolist()
        t = importance_times(uniforms, schedule, least, most)
        return t, torch.full_like(t, (torch.tensor(most).log() - torch.tensor(least).log()).item())
    t = (1 - sampling.least_time) * uniforms + sampling.least_time
    return t, schedule.velocity(t)


def mask_tokens(
    input_ids: torch.Tensor, probability: torch.Tensor, uniforms: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """The text with every token masked independently with `probability`: q(x_t | x_0).

    Args:
        input_ids: long [batch, length].
        probability: [batch, length] or [batch, 1], of a mask.
        uniforms: [batch, length] in [0, 1).
    """
    return input_ids.masked_fill(uniforms < probability, mask_token_id)


def draw_noised_text(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    schedule: NoiseSchedule,
    sampling: TimeSampling,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    block: torch.Tensor | None = None,
) -> NoisedText:
    """Draw one time per row, or one per block of a row, and mask each token at its time.

    Args:
        input_ids: long [batch, length], the text.
        maskable: bool [batch, length]; tokens elsewhere stay visible.
        generator: source of randomness; torch's global one on the device of `input_ids` if not given. One uniform per
            time is drawn first, then one per token.
        block: long [batch or 1, length], the block of each position, counted from 0. One time for the whole row if not
            given.
    """
    device = input_ids.device if generator is None else generator.device
    batch_size = input_ids.shape[0]
    times_per_row = 1 if block is None or block.numel() == 0 else int(block.max()) + 1
    time_uniforms = torch.rand(batch_size * times_per_row, generator=generator, device=device).to(input_ids.device)
    token_uniforms = torch.rand(input_ids.shape, generator=generator, device=device).to(input_ids.device)
    t, weight = draw_times(time_uniforms, schedule, sampling)
    if block is None:
        t, weight = t[:, None], weight[:, None]
    else:
        # Evenly spread times come in order. Given out so, the first block of a text would never see great ones, and
        # the mean over its times would be wrong; as whole rows come in any order, they need no shuffling.
        dealt = torch.randperm(len(t), generator=generator, device=device).to(input_ids.device)
        dealt = dealt.view(batch_size, times_per_row).gather(1, block.expand(batch_size, -1))
        t, weight = t[dealt], weight[dealt]
    noised = mask_tokens(input_ids, schedule.mask_probability(t), token_uniforms, mask_token_id)
    return NoisedText(torch.where(maskable, noised, input_ids), weight, schedule.sigma(t))


def subs_log_probs(logits: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """SUBS: the log-probabilities of the clean token at every position, as the bound and the sampler mean them.

    At masked positions the softmax over all tokens but the mask (zero masking); at visible ones the token itself with
    probability 1 (carry-over).

    Args:
        logits: [batch, length, vocab_size].
        input_ids: long [batch, length], the text that the network has read.

    Returns:
        [batch, length, vocab_size] in nats, in float32 or wider; -inf for probability 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_mask_token = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    log_probs = torch.log_softmax(logits.masked_fill(is_mask_token, -torch.inf), dim=-1)
    carried = torch.full_like(logits, -torch.inf).scatter_(-1, input_ids[..., None], 0.0)
    return torch.where((input_ids == mask_token_id)[..., None], log_probs, carried)
