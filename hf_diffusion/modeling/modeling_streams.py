"""A pretrained causal model, unchanged inside, that reads and writes text in any order and in parallel streams.

Strictly causal in the order of generation, as ARMD is: what is computed for a token never changes when later blocks are
filled in, and the cache is exact. From left to right it is the causal model itself. See `rows_streams` for how its rows
become queries, and `wrapped_attention` for how it reads text on the right.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.generic import can_return_tuple

from ..diffusion.canvas import check_length, check_tokens, read_labels, real_positions
from ..diffusion.orders import positions_where
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.sampling import exclude
from ..generation.scoring import ScoredText
from .absent_arguments import without_absent_arguments
from .cache_streams import CausalStreamsCache, visible
from .configuration_streams import CausalStreamsConfig
from .loss import chunked_cross_entropy, chunked_nll
from .outputs import MaskedDiffusionOutput
from .pretrained import CheckedPreTrainedModel
from .rows_streams import Rows, plan_rows
from .wrapped_attention import WRAPPED, check_asked_for, check_in_place, register_wrapped_attention, turn_by


class CausalStreamsForMaskedDiffusion(CheckedPreTrainedModel, DiffusionGenerationMixin):
    """
    Attributes:
        causal_lm: the causal model; `base_model` too. It can be used, trained and saved as itself.
        gap: [1, hidden_size], what stands in the place of a left neighbour that is not known. A module, so that an
            adapter can have one of its own (`LoraConfig(modules_to_save=["gap"])`).
    """

    config: CausalStreamsConfig
    family = "a pretrained causal language model that writes in parallel streams"
    paper = "https://arxiv.org/abs/2601.16971"
    base_model_prefix = "causal_lm"
    generation_config_class = DiffusionGenerationConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    reads_block_index = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: CausalStreamsConfig) -> None:
        super().__init__(config)
        check_asked_for(config._attn_implementation)
        if config.later_text == "wrap" and config.rotary_layers is None:
            raise ValueError(
                '`later_text="wrap"` needs `rotary_layers` in the configuration. Make the model by '
                "`conversion.from_causal_lm(causal_lm)`, which finds out in which layers it can be read like that, if "
                "it can."
            )
        register_wrapped_attention()
        self.causal_lm = AutoModelForCausalLM.from_config(config.causal_lm_config, attn_implementation=WRAPPED)
        self.config.causal_lm_config = self.causal_lm.config  # one and the same from here on
        if config.causal_lm_generation_config is not None:
            self.causal_lm.generation_config = GenerationConfig.from_dict(config.causal_lm_generation_config)
        self.gap = nn.Embedding(1, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    @property
    def reads_suffix_first(self) -> bool:  # type: ignore[override]
        """What is read as if it stood before the text is read before it."""
        return self.config.later_text == "wrap"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return False

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Not possible, but for what is there already: the reading of text on the right is part of the attention."""
        check_asked_for(attn_implementation)

    def enable_input_require_grads(self) -> None:
        """As in transformers; the gap vector is an input too."""
        super().enable_input_require_grads()
        hook = self.gap.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
        self._require_grads_hooks.append(hook)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.config.causal_lm_config.dtype = self.causal_lm.dtype  # type: ignore[union-attr]
        self.config.note_generation(self.causal_lm.generation_config)
        super().save_pretrained(*args, **kwargs)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_output_embeddings(value)

    @property
    def lm_head(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.causal_lm.get_output_embeddings()

    @can_return_tuple
    @without_absent_arguments
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        block_index: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: CausalStreamsCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> MaskedDiffusionOutput:
        r"""
        Row n of the logits predicts token n, from the tokens of earlier blocks alone: the first token of a text from
        the gap vector, which starts as the embedding of a start token. From left to right, row n is the causal model's
        row n - 1.

        Args:
            input_ids: long [batch, length], the text; `config.mask_token_id` at positions that are not known.
            attention_mask: [batch, length], 0 at padding, which may be anywhere. Positions count the rest.
            block_index: long [batch, length], the step in which each position is generated; lower is earlier, equal is
                together (see `diffusion.orders`). Left to right if not given; if the text has masked positions, they
                are then predicted together from all the others.
            query_positions: long [batch, queried], the positions to predict, -1 for none. All of them if not given.
                With a cache it names the next block, and must.
            past_key_values: a `CausalStreamsCache`. A pass reads what is known before the block that it asks for and
                not in the cache yet. Logits are those of a pass without cache.
            labels: long [batch, length], tokens to predict; -100 for none. Gives `loss`, the mean negative
                log-likelihood in nats per token in the order given: exact for that order. The logits are then not
                returned. Needs all positions.
            use_cache: start a cache, if none is passed and `query_positions` is given.
            output_hidden_states: return the hidden states of the rows that predict, of every layer.
            num_items_in_batch: divides the loss in place of the number of labels (set by `Trainer`).

        Raises:
            ValueError: before any computation, for tokens outside the vocabulary, a text longer than
                `max_position_embeddings`, a row of padding only, or an order in which a block would have to read a
                masked position; if the attention of the causal model was switched to another one.
        """
        check_in_place(self.causal_lm)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if labels is not None and query_positions is not None:
            raise ValueError("`labels` needs the logits of all positions: leave out `query_positions`.")
        real = real_positions(input_ids, attention_mask)
        check_length(input_ids, real, self.config.max_position_embeddings)
        check_tokens(input_ids, real, self.config.vocab_size, self.config.mask_token_id)
        if labels is not None:
            labels = read_labels(labels, input_ids, attention_mask, self.config.vocab_size)
        if use_cache and past_key_values is None and query_positions is not None:
            past_key_values = CausalStreamsCache(self.config.num_hidden_layers)
        masked: torch.Tensor = input_ids == self.config.mask_token_id  # type: ignore[assignment]
        if labels is not None and not output_hidden_states:
            query_positions = positions_where(labels != -100)
            labels = _take(labels, query_positions)
        rows = plan_rows(masked, real, block_index, query_positions, past_key_values)
        logits, hidden_states = self._answer(rows, input_ids, real, past_key_values, output_hidden_states)
        loss = None
        if labels is not None:
            loss = chunked_cross_entropy(logits, labels, lambda rows: rows, self.config.vocab_size, num_items_in_batch)
        return MaskedDiffusionOutput(
            loss=loss,
            logits=None if labels is not None else logits,
            past_key_values=past_key_values,
            hidden_states=hidden_states,
        )

    def log_likelihood_in_order(self, text: ScoredText, block_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scored = positions_where(text.to_predict)
        labels = _take(text.labels, scored)
        logits = self(
            text.input_ids, attention_mask=text.attention_mask, block_index=block_index, query_positions=scored
        ).logits
        assert self.config.mask_token_id is not None
        exclude(self.config.mask_token_id, logits)
        nll = chunked_nll(logits, labels, lambda rows: rows, self.config.vocab_size)
        is_most_likely = logits.argmax(dim=-1) == labels
        return (
            -nll.new_zeros(text.labels.shape).masked_scatter(text.to_predict, nll[scored >= 0]),
            torch.zeros_like(text.to_predict).masked_scatter(text.to_predict, is_most_likely[scored >= 0]),
        )

    def _answer(
        self,
        rows: Rows,
        input_ids: torch.Tensor,
        real: torch.Tensor | None,
        cache: CausalStreamsCache | None,
        output_hidden_states: bool | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Logits [batch, asked, vocab_size] and, if asked for, hidden states of the rows that predict; None for layers
        that the causal model leaves out."""
        answers: list[Any] = []
        if rows.token.shape[1]:
            outputs, kept = self._read(rows, input_ids, real, cache, output_hidden_states)
            index = rows.answer.clamp(min=0)
            answers.append(_take_rows(outputs.logits, torch.searchsorted(kept, index)))
            answers += [_take_rows(states, index) for states in outputs.hidden_states or ()]
        if bool((rows.answer < 0).any()):
            # Nothing stands before the first token: a gap that sees itself alone, whatever the text is.
            outputs = self.causal_lm(
                inputs_embeds=self._gap(input_ids),
                output_hidden_states=output_hidden_states,
                use_cache=False,
                return_dict=True,
            )
            first = [outputs.logits, *(outputs.hidden_states or ())]
            if answers:
                is_first = (rows.answer < 0)[..., None]
                both = zip(first, answers, strict=True)
                answers = [None if one is None else torch.where(is_first, one, other) for one, other in both]
            else:
                answers = [None if one is None else one.expand(*rows.answer.shape, -1) for one in first]
        logits, *states_of_layers = answers
        return logits, tuple(states_of_layers) if output_hidden_states else None

    def _read(
        self,
        rows: Rows,
        input_ids: torch.Tensor,
        real: torch.Tensor | None,
        cache: CausalStreamsCache | None,
        output_hidden_states: bool | None,
    ) -> tuple[Any, torch.Tensor]:
        """What the causal model says of the rows, and the rows (long [kept], rising) that it gives logits for."""
        token = input_ids.gather(1, rows.token.clamp(min=0)).masked_fill(rows.token < 0, 0)
        kept = rows.answer.clamp(min=0).unique()
        inputs: dict[str, Any] = {"position_ids": rows.position, "logits_to_keep": kept, "use_cache": cache is not None}
        plain = rows.plain and (cache is None or cache.plain)
        if plain:
            inputs["input_ids"] = token
        else:
            embeddings = self.get_input_embeddings()(token.masked_fill(rows.is_gap, 0))
            gap = self._gap(token).to(embeddings.dtype)
            inputs["inputs_embeds"] = torch.where(rows.is_gap[..., None], gap, embeddings)
        block, position = rows.content_block, rows.position[:, : rows.num_content]
        if cache is not None:
            cache.plain = plain
            block, position = cache.keys_with(block, position)
        if not plain:
            inputs.update(self._who_reads_what(rows, block, position, input_ids, real))
        outputs = self.causal_lm(
            past_key_values=cache, output_hidden_states=output_hidden_states, return_dict=True, **inputs
        )
        if cache is not None:
            cache.drop_added_rows()
        return outputs, kept

    def _who_reads_what(
        self,
        rows: Rows,
        key_block: torch.Tensor,
        key_position: torch.Tensor,
        input_ids: torch.Tensor,
        real: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Mask and wrapped distances of a pass: arguments of the causal model."""
        reads = visible(rows.reads_before, key_block)
        on_the_right = reads & (key_position[:, None] > rows.position[..., None])
        if self.config.later_text == "hide":
            reads = reads & ~on_the_right
        # Of the added rows' own keys, each is seen by its own row, if that has nothing else there: a gap, or filling.
        num_rows, num_content = rows.token.shape[1], rows.num_content
        own = torch.zeros(num_rows, num_rows - num_content, dtype=torch.bool, device=reads.device)
        own[num_content:].fill_diagonal_(True)
        alone = rows.is_gap | ~reads.any(dim=-1)
        reads = torch.cat([reads, own & alone[..., None]], dim=-1)
        first_own = key_block.shape[1] - num_content
        # A content row without anything to read (filling of a ragged batch) reads itself.
        nothing = ~reads.any(dim=-1)
        reads[..., first_own : first_own + num_rows] |= torch.diag_embed(nothing)
        inputs: dict[str, Any] = {"attention_mask": reads[:, None]}
        if self.config.later_text == "wrap" and bool(on_the_right.any()):
            added = torch.zeros_like(reads[..., num_content + first_own :])
            inputs["on_the_right"] = torch.cat([on_the_right, added], dim=-1)[:, None]
            length = input_ids.shape[1] if real is None else real.sum(dim=1, keepdim=True)
            length = torch.as_tensor(length, device=reads.device).expand(len(reads), 1)
            inputs["turn"] = turn_by(self.causal_lm, length, like=self._gap(length))
            inputs["rotary_layers"] = self.config.rotary_layers
        return inputs

    def _gap(self, like: torch.Tensor) -> torch.Tensor:
        """The gap vector [1, 1, hidden_size], where the integers `like` are."""
        return self.gap(like.new_zeros(1, 1))


def _take(labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`labels` [batch, length] at `positions` [batch, n]; -100 where a position is -1."""
    return labels.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -100)


def _take_rows(states: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """`states` [batch, rows, size] at `index` [batch, n]."""
    return None if states is None else states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


__all__ = ["CausalStreamsForMaskedDiffusion"]
