"""Every field of `GenerationConfig`, with every strategy of every family: it has its effect, or raises.

Where it works is what the table of docs/generate.md says. A field that a new transformers adds is in no row of that
table, and turns this red.
"""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB_SIZE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, WatermarkingConfig
from transformers.generation import CompileConfig

from hf_diffusion import DiffusionGenerationConfig
from hf_diffusion.generation.configuration import DIFFUSION_FIELDS
from hf_diffusion.generation.fields import EFFECTIVE_FIELDS, REFUSED_FIELDS
from hf_diffusion.generation.output import DiffusionGenerateOutput
from hf_diffusion.generation.strategies import BLOCK_STRATEGIES, LEARNED_ORDERS, STRATEGIES, find_strategy


CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]
IDS = [f"{name}-{'-'.join(map(str, strategy.values()))}" for name, strategy in CASES]
COLUMNS = {"armd": 0, "armd_left_neighbour": 0, "mdlm": 1, "mdlm_blocks": 2, "lomdm": 3, "causal_streams": 0}
HOUSEKEEPING = {"transformers_version", "_from_model_config"}
"""Attributes of a config that say where it comes from, and nothing about generation."""

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
NEW = 8


def table():
    """{field: where it works, for the four columns of families} of docs/generate.md."""
    text = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|((?:[^|\n]*\|){4})[^|\n]*\|$", text, flags=re.MULTILINE)
    return {field: [cell.strip() for cell in cells.split("|")[:4]] for field, cells in rows}


TABLE = table()


@cache
def model_of(name):
    return FAMILIES[name].model(torch.float64)


