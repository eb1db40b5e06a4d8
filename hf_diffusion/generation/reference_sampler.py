"""The samplers of the MDLM reference implementation, token for token: for those who have to reproduce its numbers.

Text drawn here does not have the law of the model. A step of the reference, from time t to s, gives each token the
weight (t - s) p(token), the mask the weight s, and picks the winner of an exponential race. The race runs on float32
uniforms, which are multiples of 2^-24: no token arrives earlier than 6e-8, and with many tokens and short steps that is
too late for most (arXiv 2409.02908). Masks are lifted too seldom, and rare tokens hardly ever drawn. In the first of T
steps over 50,257 tokens:

    law of the token    T       lifted masks, drawn / true    entropy in nats, drawn / true
    Zipf, exponent 1    128     0.87                          6.84 / 7.57
    Zipf, exponent 1    1000    0.69                          5.64 / 7.57
    Zipf, exponent 1    10000   0.49                          4.23 / 7.57
    Zipf, exponent 1.5  1000    0.96                          2.77 / 3.16
    flat                1000    0.16

Less entropy passes for better text where another model's perplexity is the judge. To sample from the model, use the
strategies of `generate`: they choose the positions first, then draw their tokens with `sampling.sample_categorical`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..diffusion.masking import subs_log_probs
from ..diffusion.schedules import LogLinear, NoiseSchedule


ReferenceSampler = Literal["ddpm", "ddpm_cache", "analytic"]

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits [batch, length, vocab_size] of input_ids (long [batch, length]) and sigma (float32 [batch], in nats)."""

LAST_TIME = 1e-5


@torch.no_grad()
def sample_as_reference(
    predict: Predict,
    input_ids: torch.Tensor,
    *,
    sampler: ReferenceSampler,
    num_steps: int,
    mask_token_id: int,
    schedule: NoiseSchedule,
    time_conditioning: bool,
    noise_removal: bool = True,
    generator: torch.Generator | None = None,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, int]:
    """Fill the masked positions of a text as the MDLM reference does (arXiv 2406.07524), with its random numbers.

    For reproduction only: the law of the text is bent by float32. At T = 1000 and 50,257 tokens a step lifts 0.69
    (Zipf) or 0.16 (flat) of the masks that it should. The head of this file has more, and says what to use otherwise.

    Args:
        predict: the network. One that is not conditioned on noise leaves `sigma` aside.
        input_ids: long [batch, length], `mask_token_id` at the positions to fill. The reference starts from masks only.
        sampler: `"ddpm"`, ancestral sampling; `"ddpm_cache"`, the same tokens without the passes that would see nothing
            new (none is saved if `time_conditioning`); `"analytic"`, the tau-leaping of SEDD (arXiv 2310.16834), which
            has the law of "ddpm" for these models, but other tokens.
        num_steps: T, the number of equal steps from time 1 to 1e-5.
        schedule: must be loglinear for "ddpm_cache".
        time_conditioning: whether the predictions depend on `sigma`.
        noise_removal: fill what is left after the last step, with one more pass: with the likeliest tokens, but for
            "analytic", which draws them.
        generator: source of randomness; torch's global one on the device of `input_ids` if not given. Each step
            draws float32 uniforms [batch, length, vocab_size]: a row depends on what batch it is drawn in.
        on_step: is called with the text, long [batch, length], after every step (not after noise removal).

    Returns:
        The text, long [batch, length], and the number of passes.

    Raises:
        ValueError: before any pass, for arguments out of range and for a schedule that the sampler cannot take.
    """
    if sampler not in get_args(ReferenceSampler):
        raise ValueError(f"`sampler` must be one of {', '.join(get_args(ReferenceSampler))}; got {sampler!r}.")
    _check(input_ids, num_steps, mask_token_id, schedule, must_be_loglinear=sampler == "ddpm_cache")

    reverse = _ReverseProcess(predict, sampler, mask_token_id, schedule, time_conditioning, generator)
    times = torch.linspace(1, LAST_TIME, num_steps + 1, dtype=torch.float32, device=input_ids.device)
    tokens = reverse.run(input_ids, times[:-1], (1 - LAST_TIME) / num_steps, on_step)
    if noise_removal:
        tokens = reverse.remove_noise(tokens, times[-1])
    return tokens, reverse.nfe


