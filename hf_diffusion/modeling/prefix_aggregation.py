"""ARMD's first layer (eq. 6): what a query knows of the text before any attention.

    g_n = scale * sum over i in earlier blocks of <PE_n, PE_i> x_i

It is linear attention without normalisation: the sum over i can be kept as a running state PE^T X, so that one more
token costs the same however long the text is.
"""

import math

import torch
from torch import nn

from .configuration_armd import ARMDConfig
from .initial_std import linear_with_std


class PositionEncoding(nn.Module):
    """PE, a position's vector [.., prefix_encoding_size], from the position itself (0 is the start symbol)."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        self.size = config.prefix_encoding_size
        self.form = config.prefix_encoding
        if self.form == "learned":
            self.table = nn.Embedding(config.max_position_embeddings + 1, self.size)
        else:
            # Unlike the other weights this one shapes a kernel of positions: it starts at torch's own scale.
            self.proj = linear_with_std(self.size, self.size, std=(3 * self.size) ** -0.5)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Encodings in `dtype`, that of the embeddings to be summed: this module may be held in a wider one."""
        if self.form == "learned":
            return self.table(positions).to(dtype)
        # Angles in float32 whatever the model's dtype: bfloat16 cannot tell position 257 from 256.
        half = torch.arange(self.size // 2, device=positions.device, dtype=torch.float32)
        angles = positions[..., None].float() * torch.exp(half * (-math.log(10000.0) / (self.size // 2)))
        return self.proj(torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.proj.weight.dtype)).to(dtype)


def aggregate_causally(
    query_encoding: torch.Tensor, content_encoding: torch.Tensor, content: torch.Tensor, chunk_size: int = 128
) -> torch.Tensor:
    """Query row n takes the content rows 0..n: chunk by chunk, so memory is linear in the length.

    Args:
        query_encoding, content_encoding: [batch, length, prefix_encoding_size].
        content: [batch, length, hidden_size].

    Returns:
        [batch, length, hidden_size], without the scale.
    """
    if content.shape[1] <= chunk_size:
        return (query_encoding @ content_encoding.mT).tril() @ content
    # Sums run in float32 at least: a bfloat16 running sum would forget its small terms.
    sum_dtype = torch.promote_types(content.dtype, torch.float32)
    state = content.new_zeros(content.shape[0], content_encoding.shape[-1], content.shape[-1], dtype=sum_dtype)
    chunks = []
    for pe_query, pe_content, values in zip(
        query_encoding.split(chunk_size, dim=1),
        content_encoding.split(chunk_size, dim=1),
        content.split(chunk_size, dim=1),
        strict=True,
    ):
        within = (pe_query @ pe_content.mT).tril() @ values
        chunks.append(within + pe_query @ state.to(pe_query.dtype))
        state = state + prefix_state(pe_content, values)
    return torch.cat(chunks, dim=1)


def aggregate_visible(
    query_encoding: torch.Tensor, content_encoding: torch.Tensor, content: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Each query row takes the content rows that `visible` [batch, queries, contents] (bool) lets it read."""
    return (query_encoding @ content_encoding.mT).masked_fill(~visible, 0) @ content


def prefix_state(content_encoding: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """PE^T X [batch, prefix_encoding_size, hidden_size] of some content rows, in float32 at least."""
    sum_dtype = torch.promote_types(content.dtype, torch.float32)
    with torch.autocast(content.device.type, enabled=False):
        return content_encoding.mT.to(sum_dtype) @ content.to(sum_dtype)