@cache
def tokenizer():
    letters = Tokenizer(models.BPE({chr(97 + number): number for number in range(VOCAB_SIZE)}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


def draw(name, strategy, **arguments):
    settings = {"inputs": PROMPT, "seed": 3, "max_new_tokens": NEW, **strategy, **arguments}
    if "max_length" in arguments:
        del settings["max_new_tokens"]
    model = arguments.pop("model", None) or model_of(name)
    settings.pop("model", None)
    return model.generate(**settings)


# One probe per field that works somewhere: it gets (name, strategy) and fails unless the field has its effect.


def changes_text(**arguments):
    def probe(name, strategy):
        hot = {"temperature": 4.0}  # so that there is something to change
        assert not torch.equal(draw(name, strategy, **hot), draw(name, strategy, **{**hot, **arguments}))

    return probe


def do_sample(name, strategy):
    prompts = torch.arange(20)[:, None]
    assert not torch.equal(*(draw(name, strategy, inputs=prompts, do_sample=on) for on in (True, False)))


def width_is(width, **arguments):
    def probe(name, strategy):
        assert draw(name, strategy, **arguments).shape[1] == width

    return probe


def more_text(least, **arguments):
    """With it, texts that would end at once go on."""
    at_once = {
        "eos_token_id": 7,
        "prefix_allowed_tokens_fn": lambda row, tokens: [7, 8],
        "sequence_bias": {(7,): 1e6},
    }

    def probe(name, strategy):
        without, with_it = (draw(name, strategy, **at_once, **more) for more in ({}, arguments))
        assert without.shape[1] == 4
        assert with_it.shape[1] == least

    return probe


def max_time(name, strategy):
    if "confidence_threshold" in strategy:  # else all is drawn in one pass
        strategy = {**strategy, "confidence_threshold": 1.0}
    output = draw(name, strategy, max_time=1e-9, pad_token_id=0, return_dict_in_generate=True)
    assert output.nfe == 1
    assert int((output.steps >= 0).sum()) < 2 * NEW


def stop_strings(name, strategy):
    whole = draw(name, strategy, inputs=PROMPT[:1])[0]
    two = tokenizer().decode(whole[5:7])
    end = 3 + tokenizer().decode(whole[3:]).index(two) + 2
    stopped = draw(name, strategy, inputs=PROMPT[:1], stop_strings=[two], tokenizer=tokenizer())[0]
    assert torch.equal(stopped, whole[:end])


def eos_token_id(name, strategy):
    whole = draw(name, strategy, inputs=PROMPT[:1])[0]
    ended = draw(name, strategy, inputs=PROMPT[:1], eos_token_id=int(whole[6]))[0]
    assert torch.equal(ended, whole[: whole.tolist().index(int(whole[6]), 3) + 1])


def pad_token_id(name, strategy):
    only_the_first_row_ends = {
        "prefix_allowed_tokens_fn": lambda row, tokens: [7] if row == 0 else [8],
        "eos_token_id": 7,
    }
    assert draw(name, strategy, pad_token_id=9, **only_the_first_row_ends)[0, 3:].tolist() == [7, *[9] * (NEW - 1)]


def avoids_a_token(field, as_value):
    def probe(name, strategy):
        token = int(draw(name, strategy)[0, 5])
        assert not bool((draw(name, strategy, **{field: as_value(token)})[:, 3:] == token).any())

    return probe


def begin_suppress_tokens(name, strategy):
    tokens = draw(name, strategy)[:, 3].tolist()
    assert not set(draw(name, strategy, begin_suppress_tokens=tokens)[:, 3].tolist()) & set(tokens)


def repetition_penalty(name, strategy):
    # Dividing by almost nothing makes every known token almost sure where its logit is above 0.
    drawn = draw(name, strategy, repetition_penalty=1e-6, do_sample=False)
    assert not torch.equal(drawn, draw(name, strategy, do_sample=False))


def no_repeat_ngram_size(name, strategy):
    def repeats(sequences):
        return sum(len(row) - len(set(row)) for row in sequences.tolist())

    assert repeats(draw(name, strategy, no_repeat_ngram_size=1)) < repeats(draw(name, strategy))


def forced_eos_token_id(name, strategy):
    assert draw(name, strategy, forced_eos_token_id=7)[:, -1].tolist() == [7, 7]


def exponential_decay_length_penalty(name, strategy):
    ends = {"eos_token_id": 9, "pad_token_id": 20}
    plain, decayed = (
        draw(name, strategy, **ends, **more) for more in ({}, {"exponential_decay_length_penalty": (2, 1e9)})
    )
    assert int((decayed[:, 3:] == 9).sum()) > int((plain[:, 3:] == 9).sum())


def watermarking_config(name, strategy):
    bias = WatermarkingConfig(bias=30.0)
    assert not torch.equal(draw(name, strategy), draw(name, strategy, watermarking_config=bias))


def remove_invalid_values(name, strategy):
    model = copy.deepcopy(model_of(name))
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="`logits` hold NaN"):
        draw(name, strategy, model=model)
    assert draw(name, strategy, model=model, remove_invalid_values=True).shape == (2, 3 + NEW)


def renormalize_logits(name, strategy):
    asked = {"return_dict_in_generate": True, "output_scores": True, "temperature": 0.5}
    plain, normal = (draw(name, strategy, renormalize_logits=on, **asked).scores for on in (False, True))
    assert torch.stack(normal).logsumexp(-1).abs().max() < 1e-9 < torch.stack(plain).logsumexp(-1).abs().max()


def num_return_sequences(name, strategy):
    assert draw(name, strategy, num_return_sequences=3).shape[0] == 6


def use_cache(name, strategy):
    cached, not_cached = (
        draw(name, strategy, inputs=PROMPT[:1], use_cache=on, return_dict_in_generate=True).past_key_values
        for on in (True, False)
    )
    assert cached is not None and not_cached is None


def bos_token_id(name, strategy):
    assert draw(name, strategy, inputs=None, bos_token_id=5)[0, 0] == 5
    assert draw(name, strategy, inputs=None, bos_token_id=5).shape == (1, 1 + NEW)


def return_dict_in_generate(name, strategy):
    output = draw(name, strategy, return_dict_in_generate=True)
    assert isinstance(output, DiffusionGenerateOutput)
    assert torch.equal(output.sequences, draw(name, strategy))


def adds_to_the_output(field, attribute):
    def probe(name, strategy):
        plain, more = (draw(name, strategy, return_dict_in_generate=True, **on) for on in ({}, {field: True}))
        assert getattr(plain, attribute) is None
        assert len(getattr(more, attribute)) == NEW

    return probe


PROBES = {
    "max_length": width_is(9, max_length=9),
    "max_new_tokens": width_is(3 + 7, max_new_tokens=7),
    "min_length": more_text(8, min_length=7),
    "min_new_tokens": more_text(8, min_new_tokens=4),
    "max_time": max_time,
    "stop_strings": stop_strings,
    "do_sample": do_sample,
    "temperature": changes_text(temperature=20.0),
    "top_k": changes_text(top_k=1),
    "top_p": changes_text(top_p=0.05),
    "min_p": changes_text(min_p=0.95),
    "top_h": changes_text(top_h=0.05),
    "typical_p": changes_text(typical_p=0.05),
    "epsilon_cutoff": changes_text(epsilon_cutoff=0.9),
    "eta_cutoff": changes_text(eta_cutoff=0.9),
    "repetition_penalty": repetition_penalty,
    "no_repeat_ngram_size": no_repeat_ngram_size,
    "bad_words_ids": avoids_a_token("bad_words_ids", lambda token: [[token]]),
    "sequence_bias": avoids_a_token("sequence_bias", lambda token: {(token,): -1e9}),
    "suppress_tokens": avoids_a_token("suppress_tokens", lambda token: [token]),
    "begin_suppress_tokens": begin_suppress_tokens,
    "forced_eos_token_id": forced_eos_token_id,
    "exponential_decay_length_penalty": exponential_decay_length_penalty,
    "guidance_scale": changes_text(guidance_scale=4.0, negative_prompt_ids=PROMPT + 7),
    "watermarking_config": watermarking_config,
    "remove_invalid_values": remove_invalid_values,
    "renormalize_logits": renormalize_logits,
    "num_return_sequences": num_return_sequences,
    "use_cache": use_cache,
    "eos_token_id": eos_token_id,
    "pad_token_id": pad_token_id,
    "bos_token_id": bos_token_id,
    "return_dict_in_generate": return_dict_in_generate,
    "output_scores": adds_to_the_output("output_scores", "scores"),
    "output_logits": adds_to_the_output("output_logits", "logits"),
    "output_hidden_states": adds_to_the_output("output_hidden_states", "hidden_states"),
}

REFUSED_VALUES = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "is_assistant": True,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.7,
    "assistant_early_exit": 2,
    "assistant_lookbehind": 4,
    "assistant_ensemble_weight": 0.5,
    "target_lookbehind": 4,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 3,
    "speculation_type": "dflash",
    "use_mtp": True,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 1,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "max_cache_len": 32,
    "prefill_chunk_size": 2,
    "compile_config": CompileConfig(),
    "disable_compile": True,
    "penalty_alpha": 0.6,
    "low_memory": True,
    "dola_layers": "high",
    "continuous_batching_config": {"max_batch": 2},
    "forced_bos_token_id": 1,
    "token_healing": True,
    "output_attentions": True,
    "watermarking_config": WatermarkingConfig(),
    "guidance_scale": 2.0,
    "use_cache": True,
}

