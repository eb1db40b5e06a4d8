"""The bound of masked diffusion without a law of times: the number of masks is drawn in place of the time.

Let p be the probability of a mask. As velocity(t) dt = dp / p, bound (1) of `diffusion.masking` for L tokens is

    integral from 0 to 1 of E[ sum over masked n of -log p(text[n] | text masked with probability p) ] dp / p
        = mean over k = 1, ..., L of L/k * E[ sum over masked n of -log p(text[n] | text with k masks) ]             (2)

in nats, where all sets of k positions are equally likely: the integral of p^(k-1) (1-p)^(L-k) is 1 / (k C(L, k)). The
second form is the mean over all orders of the chain rule (arXiv 2110.02037, 2502.09992). It leaves out no times and
holds for any schedule, and as k tokens weigh L/k each, one draw is never more than L times the worst token. One draw of
(1) has no such limit, which is why training leaves out the least times, and why its loss is not quite a bound.

In block diffusion (BD3-LM, arXiv 2503.09573, eq. 5) the bound is the sum over blocks of (2) for the block given the
clean text before it, L being the length of the block. A block of one token has one order, so blocks of one token give
the exact autoregressive negative log-likelihood with every draw.
"""

import torch
from torch.nn import functional as F

from .masking import NoisedText


def mask_random_number(
    input_ids: torch.Tensor,
    number_uniforms: torch.Tensor,
    token_uniforms: torch.Tensor,
    mask_token_id: int,
    block_size: int | None = None,
) -> NoisedText:
    """A text with k masks in each block, k and their positions from given uniforms: one draw of (2), L/k the weight.

    The noise level is drawn too, for models that read it, and so that they have the mean of (1) as well. Given k masks,
    p follows Beta(k, L - k + 1). So does the k-th smallest of L uniforms, whatever positions the k smallest have.

    Args:
        input_ids: long [batch, length], the text.
        number_uniforms: [batch, blocks] in [0, 1), from which k comes.
        token_uniforms: [batch, length] in [0, 1), independent. The positions of the k smallest of a block are masked.
        block_size: L, but for the last block, which may be shorter; the whole text is one block if not given.

    Returns:
        Text, weight and sigma in nats, [batch, length] or, of a single block, [batch, 1]; for `labels` with `noised`.

    Raises:
        ValueError: if `number_uniforms` are not as many as there are blocks.
    """
    batch_size, length = input_ids.shape
    block_size = length if block_size is None else min(block_size, length)
    block_length = (length - torch.arange(0, length, block_size, device=input_ids.device)).clamp(max=block_size)
    if number_uniforms.shape != (batch_size, len(block_length)):
        raise ValueError(
            f"`number_uniforms` must have shape {(batch_size, len(block_length))}, one for each block of each text, "
            f"got {tuple(number_uniforms.shape)}."
        )
    number = (number_uniforms * block_length).long() + 1  # a product with less than 1 is not rounded up to L
    # What the last block lacks comes last in its order, and is never among the k smallest.
    token_uniforms = F.pad(token_uniforms, (0, -length % block_size), value=torch.inf).unflatten(1, (-1, block_size))
    smallest_first, positions = token_uniforms.sort(dim=2)
    rank = positions.argsort(dim=2)
    is_masked = (rank < number[..., None]).flatten(1)[:, :length]
    probability = smallest_first.gather(2, number[..., None] - 1)[..., 0]
    weight, sigma = block_length / number, -torch.log1p(-probability)
    if len(block_length) > 1:
        weight, sigma = (value.repeat_interleave(block_size, dim=1)[:, :length] for value in (weight, sigma))
    return NoisedText(input_ids.masked_fill(is_masked, mask_token_id), weight, sigma)
