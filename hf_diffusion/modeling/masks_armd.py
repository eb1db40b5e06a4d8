"""Attention masks of ARMD's two streams, for whichever attention implementation is in use."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from .cache_armd import ARMDCache
from .configuration_armd import ARMDConfig
from .masks import build_mask
from .rows_armd import Rows


@dataclass
class Attend:
    """Some of the asking rows, and what they may read: a mask, or the causal kernel, or (neither) everything."""

    rows: slice
    mask: Any = None
    is_causal: bool = False


@dataclass
class Attends:
    """Who reads what: `both` streams in two-stream layers, the `query` stream alone there, and in `upper` layers."""

    both: list[Attend]
    query: list[Attend]
    upper: list[Attend]


def attend_alike(mask: Any, num_content: int) -> Attends:
    """One pattern for all three: as many content rows as query rows, under `mask`, or (None) the causal kernel."""
    is_causal = mask is None
    alone = [Attend(slice(None), mask, is_causal)]
    both = [Attend(slice(0, num_content), mask, is_causal), Attend(slice(num_content, None), mask, is_causal)]
    return Attends(both, alone, alone)


def plan_attention(rows: Rows, cache: ARMDCache | None, config: ARMDConfig, like: torch.Tensor) -> Attends:
    """The masks of one pass. `like` gives batch size, dtype and device; `cache` is told the blocks of the new rows."""
    num_content, num_query = rows.content.shape[1], rows.query.shape[1]
    content_keys, query_keys = rows.content_block, rows.query_block
    if cache is not None:
        content_keys, query_keys = cache.append_blocks(content_keys, query_keys, rows.has_gaps)
    if rows.pattern == "open":
        everything = [Attend(slice(None))]
        return Attends(everything, everything, everything)
    if rows.pattern == "causal":
        # SDPA has a causal kernel that needs no mask; other implementations get one built.
        has_kernel = config._attn_implementation == "sdpa"
        mask = (
            None
            if has_kernel
            else build_mask(causal_mask_function, config, like, (like.shape[0], num_query, num_content))
        )
        return attend_alike(mask, num_content)

    def below(keys: torch.Tensor, bound: torch.Tensor) -> list[Attend]:
        """Each row reads the keys whose block number is less than its bound."""

        def reads(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return keys[batch, key] < bound[batch, query]

        return [Attend(slice(None), build_mask(reads, config, like, (*bound.shape, keys.shape[1])))]

    # Content rows read up to their own block; query rows read content of earlier blocks, and queries up to their own.
    return Attends(
        both=below(content_keys, torch.cat([rows.content_block + 1, rows.query_block], dim=1)),
        query=below(content_keys, rows.query_block),
        upper=below(query_keys, rows.query_block + 1),
    )
