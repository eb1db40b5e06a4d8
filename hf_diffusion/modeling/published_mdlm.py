"""What all models of the MDLM publication share: how their weights start, are read from published files and written.

The reference implementation and its siblings share one set of names (`backbone.blocks.0.attn_qkv.weight`, ...). They go
through transformers' own hook, so `from_pretrained` reads published files as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import USER_REGISTERED_MAPPINGS, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from .initial_std import linear_with_std
from .layers_mdlm import init_linear
from .pretrained import CheckedPreTrainedModel


class PublishedModel(CheckedPreTrainedModel):
    """What transformers has to know of these models."""

    family = "MDLM, a masked diffusion language model"
    paper = "https://arxiv.org/abs/2406.07524"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # published files hold it; the config says it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Here and not on import: for the first layout transformers puts together those of all models that it knows.
        if config.model_type not in USER_REGISTERED_MAPPINGS:
            register_checkpoint_conversion_mapping(config.model_type, _renamings())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: a fresh layer passes its input on, and a fresh model finds all tokens equally likely."""
        if not init_linear(module):
            super()._init_weights(module)

    @property
    def mask_token_id(self) -> int:
        assert self.config.mask_token_id is not None
        return self.config.mask_token_id

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but in our layout; `save_original_format=True` gives the one they were loaded from."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class PublishedModelWithHead(PublishedModel):
    """A language-model head on the network `model_class`; the mask token is never predicted."""

    model_class: type[PublishedModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = linear_with_std(config.hidden_size, config.vocab_size, std=0.0, bias=True)
        self.post_init()

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        # Behind the back of autograd, which would copy all gradients for it; a softmax gives this column none.
        logits.detach()[..., self.mask_token_id] = -torch.inf
        return logits


def _renamings() -> list[WeightRenaming | WeightConverter]:
    # One after the other; patterns further down see what those above have made of a name.
    return [
        WeightRenaming(r"^backbone\.vocab_embed\.embedding", "model.embed_tokens.weight"),
        WeightRenaming(r"^backbone\.sigma_map\.mlp\.0\.", "model.noise_embedding.in_proj."),
        WeightRenaming(r"^backbone\.sigma_map\.mlp\.2\.", "model.noise_embedding.out_proj."),
        WeightRenaming(r"^backbone\.output_layer\.norm_final\.", "model.norm."),
        WeightRenaming(r"^backbone\.output_layer\.adaLN_modulation\.", "model.final_shift_scale."),
        WeightRenaming(r"^backbone\.output_layer\.linear\.", "lm_head."),
        WeightRenaming(r"^backbone\.rotary_emb\.", "model.rotary_emb."),
        WeightRenaming(r"^backbone\.blocks\.", "model.layers."),
        WeightRenaming(r"\.norm1\.", ".input_layernorm."),
        WeightRenaming(r"\.norm2\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.adaLN_modulation\.", ".modulation."),
        WeightRenaming(r"\.attn_out\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.0\.", ".mlp.up_proj."),
        WeightRenaming(r"\.mlp\.2\.", ".mlp.down_proj."),
        WeightConverter(
            r"\.attn_qkv\.weight",
            [".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight"],
            operations=[Chunk(dim=0)],
        ),
    ]