@torch.no_grad()
def sample_windows_as_reference(
    predict: Predict,
    input_ids: torch.Tensor,
    *,
    stride: int,
    num_strides: int,
    num_steps: int,
    mask_token_id: int,
    schedule: NoiseSchedule,
    time_conditioning: bool,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, int]:
    """Semi-autoregressive text as the MDLM reference draws it (arXiv 2406.07524, section 5), with its random numbers.

    A window is filled, moves on by `stride` positions, and its end is filled given its beginning, `num_strides` times.
    The network sees the window alone, always in positions from 0 on. For reproduction only, as `sample_as_reference`.

    Args:
        input_ids: long [batch, length], the first window, `mask_token_id` at the positions to fill.
        stride: number of positions that the window moves by, from 1 to length.
        num_strides: how often it moves.
        num_steps: 1 / dt, the number of equal steps of each window from time 1 to 0, where one more is made. 1000 by
            default in the reference.
        schedule: must be loglinear.
        predict, time_conditioning, generator: as in `sample_as_reference`, whose "ddpm_cache" fills the windows.

    Returns:
        The text, long [batch, length + num_strides * stride], and the number of passes.

    Raises:
        ValueError: before any pass, for arguments out of range.
    """
    _check(input_ids, num_steps, mask_token_id, schedule, must_be_loglinear=True)
    if not 1 <= stride <= input_ids.shape[1]:
        raise ValueError(f"`stride` must be from 1 to the length of `input_ids` ({input_ids.shape[1]}), got {stride}.")
    if num_strides < 0:
        raise ValueError(f"`num_strides` must be at least 0, got {num_strides}. With 0 there is one window.")

    reverse = _ReverseProcess(predict, "ddpm_cache", mask_token_id, schedule, time_conditioning, generator)
    step_size = 1 / num_steps
    # int(1 / dt) is the reference's count, and one less than `num_steps` for a few (93, 99, ...). In the step from time
    # 0 the mask has a negative weight: all that is left is filled.
    times = torch.tensor(
        [1 - i * step_size for i in range(int(1 / step_size) + 1)], dtype=torch.float32, device=input_ids.device
    )

    def fill(window: torch.Tensor) -> torch.Tensor:
        return reverse.remove_noise(reverse.run(window, times, step_size), torch.zeros_like(times[0]))

    text = window = fill(input_ids)
    masks = torch.full_like(input_ids[:, :stride], mask_token_id)
    for _ in range(num_strides):
        window = fill(torch.cat([window[:, stride:], masks], dim=1))
        text = torch.cat([text, window[:, -stride:]], dim=1)
    return text, reverse.nfe


