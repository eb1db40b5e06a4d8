"""Classifier-free guidance: every text is read twice, as it is and with another beginning.

    log p = log p' + guidance_scale * (log p(token | text) - log p'(token | text with the other beginning)),

as transformers has it for causal models (arXiv 2306.17806). The other beginning, `negative_prompt_ids`, or none, takes
the place of what is given before the first position to fill; the rest of both texts is the same.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..diffusion.canvas import check_length, check_tokens, real_positions
from .configuration import DiffusionGenerationConfig
from .reader import Reader, Reading
from .strategies.filling import Canvas


class GuidedReader:
    """Two readers that are asked for the same positions; stands in for a `Reader`.

    Args:
        reader: of the texts.
        other: of the texts with the other beginning.
        beginning: long [batch, n], the other beginning.
        first: the column of the texts that comes after it.
        scale: how much the difference counts; 1 is the text alone, 0 the other alone.
    """

    def __init__(self, reader: Reader, other: Reader, beginning: torch.Tensor, first: int, scale: float) -> None:
        self.reader, self.other, self.beginning, self.first, self.scale = reader, other, beginning, first, scale

    def read(
        self, rows: torch.Tensor, input_ids: torch.Tensor, asked: torch.Tensor, level: torch.Tensor | None
    ) -> Reading:
        reading = self.reader.read(rows, input_ids, asked, level)
        other = self.other.read(
            rows,
            torch.cat([self.beginning, input_ids[:, self.first :]], dim=1),
            torch.cat([torch.zeros_like(self.beginning, dtype=torch.bool), asked[:, self.first :]], dim=1),
            level,
        )
        log_probs, other_log_probs = reading.logits.log_softmax(dim=-1), other.logits.log_softmax(dim=-1)
        guided = other_log_probs + self.scale * (log_probs - other_log_probs)
        reading.logits = torch.where(log_probs == -torch.inf, -torch.inf, guided)
        return reading

    @property
    def nfe(self) -> int:
        return self.reader.nfe + self.other.nfe

    @property
    def passes(self) -> torch.Tensor:
        return self.reader.passes + self.other.passes

    @property
    def rows(self) -> torch.Tensor:
        return self.reader.rows

    @property
    def cache(self) -> Any:
        return self.reader.cache

    def cache_logit_error(self) -> torch.Tensor | None:
        errors = [error for one in (self.reader, self.other) if (error := one.cache_logit_error()) is not None]
        return torch.stack(errors).amax(dim=0) if errors else None


def guided_reader(
    make_reader: Callable[[Canvas, torch.Tensor, torch.Tensor | None], Reader],
    model: Any,
    canvas: Canvas,
    attention_mask: torch.Tensor,
    steps: torch.Tensor | None,
    config: DiffusionGenerationConfig,
    negative_prompt_ids: torch.Tensor | None,
    negative_prompt_attention_mask: torch.Tensor | None,
) -> GuidedReader:
    """
    Args:
        make_reader: maps canvas, attention mask and steps (see `Reader`) to a reader.
        negative_prompt_ids, negative_prompt_attention_mask: as `generate` takes them.

    Raises:
        ValueError: for a beginning that is none, or too long.
    """
    ids, real = _beginning(model, len(attention_mask), config, negative_prompt_ids, negative_prompt_attention_mask)
    first = int(canvas.to_fill.any(dim=0).int().argmax())

    def begin(rest: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([torch.full_like(ids, value, dtype=rest.dtype), rest[:, first:]], dim=1)

    # What a row gives before its own first position to fill is left out as well.
    kept = attention_mask.bool() & (canvas.to_fill.cumsum(dim=1) > 0)
    mask = torch.cat([real, kept[:, first:]], dim=1)
    to_fill = begin(canvas.to_fill, 0)
    check_length(to_fill, mask, model.config.max_position_embeddings)
    other = Canvas(to_fill, begin(canvas.block, 0), canvas.uniforms, canvas.mask_levels)
    return GuidedReader(
        make_reader(canvas, attention_mask, steps),
        make_reader(other, mask.long(), None if steps is None else begin(steps, -1)),
        ids,
        first,
        config.guidance_scale,
    )


def _beginning(
    model: Any, batch_size: int, config: DiffusionGenerationConfig, ids: Any, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The other beginning, long [batch, length], and where it is no padding, bool [batch, length]."""
    num_prompts = batch_size // config.num_return_sequences
    if ids is None:
        ids = torch.empty(num_prompts, 0, dtype=torch.long)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or len(ids) != num_prompts:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(
            f"`negative_prompt_ids` must be an integer tensor [batch={num_prompts}, length], got {got}. Give every "
            "prompt its own."
        )
    ids, mask_token_id = ids.to(device=model.device, dtype=torch.long), model.config.mask_token_id
    real = real_positions(ids, attention_mask)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device)
    check_tokens(ids, real, model.config.vocab_size, mask_token_id)
    if bool(((ids == mask_token_id) & real).any()):
        raise ValueError(f"`negative_prompt_ids` holds the mask token ({mask_token_id}): it is read, not filled.")
    repeats = config.num_return_sequences
    return ids.repeat_interleave(repeats, dim=0), real.repeat_interleave(repeats, dim=0)
