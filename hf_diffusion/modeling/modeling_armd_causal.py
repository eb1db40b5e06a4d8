"""ARMD as a causal language model: its left-to-right order, in the convention and with the caches of transformers.

The weights are those of `ARMDForMaskedDiffusion`. Rows are shifted by one: row n of the logits predicts token n + 1. In
this order the query row that follows a token is final once the token is known, as its content row is; so every layer
keeps one entry for a token, and whatever transformers does with a cache of tokens can be done with this one.
"""

import copy
import inspect
from typing import Any

import torch
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from ..diffusion.canvas import check_context, check_no_mask, check_tokens, read_labels
from ..generation.configuration import DIFFUSION_FIELDS, refuse_unknown
from ..generation.continuous_batching import (
    CheckedBatchingManager,
    as_paged_call,
    check_as_kept,
    check_batching_config,
    check_request,
)
from .causal_rows_armd import CausalRows, lay_rows, read_rows
from .loss import chunked_cross_entropy, read_shift_labels
from .masks import build_mask
from .masks_armd import Attends, attend_alike
from .modeling_armd import ARMDForMaskedDiffusion, ARMDNetwork, ARMDNetworkWithHead
from .packed_armd import PackedARMD
from .prefix_aggregation import aggregate_causally, aggregate_visible
from .token_cache_armd import TokenCache, check_token_cache