def exponential_race(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The entry that arrives first, each at the rate of its weight. Were the uniforms real numbers, an entry would win
    with a probability in proportion to its weight.

    Args:
        weights: [..., vocab_size], at least 0 (an entry below that does not win); they need not sum to 1.
        uniforms: [..., vocab_size], in [0, 1).

    Returns:
        Long [...].
    """
    return (weights / (1e-10 - torch.log(uniforms + 1e-10))).argmax(dim=-1)


@dataclass
class _ReverseProcess:
    """From masks to text in steps, and the passes that it took."""

    predict: Predict
    sampler: ReferenceSampler
    mask_token_id: int
    schedule: NoiseSchedule
    time_conditioning: bool
    generator: torch.Generator | None
    nfe: int = 0

    def run(
        self,
        tokens: torch.Tensor,
        times: torch.Tensor,
        step_size: float,
        on_step: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """The text after one step from each of `times` [steps]."""
        log_probs = None
        for t in times:
            if log_probs is None:
                log_probs = self.log_probs(tokens, t)
            filled = self.fill(tokens, self.token_weights(log_probs, t, t - step_size))
            # The reference compares ids as if they were measurements, so that neighbours above 100,000 are equal to it,
            # and it then goes on with old predictions.
            nothing_new = torch.allclose(filled, tokens) and not self.time_conditioning
            if not (self.sampler == "ddpm_cache" and nothing_new):
                log_probs = None
            tokens = filled
            if on_step is not None:
                on_step(tokens)
        return tokens

    def remove_noise(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The text with every mask filled after one more pass."""
        log_probs = self.log_probs(tokens, t)
        if self.sampler != "analytic":
            return log_probs.argmax(dim=-1)
        sigma = self.schedule.sigma(t)
        weights = _tau_leaping_weights(log_probs, sigma, torch.zeros_like(sigma), self.mask_token_id)
        weights[..., self.mask_token_id] = 0
        return self.fill(tokens, weights)

    def log_probs(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Float32 log-probabilities [batch, length, vocab_size] of the clean tokens, by a pass at time t (scalar)."""
        self.nfe += 1
        logits = self.predict(tokens, self.schedule.sigma(t).expand(tokens.shape[0]))
        return subs_log_probs(logits, tokens, self.mask_token_id).float()

    def token_weights(self, log_probs: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What each token weighs at time s < t where there is a mask at time t."""
        if self.sampler == "ddpm_cache":
            return _ancestral_weights(log_probs, t, s, self.mask_token_id)
        sigma_t, sigma_s = self.schedule.sigma(t), self.schedule.sigma(s)
        if self.sampler == "analytic":
            return _tau_leaping_weights(log_probs, sigma_t, sigma_s, self.mask_token_id)
        # Rounded as in the reference; `schedule.mask_probability` keeps more digits.
        return _ancestral_weights(log_probs, 1 - torch.exp(-sigma_t), 1 - torch.exp(-sigma_s), self.mask_token_id)

    def fill(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The text with a draw at every mask. Visible positions spend random numbers too."""
        device = weights.device if self.generator is None else self.generator.device
        uniforms = torch.rand(weights.shape, dtype=torch.float32, device=device, generator=self.generator)
        drawn = exponential_race(weights, uniforms.to(weights.device))
        return torch.where(tokens == self.mask_token_id, drawn, tokens)


def _ancestral_weights(
    log_probs: torch.Tensor, masked_at_t: torch.Tensor, masked_at_s: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Weights of the tokens at time s where there is a mask at time t, from the probabilities of a mask at both."""
    weights = log_probs.exp() * (masked_at_t - masked_at_s)
    weights[..., mask_token_id] = masked_at_s
    return weights


def _tau_leaping_weights(
    log_probs: torch.Tensor, sigma_t: torch.Tensor, sigma_s: torch.Tensor, mask_token_id: int
) -> torch.Tensor:
    """Weights of the tokens at time s where there is a mask at time t, from the ratios of probabilities at time t.

    In exact arithmetic they are those of `_ancestral_weights`, over their sum. In float32 they lose digits in short
    steps, as the reference's do: nothing here may be simplified.
    """
    growth, decay = torch.exp(sigma_t - sigma_s), torch.exp(sigma_s - sigma_t)
    ratios = torch.exp(log_probs - torch.log(torch.expm1(sigma_t)))
    ratios[..., mask_token_id] = 1
    weights = growth * ratios * (1 - decay)
    weights[..., mask_token_id] = growth + (1 - growth) * ratios.sum(dim=-1)
    return weights


def _check(
    input_ids: torch.Tensor, num_steps: int, mask_token_id: int, schedule: NoiseSchedule, must_be_loglinear: bool
) -> None:
    if input_ids.ndim != 2 or input_ids.dtype != torch.long:
        raise ValueError(
            f"`input_ids` must be a long tensor [batch, length], got {input_ids.dtype} {list(input_ids.shape)}. To "
            "start from nothing, fill it with `mask_token_id`."
        )
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    if mask_token_id < 0:
        raise ValueError(f"`mask_token_id` must be a token id, at least 0; got {mask_token_id}.")
    if must_be_loglinear and not isinstance(schedule, LogLinear):
        raise ValueError(
            f"`schedule` must be loglinear here, as in the reference, got {schedule.name!r}. Samplers that take others "
            'are "ddpm" and "analytic".'
        )
    if math.isinf(schedule.sigma(torch.ones((), dtype=torch.float32)).item()):
        raise ValueError(
            f"`schedule` must have a finite noise level at time 1, as those of the reference, got {schedule}. Give it "
            "a positive `epsilon`."
        )


__all__ = ["Predict", "ReferenceSampler", "exponential_race", "sample_as_reference", "sample_windows_as_reference"]
