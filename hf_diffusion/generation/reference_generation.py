"""The reference's samplers behind `generate`."""

from typing import Any

import torch

from .configuration import DiffusionGenerationConfig
from .reference_sampler import sample_as_reference, sample_windows_as_reference


@torch.no_grad()
def generate_as_reference(
    model: Any,
    canvas: torch.Tensor,
    attention_mask: torch.Tensor,
    config: DiffusionGenerationConfig,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, int]:
    """`generate(reference_sampler=...)`: the settings of a call as arguments of `reference_sampler`'s functions.

    Args:
        model: an MDLM.
        canvas: long [batch, length], with masks at the positions to fill.
        attention_mask: [batch, length].

    Raises:
        ValueError: for padding, and for a text that is not cut as the reference cuts it.
    """
    if not bool(attention_mask.all()):
        raise ValueError("`attention_mask` marks padding, which the reference sampler cannot skip. Leave it out.")
    time_conditioning = model.config.time_conditioning
    settings = {
        "num_steps": config.max_denoising_steps,
        "mask_token_id": model.config.mask_token_id,
        "schedule": model.config.make_schedule(),
        "time_conditioning": time_conditioning,
        "generator": generator,
    }

    def predict(input_ids: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        noise_level = {"sigma": sigma} if time_conditioning else {}
        return model(input_ids, return_dict=True, **noise_level).logits

    if config.strategy == "ancestral":
        return sample_as_reference(predict, canvas, sampler=config.reference_sampler, **settings)
    context, stride = model.config.max_position_embeddings, config.block_length
    num_strides, rest = divmod(canvas.shape[1] - context, stride)
    if rest or num_strides < 0 or not bool((canvas[:, context:] == model.config.mask_token_id).all()):
        raise ValueError(
            f"The reference draws windows: the text ({canvas.shape[1]} tokens) must be the context ({context}) and a "
            f"number of whole strides (`block_length`={stride}) more, which are all masked."
        )
    first = canvas[:, :context]
    return sample_windows_as_reference(predict, first, stride=stride, num_strides=num_strides, **settings)
