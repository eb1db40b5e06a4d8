"""The autoregressive baseline that MDLM is published with: the same network, causal and without a noise level.

An ordinary causal model, here so that the published comparison can be made with the same tools: row n predicts token
n + 1, and text comes from transformers' own `generate`.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from .absent_arguments import without_absent_arguments
from .configuration_mdlm_ar import MDLMARConfig
from .layers_mdlm import PreNormLayer
from .loss import chunked_cross_entropy, read_shift_labels
from .published_mdlm import PublishedModel, PublishedModelWithHead


class MDLMARModel(PublishedModel):
    """The network without its head: one hidden state per position."""

    config: MDLMARConfig
    _no_split_modules = ["PreNormLayer"]

    def __init__(self, config: MDLMARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([PreNormLayer(config, layer_idx, is_causal=True) for layer_idx in layers])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """See `MDLMARForCausalLM.forward`; returns hidden states in place of logits."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden_states, position_ids)
        states_of_layers = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, rotary, past_key_values)
            states_of_layers.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states_of_layers) if output_hidden_states else None,
        )


class MDLMARForCausalLM(PublishedModelWithHead, GenerationMixin):
    """The baseline with its language-model head."""

    family = "MDLM's autoregressive baseline, an ordinary causal language model"
    config: MDLMARConfig
    model_class = MDLMARModel

    @can_return_tuple
    @without_absent_arguments
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: torch.Tensor,
    ) -> CausalLMOutputWithPast:
        r"""
        Row n of the logits predicts token n + 1, as transformers has it. The mask token is never predicted (-inf).

        Args:
            input_ids: long [batch, length].
            attention_mask: [batch, length so far], 0 at padding.
            position_ids: long [batch, length]; counted on from the cache if not given.
            past_key_values: keys and values of the text so far.
            labels: long [batch, length], -100 for none. Gives `loss`, the mean negative log-likelihood of labels[1:] in
                nats per token. The logits are then not returned.
            use_cache: return `past_key_values`.
            logits_to_keep: compute logits at the last so many positions, or at those in a tensor; 0 for all.
            output_hidden_states: return the residual stream before the first layer and after every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).
            shift_labels: long [batch, length], in place of `labels`: row n of it is what row n of the logits predicts
                (set by `Trainer`, where a text is spread over devices).
        """
        shift_labels = read_shift_labels(others)
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, output_hidden_states, return_dict=True
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            loss = chunked_cross_entropy(
                hidden_states, shift_labels, self._logits, self.config.vocab_size, num_items_in_batch
            )
        else:
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(hidden_states[:, rows])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


__all__ = ["MDLMARForCausalLM", "MDLMARModel"]
