"""The bound of masked diffusion without a law of times: the number of masks is drawn in place of the time.

Let p be the probability of a mask. As velocity(t) dt = dp / p, bound (1) of `diffusion.masking` for L tokens is

    integral from 0 to 1 of E[ sum over masked n of -log p(text[n] | text masked with probability p) ] dp / p
        = mean over k = 1, ..., L of L/k * E[ sum over masked n of -log p(text[n] | text with k masks) ]             (2)

in nats, where all sets of k positions are equally likely: the integral of p^(k-1) (1-p)^(L-k) is 1 / (k C(L, k)). The
second form is the mean over all orders of the chain rule (arXiv 2110.02037, 2502.09992). It leaves out no times and
holds for any schedule, and as k tokens weigh L/k each, one draw is never more than L times the worst token. One draw of
(1) has no such limit, which is why training leaves out the least times, and why its loss is not quite a bound.
"""

import torch

from .masking import NoisedText


def mask_random_number(
    input_ids: torch.Tensor, number_uniforms: torch.Tensor, token_uniforms: torch.Tensor, mask_token_id: int
) -> NoisedText:
    """A text with k masks, k and their positions from given uniforms: one draw of (2), L/k being the weight.

    The noise level is drawn too, for models that read it, and so that they have the mean of (1) as well. Given k masks,
    p follows Beta(k, L - k + 1). So does the k-th smallest of L uniforms, whatever positions the k smallest have.

    Args:
        input_ids: long [batch, length], the text; L is its length.
        number_uniforms: [batch] in [0, 1), from which k comes.
        token_uniforms: [batch, length] in [0, 1), independent. The positions of the k smallest are masked.

    Returns:
        Text, weight [batch] and sigma [batch] in nats; for `labels` with `noised`.
    """
    length = input_ids.shape[1]
    number = (number_uniforms * length).long().clamp(max=length - 1)[:, None] + 1
    smallest_first, positions = token_uniforms.sort(dim=1)
    rank = positions.argsort(dim=1)
    probability = smallest_first.gather(1, number - 1)[:, 0]
    masked = input_ids.masked_fill(rank < number, mask_token_id)
    return NoisedText(masked, length / number[:, 0], -torch.log1p(-probability))
