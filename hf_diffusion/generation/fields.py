"""Every field of transformers' `GenerationConfig`: `generate` acts on it, or refuses it with the reason.

A field that is in neither of the two tables is refused too, and the walk over all fields in the tests fails: a new
release of transformers adds nothing that would be passed over in silence.
"""

from typing import Any

from .configuration import DIFFUSION_FIELDS, DiffusionGenerationConfig


WARPING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""They narrow the distribution that tokens are drawn from, and go with `do_sample` alone."""

EFFECTIVE_FIELDS = {
    *DIFFUSION_FIELDS,
    *WARPING_FIELDS,
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
    *("do_sample", "num_return_sequences", "use_cache", "guidance_scale"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("remove_invalid_values", "renormalize_logits", "watermarking_config"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"),
    *("eos_token_id", "pad_token_id", "bos_token_id"),
}
"""Fields that `generate` acts on, unless model or strategy rule it out (see `compatibility`)."""

_BEAMS = "beams compare beginnings of one length, and text that is drawn in any order has none"
_ASSISTANT = "the assistant of transformers drafts from left to right; parallel drawing is what the strategies here do"
_ENCODER = "these models have no encoder"
_CACHE = "the cache is the model's own, and `use_cache` turns it off"
_COMPILE = "nothing is compiled here; compile the model"
_ELSEWHERE = "it belongs to a decoding method that goes from left to right"

REFUSED_FIELDS: dict[str, str] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty"), _BEAMS),
    **dict.fromkeys(("constraints", "force_words_ids"), _BEAMS),
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"), _ASSISTANT),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"), _ASSISTANT),
    **dict.fromkeys(("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"), _ASSISTANT),
    **dict.fromkeys(("max_matching_ngram_size", "speculation_type", "use_mtp"), _ASSISTANT),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id"), _ENCODER),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"), _CACHE),
    **dict.fromkeys(("compile_config", "disable_compile"), _COMPILE),
    **dict.fromkeys(("penalty_alpha", "low_memory", "dola_layers"), _ELSEWHERE),
    "continuous_batching_config": "batches are filled as they are given",
    "forced_bos_token_id": "what the text begins with is written into the prompt",
    "token_healing": "given tokens never change; leave the last token of the prompt out to have it drawn",
    "output_attentions": "every pass reads another text, and fused attention computes no weights that could be shown",
}
"""Fields that `generate` refuses, with the reason."""

NEEDED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("min_length", "min_new_tokens", "exponential_decay_length_penalty"),
        ("eos_token_id", "it is about the token that ends a text"),
    ),
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_hidden_states"),
        ("return_dict_in_generate", "a tensor of tokens has no place for it"),
    ),
    "renormalize_logits": ("output_scores", "it changes nothing but the scores that are returned"),
}
"""What a field has no effect without, and why."""


def check_fields(model_name: str, config: DiffusionGenerationConfig) -> None:
    """Raise ValueError for the first field that is set and that `generate` does not act on.

    A field is set if it is neither None nor False nor at the default of `GenerationConfig`.
    """
    defaults = DiffusionGenerationConfig._get_default_generation_params()
    for name, value in config.to_dict().items():
        if name.startswith("_") or name == "transformers_version":
            continue
        if value is None or value is False or value == defaults.get(name):
            continue
        if name not in EFFECTIVE_FIELDS:
            reason = REFUSED_FIELDS.get(name, "this version of hf_diffusion does not know it")
            raise ValueError(f"`{name}`={value!r} has no effect in {model_name}.generate: {reason}. Leave it out.")
        needed, reason = NEEDED.get(name, (None, ""))
        if needed is not None and not _is_set(getattr(config, needed)):
            raise ValueError(f"`{name}`={value!r} has no effect without `{needed}`: {reason}. Set it too.")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []
