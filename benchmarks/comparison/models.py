"""What is compared: the recipe of each model, alike but for what makes it what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM
from hf_diffusion.generation.scoring import Likelihood
from hf_diffusion.training.families import ARMDRecipe, LlamaRecipe, LoMDMRecipe, MDLMRecipe
from hf_diffusion.training.recipe import TrainingRecipe

from .presets import Preset


NAMES = {
    "autoregressive": "autoregressive",
    "mdlm": "MDLM",
    "armd": "ARMD, with left neighbour",
    "armd_strided": "ARMD, after the strided phase",
    "lomdm": "LoMDM",
    "armd_paper": "ARMD, as in the paper",
}
"""In the order in which they are trained for a seed."""


@dataclass(kw_only=True)
class AutoregressiveRecipe(LlamaRecipe):
    """MDLM's own autoregressive baseline: the same network, causal and without a noise level."""

    family = "autoregressive"

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        return MDLMARForCausalLM(
            MDLMARConfig(
                **self.shared_config(tokenizer),
                vocab_size=len(tokenizer),
                residual_dropout=self.dropout,
                mask_token_id=tokenizer.mask_token_id,
            )
        )


class _ConditioningSize:
    """The noise level's embedding, from which MDLM's layers make a constant, has no large share in a small model."""

    conditioning_size: int

    def shared_config(self, tokenizer: Any) -> dict[str, Any]:
        return {**super().shared_config(tokenizer), "conditioning_size": self.conditioning_size}  # type: ignore[misc]


@dataclass(kw_only=True)
class SmallMDLMRecipe(_ConditioningSize, MDLMRecipe):
    conditioning_size: int = field(default=128, metadata={"help": "width of the embedding of the noise level"})


@dataclass(kw_only=True)
class SmallLoMDMRecipe(_ConditioningSize, LoMDMRecipe):
    conditioning_size: int = field(default=128, metadata={"help": "width of the embedding of the noise level"})


@dataclass(kw_only=True)
class StridedPhaseRecipe(ARMDRecipe):
    """ARMD's second phase, which starts from a model that has been trained."""

    start_from: Path = field(metadata={"help": "folder of the model"})

    def build_model(self, tokenizer: Any) -> PreTrainedModel:
        return AutoModel.from_pretrained(self.start_from)


class AutoregressiveScorer(nn.Module):
    """An ordinary causal model with `score`, as the others have it: a start token in front, every token predicted.

    Args:
        model: that was trained with the same start token.
    """

    def __init__(self, model: MDLMARForCausalLM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, labels: torch.Tensor, seed: Sequence[int]) -> Likelihood:
        """Args: input_ids, labels: long [batch, length]. `seed` is for what is drawn, which nothing is."""
        input_ids, labels = input_ids.to(self.model.device), labels.to(self.model.device)
        texts = torch.cat([torch.full_like(input_ids[:, :1], self.config.eos_token_id), input_ids], dim=1)
        logits = self.model(texts, use_cache=False).logits[:, :-1]
        of_tokens = logits.double().log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
        of_tokens = of_tokens.masked_fill(labels == -100, 0.0)
        num_tokens = (labels != -100).sum(dim=1)
        return Likelihood(of_tokens.sum(dim=1), of_tokens, None, num_tokens, None, True, "exact", "left to right", 1)


def make_recipe(name: str, seed: int, preset: Preset, **places: Any) -> TrainingRecipe:
    """
    Args:
        name: one of `NAMES`.
        places: `text`, `validation_text`, `tokenizer`, `output`; for the strided phase `start_from`.
    """
    shared = {**preset.shared, **places, "seed": seed}
    del shared["vocab_size"]
    if name == "autoregressive":
        return AutoregressiveRecipe(**shared, **preset.shapes[name])
    if name == "mdlm":
        return SmallMDLMRecipe(**shared, **preset.shapes[name], validation_draws=preset.num_draws)
    if name == "lomdm":
        return SmallLoMDMRecipe(**shared, **preset.shapes[name], validation_draws=preset.num_draws)
    if name == "armd_strided":
        shared |= {"steps": preset.strided_steps, "warmup_steps": preset.strided_steps // 10}
        shared |= {"evaluate_every": min(preset.strided_steps, shared["evaluate_every"])}
        no_ramp = {"ramp_start": 0.0, "ramp_end": 0.0, "strided_start": 0.0}
        return StridedPhaseRecipe(**shared, **preset.shapes["armd"], **no_ramp)
    return ARMDRecipe(
        **shared,
        **preset.shapes["armd"],
        left_neighbour=name == "armd",
        max_shuffled=preset.max_shuffled,
        strided_start=1.0,
        validation_streams=(1,),
    )


def load(name: str, folder: Path, device: str) -> Any:
    """A trained model in evaluation mode."""
    if name == "autoregressive":
        return AutoregressiveScorer(AutoModelForCausalLM.from_pretrained(folder).eval()).to(device)
    return AutoModel.from_pretrained(folder).eval().to(device)