FIELDS = sorted(set(vars(GenerationConfig())) - HOUSEKEEPING)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_installed_transformers_is_in_the_table(field):
    assert field in TABLE, f"say in docs/generate.md where `{field}` works, and in generation/fields.py"
    works_somewhere = any(cell != "no" for cell in TABLE[field])
    assert works_somewhere == (field in PROBES) == (field in EFFECTIVE_FIELDS) == (field not in REFUSED_FIELDS)


def test_the_table_names_no_field_that_there_is_not():
    assert set(TABLE) <= EFFECTIVE_FIELDS | set(REFUSED_FIELDS)
    assert not set(TABLE) & set(DIFFUSION_FIELDS)


@pytest.mark.parametrize(("name", "strategy"), CASES, ids=IDS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_has_its_effect_or_raises(field, name, strategy):
    where = TABLE[field][COLUMNS[name]]
    if where == "yes" or where == f"`{strategy['strategy']}`":
        PROBES[field](name, strategy)
    else:
        model = model_of(name)
        hook = model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made before the error"))
        try:
            with pytest.raises(ValueError, match=f"`{field}`"):
                draw(name, strategy, **{field: REFUSED_VALUES[field]})
        finally:
            hook.remove()


STRATEGY_VALUES = {
    "heads": "staggered",
    "num_streams": 2,
    "block_length": 4,
    "block_strategy": "spread",
    "max_denoising_steps": 2,
    "confidence_threshold": 0.5,
    "entropy_bound": 0.5,
    "learned_order": True,
    "remasking": "cap",
    "remasking_strength": 0.5,
    "sliding_window": True,
    "approximate_cache": True,
    "reference_sampler": "ddpm_cache",
}
NEEDS = {"strided": {"num_streams": 2}, "ancestral": {"max_denoising_steps": 2}}


def is_read(field, **settings):
    learns_order = field == "learned_order"
    config = DiffusionGenerationConfig(**{field: STRATEGY_VALUES[field], **settings})
    try:
        find_strategy(config, learns_order)
    except ValueError as error:
        assert f"`{field}`" in str(error)
        return False
    return True


@pytest.mark.parametrize("field", sorted(set(DIFFUSION_FIELDS) - {"strategy"}))
def test_a_field_of_the_strategies_is_read_by_those_that_the_table_names(field):
    text = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    (cell,) = re.findall(rf"^\| `{field}` \|([^|\n]*)\|[^|\n]*\|$", text, flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", cell))
    for name in STRATEGIES | (LEARNED_ORDERS if field == "learned_order" else {}):
        assert is_read(field, strategy=name, **NEEDS.get(name, {})) == (name in named), name
    for name in BLOCK_STRATEGIES if field != "block_strategy" else [STRATEGY_VALUES[field]]:
        blocks = {"strategy": "semi_autoregressive", "block_strategy": name, "block_length": 4, **NEEDS.get(name, {})}
        assert is_read(field, **blocks) == (name in named or "semi_autoregressive" in named), name
