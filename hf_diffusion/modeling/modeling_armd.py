"""ARMD: a strictly causal two-stream transformer that generates text in any order (arXiv 2601.16971).

Every position is predicted from the blocks before its own. A *content* stream reads the text causally; a *query*
stream, one row per position to predict, reads the content of earlier blocks only and never the token it predicts. After
the first `num_two_stream_layers` layers the content stream ends and the query rows go on alone, causally. No mask token
is ever read, so nothing that has been computed for a block changes when later ones are filled in: the cache is exact.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from ..diffusion.canvas import read_labels
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.sampling import exclude
from ..generation.scoring import ScoredText
from .absent_arguments import without_absent_arguments
from .cache_armd import ARMDCache
from .configuration_armd import ARMDConfig
from .initial_std import init_with_own_std, linear_with_std
from .loss import chunked_cross_entropy, chunked_nll
from .masks import NOWHERE
from .masks_armd import Attend, Attends, plan_attention
from .outputs import MaskedDiffusionOutput, QueryModelOutput
from .prefix_aggregation import PositionEncoding, aggregate_causally, aggregate_visible, prefix_state
from .pretrained import CheckedPreTrainedModel
from .rows_armd import START, UNKNOWN, Canvas, Rows, plan_rows, read_canvas


class StoresKeysAndValues(Protocol):
    """A cache, as a layer sees it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class ARMDAttention(nn.Module):
    """Attention in which some rows ask and some answer: the two streams share every weight (paper, eq. 7)."""

    def __init__(self, config: ARMDConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = linear_with_std(config.hidden_size, config.hidden_size, std=_residual_std(config))

    def forward(
        self,
        asking: torch.Tensor,
        answering: torch.Tensor,
        asking_rotary: tuple[torch.Tensor, torch.Tensor],
        answering_rotary: tuple[torch.Tensor, torch.Tensor],
        attends: list[Attend],
        past_key_values: StoresKeysAndValues | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in ((self.q_proj, asking), (self.k_proj, answering), (self.v_proj, answering))
        )
        query, _ = apply_rotary_pos_emb(query, query, *asking_rotary)
        key, _ = apply_rotary_pos_emb(key, key, *answering_rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        outputs = [
            attention_interface(
                self,
                query[:, :, attend.rows],
                key,
                value,
                attend.mask,
                dropout=self.config.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                is_causal=attend.is_causal,
            )[0]
            for attend in attends
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.o_proj(output.flatten(2))


class ARMDMLP(nn.Module):
    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = linear_with_std(
            config.intermediate_size, config.hidden_size, std=_residual_std(config), bias=True
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ARMDLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer of which the rows `asking` go on and the rows `answering` give keys and values.

    Two-stream layers: content and query rows ask, content rows answer. The last of them: only query rows ask, since
    nobody reads the content stream any more. Upper layers: query rows ask and answer.
    """

    def __init__(self, config: ARMDConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.self_attn = ARMDAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = ARMDMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        asking: slice,
        answering: slice,
        attends: list[Attend],
        past_key_values: StoresKeysAndValues | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(
            normed[:, asking],
            normed[:, answering],
            (rotary[0][:, asking], rotary[1][:, asking]),
            (rotary[0][:, answering], rotary[1][:, answering]),
            attends,
            past_key_values,
        )
        hidden_states = hidden_states[:, asking] + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def _residual_std(config: ARMDConfig) -> float:
    # Each layer adds twice to a residual stream; scaled so, its variance at the start does not grow with the depth.
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


class ARMDPreTrainedModel(CheckedPreTrainedModel):
    family = "ARMD, an auto-regressive masked diffusion model"
    paper = "https://arxiv.org/abs/2601.16971"
    config: ARMDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ARMDLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = ["position_encoding.proj"]  # small, and every query is a sum over it: never quantised

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ARMDNetwork):
            init.normal_(module.start, std=self.config.initializer_range)
            if module.no_neighbour is not None:
                init.normal_(module.no_neighbour, std=self.config.initializer_range)
        elif not init_with_own_std(module):
            super()._init_weights(module)


class ARMDNetwork(ARMDPreTrainedModel):
    """The weights of ARMD but for its head, and the way through its layers."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.start = nn.Parameter(torch.empty(config.hidden_size))
        self.no_neighbour = nn.Parameter(torch.empty(config.hidden_size)) if config.left_neighbour else None
        self.position_encoding = PositionEncoding(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.layers = nn.ModuleList([ARMDLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def query_stream(
        self,
        content_states: torch.Tensor,
        query_states: torch.Tensor,
        positions: torch.Tensor,
        attends: Attends,
        past_key_values: StoresKeysAndValues | None,
    ) -> list[torch.Tensor]:
        """The query rows [batch, queries, hidden] before the first layer and after every layer, the last normed.

        Args:
            content_states, query_states: what enters the two streams.
            positions: [batch or 1, contents + queries], of the content rows and then the query rows.
            attends: who reads whom.
            past_key_values: is given the keys and values of every layer, and answers with those to read.
        """
        num_content, num_query = content_states.shape[1], query_states.shape[1]
        content, query, all_rows = slice(0, num_content), slice(num_content, None), slice(None)
        rotary = self.rotary_emb(content_states, positions)
        hidden_states = torch.cat([content_states, query_states], dim=1)
        states_of_layers = [query_states]
        assert self.config.num_two_stream_layers is not None
        last_two_stream_layer = self.config.num_two_stream_layers - 1
        # Assisted decoding with `assistant_early_exit` lowers the number of layers for a while.
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if layer_idx < last_two_stream_layer:
                rows = (all_rows, content, attends.both)
            elif layer_idx == last_two_stream_layer:
                rows = (query, content, attends.query)
            else:
                rows = (all_rows, all_rows, attends.upper)
            hidden_states = layer(hidden_states, rotary, *rows, past_key_values=past_key_values)
            if layer_idx == last_two_stream_layer:
                rotary = (rotary[0][:, query], rotary[1][:, query])
            states_of_layers.append(hidden_states[:, -num_query:])
        states_of_layers[-1] = self.norm(states_of_layers[-1])
        return states_of_layers


class ARMDModel(ARMDNetwork):
    """The network without its head: one hidden state per position to predict."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        block_index: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: ARMDCache | None = None,
        output_hidden_states: bool | None = None,
    ) -> QueryModelOutput:
        """See `ARMDForMaskedDiffusion.forward`; returns hidden states in place of logits."""
        cache = past_key_values
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        canvas, rows = self._plan(input_ids, attention_mask, block_index, query_positions, cache)
        positions = torch.cat([_take(canvas.position, rows.content, 0), _take(canvas.position, rows.query, 0)], dim=1)
        content_states, query_states = self._embed(input_ids, canvas, rows, positions, cache)
        attends = plan_attention(rows, cache, self.config, content_states)
        states_of_layers = self.query_stream(content_states, query_states, positions, attends, cache)
        if cache is not None:
            assert query_positions is not None
            cache.advance(rows.content, rows.content_block < NOWHERE, query_positions, input_ids.shape[1])

        def answer(states: torch.Tensor) -> torch.Tensor:
            """From rows in the order of generation to the rows that were asked for."""
            if rows.answer is not None:
                return _take_rows(states, rows.answer)
            if not rows.in_position_order:
                states = torch.empty_like(states).scatter(1, rows.query[..., None].expand_as(states), states)
            return states if query_positions is None else _take_rows(states, query_positions)

        return QueryModelOutput(
            last_hidden_state=answer(states_of_layers[-1]),
            past_key_values=cache,
            hidden_states=tuple(map(answer, states_of_layers)) if output_hidden_states else None,
        )

    @torch.compiler.disable
    def _plan(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        block_index: torch.Tensor | None,
        query_positions: torch.Tensor | None,
        cache: ARMDCache | None,
    ) -> tuple[Canvas, Rows]:
        # Depends on the values of its arguments, so it stays outside a compiled graph; everything after it is inside.
        canvas = read_canvas(input_ids, attention_mask, self.config)
        return canvas, plan_rows(canvas, block_index, query_positions, cache)

    def _embed(
        self,
        input_ids: torch.Tensor,
        canvas: Canvas,
        rows: Rows,
        positions: torch.Tensor,
        cache: ARMDCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Content rows [batch, M, hidden], the token embeddings, and query rows [batch, Q, hidden], from eq. 6."""
        # Masked positions and padding are read by nothing that is asked for; any embedding will do.
        unread = canvas.masked if canvas.real is None else canvas.masked | ~canvas.real
        input_ids = input_ids.masked_fill(unread, 0)
        content = self.embed_tokens(_take(input_ids, rows.content, 0))
        content = torch.where((rows.content == START)[..., None], self.start.to(content.dtype), content)
        encoding = self.position_encoding(positions, content.dtype)
        content_encoding, query_encoding = encoding.split([rows.content.shape[1], rows.query.shape[1]], dim=1)

        later_pass = cache is not None and cache.num_passes > 0
        if cache is not None:
            state = prefix_state(content_encoding, content.masked_fill((rows.content_block == NOWHERE)[..., None], 0))
            cache.prefix_state = state if cache.prefix_state is None else cache.prefix_state + state
        if later_pass:
            assert cache is not None and cache.prefix_state is not None
            query = query_encoding @ cache.prefix_state.to(query_encoding.dtype)
        elif rows.pattern == "causal":
            query = aggregate_causally(query_encoding, content_encoding, content)
        else:
            visible = rows.content_block[:, None, :] < rows.query_block[:, :, None]
            query = aggregate_visible(query_encoding, content_encoding, content, visible)
        query = query * self.config.prefix_scale

        if self.no_neighbour is not None:
            neighbour = self.embed_tokens(_take(input_ids, rows.neighbour, 0))
            neighbour = torch.where((rows.neighbour == START)[..., None], self.start.to(neighbour.dtype), neighbour)
            unknown = (rows.neighbour == UNKNOWN)[..., None]
            query = query + torch.where(unknown, self.no_neighbour.to(neighbour.dtype), neighbour)
        return self.dropout(content), self.dropout(query)


class ARMDNetworkWithHead(ARMDPreTrainedModel):
    """A language-model head on the network `model_class`."""

    model_class: type[ARMDNetwork]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ARMDForMaskedDiffusion(ARMDNetworkWithHead, DiffusionGenerationMixin):
    """ARMD with its language-model head: likelihood in any order, and text through `generate`."""

    model_class = ARMDModel
    generation_config_class = DiffusionGenerationConfig
    reads_block_index = True

    @can_return_tuple
    @without_absent_arguments
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        block_index: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: ARMDCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedDiffusionOutput:
        r"""
        Row n of the logits predicts token n, from the tokens of earlier blocks alone (paper, eq. 2).

        Args:
            input_ids: long [batch, length], the text; `config.mask_token_id` at positions that are not known.
            attention_mask: [batch, length], 0 at padding, which may be anywhere. Positions count the rest.
            block_index: long [batch, length], the step in which each position is generated; lower is earlier, equal is
                together (see `diffusion.orders`). Left to right if not given; if the text has masked positions, they
                are then predicted together from all the others.
            query_positions: long [batch, queried], the positions to predict, -1 for none. All of them if not given.
                With a cache it names the next block, and must.
            past_key_values: an `ARMDCache`. The first pass reads everything before the block that it asks for, later
                passes only what the pass before asked for, which `input_ids` must hold by then. `block_index` counts
                in the first pass only. Logits are those of a pass without cache.
            labels: long [batch, length], tokens to predict; -100 for none, and none are predicted at padding. Gives
                `loss`, the mean negative log-likelihood in nats per token in the order given: exact for that order, and
                so an upper bound on the negative log-likelihood of the text. The logits are then not returned, since
                they are never all held. Needs all positions (`query_positions=None`).
            use_cache: start a cache, if none is passed and `query_positions` is given.
            output_hidden_states: return the query stream after the prefix aggregation and after every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).

        Raises:
            ValueError: before any computation, for tokens outside the vocabulary, a text longer than
                `max_position_embeddings`, a row of padding only, blocks with gaps in their numbers, or an order in
                which a block would have to read a masked position.
        """
        if labels is not None and query_positions is not None:
            raise ValueError("`labels` needs the logits of all positions: leave out `query_positions`.")
        if labels is not None:
            labels = read_labels(labels, input_ids, attention_mask, self.config.vocab_size)
        if use_cache and past_key_values is None and query_positions is not None:
            past_key_values = ARMDCache(self.config.num_hidden_layers)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            block_index=block_index,
            query_positions=query_positions,
            past_key_values=past_key_values,
            output_hidden_states=output_hidden_states,
        )
        if labels is None:
            loss, logits = None, self.lm_head(outputs.last_hidden_state)
        else:
            logits = None
            loss = chunked_cross_entropy(
                outputs.last_hidden_state, labels, self.lm_head, self.config.vocab_size, num_items_in_batch
            )
        return MaskedDiffusionOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def log_likelihood_in_order(self, text: ScoredText, block_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(text.input_ids, attention_mask=text.attention_mask, block_index=block_index)
        mask_token_id, most_likely = self.config.mask_token_id, []
        assert mask_token_id is not None

        def logits(hidden_states: torch.Tensor) -> torch.Tensor:
            logits = self.lm_head(hidden_states)
            exclude(mask_token_id, logits)
            most_likely.append(logits.argmax(dim=-1))
            return logits

        nll = chunked_nll(outputs.last_hidden_state, text.labels, logits, self.config.vocab_size)
        most_likely_tokens = torch.full_like(text.labels, -1).masked_scatter(text.to_predict, torch.cat(most_likely))
        return -nll, text.to_predict & (most_likely_tokens == text.labels)


def _take(values: torch.Tensor, index: torch.Tensor, otherwise: int) -> torch.Tensor:
    """`values` [batch, length] at `index` [batch, n]; `otherwise` where the index is negative."""
    return values.gather(1, index.clamp(min=0)).masked_fill(index < 0, otherwise)


def _take_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` [batch, length, hidden] at `index` [batch, n]; negative indices take row 0."""
    return states.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))


__all__ = ["ARMDForMaskedDiffusion", "ARMDModel", "ARMDNetwork", "ARMDNetworkWithHead", "ARMDPreTrainedModel"]
