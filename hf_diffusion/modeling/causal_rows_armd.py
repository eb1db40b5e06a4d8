"""The rows of ARMD left to right: the start symbol in front, then a content and a query row for every token.

Row 0 of either stream is the start symbol's: its content row, and the query row for the first token. It depends on the
weights alone, so it is the same for every text.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .masks_armd import Attends
from .modeling_armd import ARMDNetwork, StoresKeysAndValues


@dataclass
class CausalRows:
    """
    Attributes:
        content: [batch, 1 + new, hidden_size], the start symbol and the embeddings of the tokens.
        content_position, query_position: [batch or 1, 1 + new], 0 for the start symbol, 1 for the first token.
    """

    content: torch.Tensor
    content_position: torch.Tensor
    query_position: torch.Tensor


def lay_rows(network: ARMDNetwork, embeddings: torch.Tensor, token_position: torch.Tensor) -> CausalRows:
    """The rows for tokens with `embeddings` [batch, new, hidden_size] at `token_position` [batch or 1, new]."""
    content_position = F.pad(token_position, (1, 0))
    # Where the context is full, the row after the last token asks for a token that has no place: it takes the last.
    query_position = (content_position + 1).clamp(max=network.config.max_position_embeddings)
    content = torch.where(
        (content_position == 0)[..., None], network.start.to(embeddings.dtype), F.pad(embeddings, (0, 0, 1, 0))
    )
    return CausalRows(content, content_position, query_position)


def read_rows(
    network: ARMDNetwork, rows: CausalRows, prefix: torch.Tensor, attends: Attends, cache: StoresKeysAndValues | None
) -> list[torch.Tensor]:
    """The query rows [batch, new, hidden_size] before the first layer and after every layer, without row 0.

    Args:
        prefix: [batch, 1 + new, hidden_size], eq. 6 without its scale.
    """
    assert network.config.prefix_scale is not None
    query = prefix * network.config.prefix_scale
    if network.no_neighbour is not None:  # left to right, the left neighbour is always known
        query = query + rows.content
    positions = torch.cat([rows.content_position, rows.query_position], dim=1)
    states_of_layers = network.query_stream(
        network.dropout(rows.content), network.dropout(query), positions, attends, cache
    )
    return [states[:, 1:] for states in states_of_layers]