class ARMDCausalModel(ARMDNetwork):
    """The network without its head: row n is the hidden state that predicts token n + 1.

    Inside, the start symbol has a row in front of either stream.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """See `ARMDForCausalLM.forward`; returns hidden states in place of logits."""
        if output_attentions:
            _refuse_attentions()
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        attention_mask = self._check(input_ids, inputs_embeds, attention_mask, past_key_values)
        if inputs_embeds is None:
            assert input_ids is not None
            if attention_mask is not None:  # padding may hold any id
                input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, 0)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        cache = None if past_key_values is None else TokenCache(past_key_values, inputs_embeds)
        # A static cache answers with its own counter, which goes on counting: the sum is a copy.
        past = 0 if past_key_values is None else past_key_values.get_seq_length() + 0

        # 0 for the start symbol, 1 for the first token; left padding shares the place of the start symbol.
        num_new, device = inputs_embeds.shape[1], inputs_embeds.device
        if attention_mask is None:
            token_position = past + torch.arange(1, num_new + 1, device=device)[None]
        else:
            token_position = attention_mask.long().cumsum(dim=1)[:, -num_new:]
        rows = lay_rows(self, inputs_embeds, token_position)
        prefix = self._aggregate(rows, attention_mask, past, cache)
        attends = self._attends(rows.content, attention_mask, past, past_key_values)
        states_of_layers = read_rows(self, rows, prefix, attends, cache)
        return BaseModelOutputWithPast(
            last_hidden_state=states_of_layers[-1],
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states_of_layers) if output_hidden_states else None,
        )

    def _aggregate(
        self,
        rows: CausalRows,
        attention_mask: torch.Tensor | None,
        past: int | torch.Tensor,
        cache: TokenCache | None,
    ) -> torch.Tensor:
        """Prefixes [batch, 1 + new, hidden_size] of the query rows: eq. 6 without its scale."""
        content = rows.content
        content_encoding = self.position_encoding(rows.content_position, content.dtype)
        query_encoding = self.position_encoding(rows.query_position, content.dtype)
        if attention_mask is None:
            read = content
        else:
            padding = attention_mask[:, -(content.shape[1] - 1) :] == 0
            read = content.masked_fill(F.pad(padding, (1, 0))[..., None], 0)
        query = aggregate_causally(query_encoding, content_encoding, read)
        embeddings = None if cache is None else cache.past_embeddings()
        if embeddings is not None:
            num_slots = embeddings.shape[1]
            slot = torch.arange(num_slots, device=content.device)
            if attention_mask is None:
                position, visible = slot[None] + 1, (slot < past)[None]
            else:
                real = F.pad(attention_mask, (0, num_slots))[:, :num_slots] != 0
                position, visible = real.long().cumsum(dim=1), (slot < past) & real
            row = torch.arange(query.shape[1], device=content.device)[:, None]
            # A static cache may be longer than the context; what it has no use for is not visible.
            past_encoding = self.position_encoding(
                position.clamp(max=self.config.max_position_embeddings), content.dtype
            )
            query = query + aggregate_visible(query_encoding, past_encoding, embeddings, visible[:, None] & (row > 0))
        return query

    def _attends(
        self,
        content: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: int | torch.Tensor,
        past_key_values: Cache | None,
    ) -> Attends:
        """Row 0 reads itself; a row after a token reads row 0 and the tokens up to its own but for padding."""
        batch_size, num_rows = content.shape[:2]
        num_tokens = num_rows - 1 if past_key_values is None else past_key_values.get_mask_sizes(num_rows - 1, 0)[0]
        if attention_mask is None and num_tokens == num_rows - 1 and self.config._attn_implementation == "sdpa":
            return attend_alike(None, num_rows)

        def reads(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return (key == 0) | ((query > 0) & (key <= past + query))

        def reads_text(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return reads(batch, head, query, key) & real[batch, key]

        if attention_mask is None:
            mask = build_mask(reads, self.config, content, (1, num_rows, 1 + num_tokens))
        else:
            room = num_tokens - attention_mask.shape[1]  # in a static cache, for tokens to come
            real = F.pad(F.pad(attention_mask != 0, (1, 0), value=True), (0, room), value=True)
            mask = build_mask(reads_text, self.config, content, (batch_size, num_rows, 1 + num_tokens))
        return attend_alike(mask, num_rows)

    def _check(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """Raise ValueError for what the network could not read; returns the mask, None if there is no padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` or `inputs_embeds`.")
        name, inputs = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
        assert inputs is not None
        if inputs.ndim != (2 if input_ids is not None else 3) or inputs.shape[1] == 0:
            raise ValueError(f"`{name}` must have shape [batch, length >= 1, ..], got {tuple(inputs.shape)}.")
        if self.gradient_checkpointing and self.training and past_key_values is not None:
            raise ValueError("Gradient checkpointing computes layers twice, and a cache is written once: leave it out.")
        if torch.compiler.is_compiling():
            return attention_mask  # what follows looks at values, which a compiled graph cannot
        if past_key_values is not None:
            check_token_cache(past_key_values, inputs.shape[1])
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = past + inputs.shape[1]
        if attention_mask is not None and attention_mask.shape != (inputs.shape[0], length):
            raise ValueError(
                f"`attention_mask` must have shape [batch={inputs.shape[0]}, {length}], for {past} tokens in the cache "
                f"and {inputs.shape[1]} new ones, got {tuple(attention_mask.shape)}. It marks padding and says nothing "
                "else."
            )
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        longest = length if attention_mask is None else int((attention_mask != 0).sum(dim=1).max())
        check_context(longest, self.config.max_position_embeddings)
        if input_ids is not None:
            real = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :] != 0
            mask_token_id = self.config.mask_token_id
            assert mask_token_id is not None
            check_no_mask(input_ids if real is None else input_ids[real], mask_token_id)
            check_tokens(input_ids, real, self.config.vocab_size, mask_token_id)
        return attention_mask


class ARMDForCausalLM(ARMDNetworkWithHead, GenerationMixin):
    """ARMD left to right, as transformers has causal language models; its weights are `ARMDForMaskedDiffusion`'s."""

    model_class = ARMDCausalModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: torch.Tensor,
    ) -> CausalLMOutputWithPast:
        r"""
        Row n of the logits predicts token n + 1; the last row of left padding predicts the first token.

        Args:
            input_ids: long [batch, new], the text after what the cache holds.
            attention_mask: [batch, length so far], 0 at padding, which may be anywhere. Positions count the rest.
            past_key_values: a `DynamicCache` or `StaticCache`. The values of its first layer are twice as wide as the
                keys: the embeddings of the tokens lie behind them, for the prefix aggregation.
            inputs_embeds: [batch, new, hidden_size], in place of `input_ids`.
            labels: long [batch, new], the text itself; -100 for what is not to be predicted, which padding never is.
                Gives `loss`, the mean negative log-likelihood of labels[1:] in nats per token. The logits are then not
                returned, since they are never all held.
            use_cache: return `past_key_values`. On by default when not training.
            logits_to_keep: compute logits at the last so many positions, or at those in a tensor; 0 for all.
            output_attentions: refused: the two streams read in different patterns, none of them tokens by tokens.
            output_hidden_states: return the query stream after the prefix aggregation and after every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).
            shift_labels: long [batch, new], in place of `labels`: row n of it is what row n of the logits predicts
                (where a text is split among processes, and the next token is with another one).

        Raises:
            ValueError: before any computation, for tokens outside the vocabulary, a text longer than
                `max_position_embeddings`, and caches that keep less than ARMD reads.
        """
        shift_labels = read_shift_labels(others)
        for name, targets in (("labels", labels), ("shift_labels", shift_labels)):
            if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError(
                    f"`logits_to_keep` has no effect with `{name}`, which returns no logits: pass one of them."
                )
        if shift_labels is not None:
            text = input_ids if input_ids is not None else shift_labels
            shift_labels = read_labels(shift_labels, text, None, self.config.vocab_size)
        elif labels is not None:
            text = input_ids if input_ids is not None else labels
            new_mask = None if attention_mask is None else attention_mask[:, -labels.shape[1] :]
            labels = read_labels(labels, text, new_mask, self.config.vocab_size)
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states, loss, logits = outputs.last_hidden_state, None, None
        if shift_labels is not None:
            loss = chunked_cross_entropy(
                hidden_states, shift_labels, self.lm_head, self.config.vocab_size, num_items_in_batch
            )
        else:
            rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, rows])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def as_masked_diffusion(self) -> ARMDForMaskedDiffusion:
        """A model of the same modules, not of copies, that reads and writes in any order."""
        with torch.device("meta"):
            model = ARMDForMaskedDiffusion(self.config)
        for name, module in self.model.named_children():
            setattr(model.model, name, module)
        for name, parameter in self.model.named_parameters(recurse=False):
            setattr(model.model, name, parameter)
        model.lm_head = self.lm_head
        model.generation_config = model.generation_config_class.from_generation_config(self.generation_config)
        return model

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate`, with its defaults; or, with a `strategy`, that of `ARMDForMaskedDiffusion`.

        The call says which, else `generation_config`, else the model's own; `strategy=None` in the call leaves the last
        aside.

        Raises:
            ValueError: before any pass, for unknown arguments and arguments without effect.
        """
        own, given = _settings(self.generation_config), _settings(generation_config)
        # Assisted decoding calls with a config of its own, made from that of the model it assists.
        if given.get("is_assistant") or ("strategy" in kwargs and kwargs["strategy"] is None):
            own = {name: value for name, value in own.items() if name not in DIFFUSION_FIELDS}
        settings = {**own, **given, **kwargs}
        if settings.get("strategy") is not None:
            return self.as_masked_diffusion().generate(inputs, generation_config, *others, **kwargs)
        refuse_unknown({**own, **given})
        for name, default in DIFFUSION_FIELDS.items():
            if settings.get(name, default) != default:
                raise ValueError(
                    f"`{name}`={settings[name]!r} has no effect without a `strategy`. Set `strategy`, or leave it out."
                )
        if settings.get("output_attentions"):
            _refuse_attentions()
        kwargs = {name: value for name, value in kwargs.items() if name not in DIFFUSION_FIELDS}
        if settings.get("cache_implementation") == "paged":
            inputs, kwargs = as_paged_call(inputs, settings, others, kwargs)
        return super().generate(inputs, generation_config, *others, **kwargs)

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        """transformers' own: continuous batching of prompts of any lengths.

        Fields of the generation config may be set in the call too; `strategy=None` leaves the model's own aside.
        Without `max_new_tokens` anywhere, a text goes on to its end or to that of the context.

        Raises:
            ValueError: before any pass, for settings without effect and prompts that the model cannot continue.
        """
        options = inspect.signature(GenerationMixin.generate_batch).parameters
        settings = {name: value for name, value in kwargs.items() if name not in options}
        refuse_unknown(settings, tuple(options))
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if "strategy" in settings and settings["strategy"] is None:
            settings = {**DIFFUSION_FIELDS, **settings}
        config.update(**settings, allow_custom_entries=True)
        check_batching_config(config)
        for prompt in inputs:
            check_request(self.config, prompt, config.max_new_tokens, config.num_return_sequences or 1)
        kwargs = {name: value for name, value in kwargs.items() if name in options}
        return super().generate_batch(inputs, config, *others, **kwargs)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> CheckedBatchingManager:
        """transformers' own; all its ways into continuous batching come here.

        Raises:
            ValueError: for settings without effect, and an `attn_implementation` other than "sdpa" and "eager".
        """
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        check_batching_config(config)
        if config.eos_token_id is None:
            config.eos_token_id = -1  # how the manager is told that no token ends a text
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None:
            if generation_config is not None:
                check_as_kept(config, kept.generation_config)
            return kept
        if continuous_batching_config is None:
            continuous_batching_config = getattr(config, "continuous_batching_config", None)
        return CheckedBatchingManager(
            PackedARMD(self), config, continuous_batching_config or ContinuousBatchingConfig(), workload_hints
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """The padding mask as it is, whatever the cache: the model makes its own masks, with its own extra rows."""
        return attention_mask

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(model_kwargs)
        # It lets pass what other models take, such as `position_ids`.
        for name in TransformersKwargs.__optional_keys__ - inspect.signature(self.forward).parameters.keys():
            if model_kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` is not an argument of {type(self).__name__}: positions and visibility follow from "
                    "`attention_mask`. Leave it out."
                )

    def _get_static_cache_init_shape(self) -> None:
        # The first layer's values are wider than its keys: buffers are made when the first states are there.
        return None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        # The last thing that `generate` does before the first pass, and the first where all lengths are known.
        attention_mask = model_kwargs.get("attention_mask")
        padding = 0 if attention_mask is None else int((attention_mask == 0).sum(dim=1).min())
        check_context(max_cache_length + 1 - padding, self.config.max_position_embeddings)
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )


def _settings(config: GenerationConfig | None) -> dict[str, Any]:
    """What `config` sets."""
    settings = {} if config is None else vars(config)
    return {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}


def _refuse_attentions() -> None:
    raise ValueError(
        "`output_attentions`=True: two streams of ARMD read the start symbol and the tokens, each in its own way, so "
        "there are no attentions from tokens to tokens. Leave it out."
    )


__all__ = ["ARMDCausalModel", "ARMDForCausalLM"]
