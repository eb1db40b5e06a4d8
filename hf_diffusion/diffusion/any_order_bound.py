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
    block = (torch.arange(length, device=input_ids.device) // block_size).expand(batch_size, -1)
    num_blocks = -(-length // block_size)
    if number_uniforms.shape != (batch_size, num_blocks):
        raise ValueError(
            f"`number_uniforms` must have shape {(batch_size, num_blocks)}, one for each block of each text, "
            f"got {tuple(number_uniforms.shape)}."
        )
    maskable = torch.ones_like(input_ids, dtype=torch.bool)
    noised = mask_random_number_of(maskable, block, input_ids, number_uniforms, token_uniforms, mask_token_id)
    if num_blocks > 1:
        return noised
    return NoisedText(noised.input_ids, noised.weight[:, :1], noised.sigma[:, :1])


def mask_random_number_of(
    maskable: torch.Tensor,
    block: torch.Tensor,
    input_ids: torch.Tensor,
    number_uniforms: torch.Tensor,
    token_uniforms: torch.Tensor,
    mask_token_id: int,
) -> NoisedText:
    """The same, of the positions `maskable` alone and in any blocks: L counts these, block by block and row by row.

    Args:
        maskable: bool [batch, length], False at given tokens and padding.
        block: long [batch, length], the number of the block of each maskable position, from 0.
        input_ids, number_uniforms, token_uniforms, mask_token_id: as in `mask_random_number`.

    Returns:
        Text, weight and sigma in nats, [batch, length]; weight and sigma are 0 where nothing is maskable.
    """
    num_blocks = number_uniforms.shape[1]
    block = block.where(maskable, num_blocks)  # the others come last, in a block of their own
    counts = torch.zeros_like(number_uniforms, dtype=torch.long)
    counts = torch.nn.functional.pad(counts, (0, 1)).scatter_add(1, block, torch.ones_like(block))
    first = counts.cumsum(dim=1) - counts
    smallest_first = token_uniforms.argsort(dim=1)
    order = smallest_first.gather(1, block.gather(1, smallest_first).argsort(dim=1, stable=True))
    rank = order.argsort(dim=1) - first.gather(1, block)
    counts, first = counts[:, :num_blocks], first[:, :num_blocks]
    number = (number_uniforms * counts).long() + 1  # a product with less than 1 is not rounded up to L
    greatest = order.gather(1, (first + number - 1).clamp(max=order.shape[1] - 1))
    probability = token_uniforms.gather(1, greatest)

    def of_positions(of_blocks: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(of_blocks, (0, 1)).gather(1, block)

    is_masked = maskable & (rank < of_positions(number))
    weight, sigma = of_positions(counts / number), of_positions(-torch.log1p(-probability))
    return NoisedText(input_ids.masked_fill(is_masked, mask_token_id), weight, sigma)
