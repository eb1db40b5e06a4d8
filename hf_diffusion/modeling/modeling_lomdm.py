"""LoMDM: an MDLM that learns in which order to generate (arXiv 2602.02112).

Two heads on the backbone give every position an exponent. One reads the clean text and says how tokens were masked, in
training; the other reads the masked text and says at which rate a position is revealed, in generation. No gradient
flows from them into the backbone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import can_return_tuple

from ..diffusion.canvas import read_text_and_labels
from ..diffusion.order_bound import bound_terms, rloo_loss
from ..diffusion.order_diagnostics import diagnostics
from ..diffusion.order_masks import OrderEstimator, check_estimator, check_uniforms, draw_masks
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.scoring import BoundEstimator, ScoredText
from ..generation.strategies.filling import Filling, Strategy
from ..generation.strategies.learned_order import LEARNED_FIRST_HITTING
from .absent_arguments import without_absent_arguments
from .bound_lomdm import SCORE_ESTIMATORS, LearnedOrderBound
from .configuration_lomdm import LoMDMConfig
from .inputs_mdlm import read_text
from .layers_mdlm import take_rows
from .loss import chunked_nll
from .modeling_mdlm import MDLMForMaskedDiffusion, Modulations
from .outputs import MaskedDiffusionOutput
from .rows_mdlm import places_in_text
from .scheduler_head import SchedulerHead


SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("conditioning_size", "tie_word_embeddings"),
)
"""Fields of the configuration that weights depend on."""


@dataclass
class LoMDMOutput(MaskedDiffusionOutput):
    """
    Args:
        exponents: [batch, length] in float32 or wider, t times the rate at which each masked position is revealed.
        diagnostics: with `labels`, what the order is like, by name (see `diffusion.order_diagnostics`).
    """

    exponents: torch.Tensor | None = None
    diagnostics: dict[str, torch.Tensor] | None = None


class MaskedCopies(NamedTuple):
    """What the network makes of masked copies of a text: [copies, batch, length] each."""

    masked: torch.Tensor
    log_probs: torch.Tensor
    exponents: torch.Tensor


class LoMDMForMaskedDiffusion(MDLMForMaskedDiffusion):
    """An MDLM with a scheduler head for the forward and one for the reverse process."""

    family = "LoMDM, an MDLM that learns the order of generation"
    paper = "https://arxiv.org/abs/2602.02112"
    config: LoMDMConfig
    _no_split_modules = ["PreNormLayer"]  # of the heads; the network adds its own
    learns_order = True

    def __init__(self, config: LoMDMConfig) -> None:
        super().__init__(config)
        self.forward_scheduler = SchedulerHead(config)
        self.reverse_scheduler = SchedulerHead(config)
        self.post_init()

    @classmethod
    def from_mdlm(cls, model: MDLMForMaskedDiffusion | str, **settings: Any) -> "LoMDMForMaskedDiffusion":
        """A LoMDM that predicts what an MDLM does, with fresh heads: the same law of texts, up to a change of time.

        Args:
            model: a plain MDLM without time conditioning, or its name or folder (published ones included).
            settings: fields of `LoMDMConfig` that change no shape.

        Raises:
            ValueError: for an MDLM with `time_conditioning` or `block_size`, which LoMDM has not; for a LoMDM.
        """
        for name in SHAPES:
            if name in settings:
                raise ValueError(f"`{name}` ({settings[name]}) is what the MDLM has. Leave it out.")
        mdlm = model if isinstance(model, MDLMForMaskedDiffusion) else MDLMForMaskedDiffusion.from_pretrained(model)
        if isinstance(mdlm, cls):
            raise ValueError("`model` is a LoMDM already, with heads of its own. Pass an `MDLMForMaskedDiffusion`.")
        # How the MDLM was trained, and who it is, is not handed on; the configuration refuses what does not go with it.
        dropped = ("noise_schedule", "time_law", "num_timesteps", "low_discrepancy", "model_type", "architectures")
        inherited = {name: value for name, value in mdlm.config.to_dict().items() if name not in dropped}
        inherited["attn_implementation"] = mdlm.config._attn_implementation
        lomdm = cls(LoMDMConfig(**{**inherited, **settings})).to(dtype=mdlm.dtype, device=mdlm.device)
        report = lomdm.load_state_dict(mdlm.state_dict(), strict=False)
        assert not report.unexpected_keys and all("_scheduler." in name for name in report.missing_keys)
        lomdm.generation_config = copy.deepcopy(mdlm.generation_config)
        return lomdm.train(mdlm.training)

    def mask_levels(self, num_steps: int) -> torch.Tensor:
        return super().mask_levels(num_steps) ** self.config.c1

    def inputs_of_all_passes(self, filling: Filling) -> dict[str, Any]:
        return {**super().inputs_of_all_passes(filling), "output_exponents": filling.reads_exponents}

    def bound_estimators(
        self, strategy: Strategy, config: DiffusionGenerationConfig
    ) -> dict[str, Callable[[ScoredText], BoundEstimator]]:
        if strategy is LEARNED_FIRST_HITTING and config.strategy == strategy.name:
            return {name: partial(LearnedOrderBound, self, name) for name in SCORE_ESTIMATORS}
        return super().bound_estimators(strategy, config)

    @can_return_tuple
    @without_absent_arguments
    def forward(  # type: ignore[override]  # noise levels and caches are not for this model
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modulations: Modulations | None = None,
        query_positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_exponents: bool | None = None,
        bound_estimator: OrderEstimator | None = None,
        uniforms: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> LoMDMOutput:
        r"""
        Logits are those of MDLM; `exponents` say in which order masked positions are revealed.

        Args:
            input_ids, attention_mask, modulations, query_positions, output_hidden_states, num_items_in_batch: as in
                `MDLMForMaskedDiffusion.forward`. A 4-D `attention_mask` is refused.
            past_key_values, use_cache: as there, without exponents only.
            labels: long [batch, length], a text to predict, as there. Gives `loss`, an estimate of the bound (1) of
                `diffusion.order_bound` in nats per label; in training from two masked copies, whose difference gives
                the gradient for the law of the masks (eq. 8), in evaluation from one.
            output_exponents: without `labels`, compute `exponents`, which takes all positions through all layers. On by
                default.
            bound_estimator: with `labels`, in place of `config.bound_estimator`.
            uniforms: with `labels`, what masks are made of: [batch] and [copies, batch, length] in [0, 1). Drawn if not
                given.
            generator: with `labels`, source of randomness; torch's global one if not given.
        """
        if labels is not None:
            others = {
                "modulations": modulations,
                "query_positions": query_positions,
                "past_key_values": past_key_values,
            }
            flags = {
                "use_cache": use_cache,
                "output_exponents": output_exponents,
                "output_hidden_states": output_hidden_states,
            }
            for name, value in {**others, **{name: flag or None for name, flag in flags.items()}}.items():
                if value is not None:
                    raise ValueError(f"`{name}` does not go with `labels`, which read masked copies. Leave it out.")
            return self._objective(
                input_ids, attention_mask, labels, bound_estimator, uniforms, generator, num_items_in_batch
            )
        for name, value in (("bound_estimator", bound_estimator), ("uniforms", uniforms), ("generator", generator)):
            if value is not None:
                raise ValueError(f"`{name}` has no effect without `labels`. Leave it out, or pass `labels`.")
        if output_exponents is False:
            outputs = super().forward(
                input_ids,
                attention_mask,
                modulations=modulations,
                query_positions=query_positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
            return LoMDMOutput(**outputs)
        if past_key_values is not None or use_cache:
            raise ValueError(
                "`past_key_values` and `use_cache` leave positions out, and exponents need all of them. Pass "
                "`output_exponents=False`, or leave the cache out."
            )
        real = self._read(input_ids, attention_mask, query_positions)
        outputs = self.model(
            input_ids,
            attention_mask,
            modulations=modulations,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        exponents = self._exponents(self.reverse_scheduler, states, attention_mask, real)
        hidden_states = outputs.hidden_states
        if query_positions is not None:
            asked = query_positions.clamp(min=0)
            states = take_rows(states, asked)
            hidden_states = None if hidden_states is None else tuple(take_rows(layer, asked) for layer in hidden_states)
        return LoMDMOutput(logits=self._logits(states), exponents=exponents, hidden_states=hidden_states)

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, query_positions: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} does not say which positions are text, over "
                "which exponents are balanced. Pass [batch, length], 0 at padding."
            )
        return read_text(input_ids, attention_mask, query_positions, self.config)

    def _exponents(
        self, head: SchedulerHead, states: torch.Tensor, attention_mask: torch.Tensor | None, real: torch.Tensor | None
    ) -> torch.Tensor:
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
        return head(states, mask, self.model.rotary_emb(states, places_in_text(states[..., 0], real)), real)

    def forward_exponents(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Exponents [batch, length] of the law by which tokens of a clean text are masked (eq. 4).

        Args:
            input_ids: long [batch, length], the text without masks.
            attention_mask: [batch, length], 0 at padding.
        """
        real = self._read(input_ids, attention_mask)
        with torch.no_grad():
            states = self.model(input_ids, attention_mask, return_dict=True).last_hidden_state
        return self._exponents(self.forward_scheduler, states, attention_mask, real)

    def read_text_and_labels(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The text without masks, and its labels, -100 at padding too; long [batch, length] both.

        Args:
            input_ids, attention_mask, labels: as in `forward`.

        Raises:
            ValueError: for labels that are no text to predict, and for a text with masks where there is no label.
        """
        return read_text_and_labels(input_ids, attention_mask, labels, self.config.vocab_size, self.mask_token_id)

    def read_masked_copies(
        self, text: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None, masked: torch.Tensor
    ) -> MaskedCopies:
        """Read copies of a text with masks at `masked`, bool [copies, batch, length], in one pass."""
        copies = len(masked)
        ids = text.masked_fill(masked, self.mask_token_id).flatten(0, 1)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(copies, 1)
        real = self._read(ids, attention_mask)
        states = self.model(ids, attention_mask, return_dict=True).last_hidden_state
        exponents = self._exponents(self.reverse_scheduler, states, attention_mask, real)
        targets = labels.masked_fill(~masked, -100).flatten(0, 1)
        nll = chunked_nll(states, targets, self._logits, self.config.vocab_size)
        return MaskedCopies(masked, -nll.view_as(masked), exponents.view(masked.shape))

    def _objective(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        bound_estimator: OrderEstimator | None,
        uniforms: tuple[torch.Tensor, torch.Tensor] | None,
        generator: torch.Generator | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> LoMDMOutput:
        num_copies, estimator = 2 if self.training else 1, bound_estimator or self.config.bound_estimator
        check_estimator(estimator)
        if uniforms is not None:
            check_uniforms(uniforms, (num_copies, *input_ids.shape))
        text, labels = self.read_text_and_labels(input_ids, attention_mask, labels)
        to_predict = labels != -100
        exponents = self.forward_exponents(text, attention_mask)
        masks = draw_masks(
            exponents,
            to_predict,
            estimator,
            num_copies=num_copies,
            least_time=self.config.least_time,
            center=self.config.c1,
            uniforms=uniforms,
            generator=generator,
        )
        copies = self.read_masked_copies(text, labels, attention_mask, masks.masked)
        terms = bound_terms(copies.log_probs, exponents, copies.exponents, masks.masked)
        losses = masks.weight * (terms.token + terms.velocity)
        total = (rloo_loss(losses, masks.log_prob) if self.training else losses.mean(dim=0)).sum()
        count = num_items_in_batch if num_items_in_batch is not None else to_predict.sum().clamp(min=1)
        loss = total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
        with torch.no_grad():
            described = diagnostics(copies.log_probs, exponents, copies.exponents, masks.masked, losses, to_predict)
        return LoMDMOutput(loss=loss, diagnostics=described)


__all__ = ["LoMDMForMaskedDiffusion", "LoMDMOutput"]
