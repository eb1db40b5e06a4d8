"""What every model here adds to `PreTrainedModel`: settings, vocabulary and checkpoints are checked before use."""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..hub.saving import PreTrainedModelWithCode
from .checkpoint_checks import check_finite, check_tensors, name_damaged_file


logger = logging.get_logger(__name__)


class CheckedPreTrainedModel(PreTrainedModelWithCode):
    """A `PreTrainedModel` that refuses what transformers only warns of."""

    def __init__(self, config: Any) -> None:
        config.validate()  # `from_pretrained(..., name=value)` changes a configuration after it was checked
        if config.output_attentions:
            raise ValueError(
                "`output_attentions` has no effect here: layers compute parts of the attention at a time, by fused "
                "kernels, and keep no weights. Leave it out."
            )
        super().__init__(config)

    @property
    def device(self) -> torch.device:
        """Where inputs go. Weights that accelerate has offloaded are in no place of their own."""
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if device is None else torch.device(device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a damaged checkpoint is refused.

        Args:
            ignore_mismatched_sizes: start tensors of another shape afresh, with a warning.
            output_loading_info: return (model, report). Tensors that the checkpoint lacks, or that the model has no use
                for, are then in the report, and refused no more.

        Raises:
            ValueError: for a file that cannot be read, for tensors that are missing, left over, of another shape, or
                not finite. Names the file and the tensor.
        """
        source = pretrained_model_name_or_path
        if source is None:  # the weights are those of `state_dict`
            return super().from_pretrained(
                source,
                *model_args,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                output_loading_info=output_loading_info,
                **kwargs,
            )
        with name_damaged_file(source, kwargs):
            model, report = super().from_pretrained(
                source, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        check_tensors(model, report, source, kwargs, ignore_mismatched_sizes, other_tensors=output_loading_info)
        check_finite(model, source, kwargs)
        return (model, report) if output_loading_info else model

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers. No special token is moved, the mask token neither.

        Raises:
            ValueError: for a vocabulary that would lose a special token of the configuration.
        """
        if new_num_tokens is not None:
            resized = copy.deepcopy(self.config)
            resized.vocab_size = new_num_tokens
            resized.validate()
        mask_token_id, old_size = self.config.mask_token_id, self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if old_size <= mask_token_id < self.config.vocab_size:
            logger.warning(
                f"`mask_token_id` ({mask_token_id}) was outside the vocabulary and is now one of its tokens, which "
                "marks positions to fill and is never drawn. If your tokenizer has another token there, set "
                f"`model.config.mask_token_id` to {self.config.vocab_size}."
            )
        return embeddings
