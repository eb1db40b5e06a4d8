"""Nothing is ignored silently: what `generate` cannot act on is refused, with the remedy, before any pass."""

import pytest
import torch
from families import FAMILIES
from transformers import GenerationConfig, WatermarkingConfig

from hf_diffusion import DiffusionGenerationConfig


@pytest.fixture
def model():
    model = FAMILIES["armd"].model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made before the error"))
    return model


PROMPT = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_stream": 4}, "`num_stream` is not an argument.*Did you mean `num_streams`"),
        ({"num_beams": 4}, "`num_beams`=4 has no effect"),
        ({"repetition_penalty": -1.5}, "`repetition_penalty` must be a positive number, got -1.5"),
        ({"seeds": 4}, "`seeds` is not an argument.*Did you mean `seed`"),
        ({"seed": 4, "generator": torch.Generator()}, "`generator` and `seed` are both sources"),
        ({"seed": -1}, "`seed` must be an integer from 0"),
        ({"seed": [1, 2]}, "`seed` must be an integer.*each of the 1 texts"),
        ({"min_new_tokens": 4}, "`min_new_tokens`=4 has no effect without `eos_token_id`"),
        ({"min_new_tokens": 30, "eos_token_id": 3}, "`min_new_tokens` .30. is more than there are positions to fill"),
        ({"min_length": 30, "eos_token_id": 3}, "`min_length` .30. is more than the length"),
        ({"output_scores": True}, "`output_scores`=True has no effect without `return_dict_in_generate`"),
        ({"renormalize_logits": True}, "`renormalize_logits`=True has no effect without `output_scores`"),
        ({"stop_strings": "end"}, "`stop_strings`='end' needs the tokenizer"),
        ({"bad_words_ids": [[3, 99]]}, "`bad_words_ids` holds .3, 99.: tokens must be less than 23"),
        ({"bad_words_ids": [[3], []]}, "`bad_words_ids` holds an empty sequence"),
        ({"guidance_scale": "2"}, "`guidance_scale` must be a number, got '2'"),
        ({"eos_token_id": 3, "exponential_decay_length_penalty": 3}, "`exponential_decay_length_penalty` must be two"),
        ({"logits_processor": max}, "`logits_processor` must be a list, got builtin_function_or_method"),
        ({"stopping_criteria": max}, "`stopping_criteria` must be a list, got builtin_function_or_method"),
        ({"suppress_tokens": [99]}, "`suppress_tokens` must lie in the vocabulary"),
        ({"negative_prompt_ids": PROMPT}, "`negative_prompt_ids` has no effect without guidance"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": PROMPT.repeat(2, 1)}, "`negative_prompt_ids` must be.*batch=1"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": PROMPT + 20}, "`negative_prompt_ids` holds the mask token"),
        ({"num_streams": 4}, '`num_streams`=4 has no effect with `strategy="autoregressive"`'),
        ({"strategy": "strided"}, "needs `num_streams`"),
        ({"strategy": "diagonal"}, "`strategy` must be one of"),
        ({"strategy": "strided", "num_streams": 0}, "`num_streams` must be a positive integer"),
        ({"strategy": "strided", "num_streams": 7, "max_new_tokens": 6}, "`num_streams` must be between 1 and.*6"),
        (
            {"strategy": "semi_autoregressive", "block_length": 2, "max_denoising_steps": 3},
            "`max_denoising_steps` must",
        ),
        ({"max_new_tokens": 62}, "text of 65 tokens, more than the model's context.*64"),
        ({"max_length": 2}, "`max_length` .2. is less than"),
        ({"attention_mask": torch.ones(1, 2)}, "`attention_mask` must have the shape of `input_ids`"),
        ({"input_ids": PROMPT}, "`inputs` and `input_ids` are the same thing"),
        ({"max_length": 8, "max_new_tokens": 4}, "`max_length` and `max_new_tokens` say the same thing"),
        ({"do_sample": False, "top_k": 5}, "`top_k`=5 has no effect with `do_sample=False`"),
        ({"max_new_tokens": 1.5}, "`max_new_tokens` must be a positive integer, got 1.5"),
        ({"top_p": 2.0}, "`top_p` must lie between 0 and 1, got 2.0"),
        ({"eos_token_id": 3.0}, "`eos_token_id` must be an integer"),
        ({"eos_token_id": 3, "pad_token_id": 23}, "`pad_token_id` .23. is the mask token"),
        ({"attention_mask": [[1, 1, 1]]}, "`attention_mask` must be a tensor .batch, length., got list"),
        ({"generator": 3}, "`generator` must be a `torch.Generator`, got int"),
        (
            {"generation_config": DiffusionGenerationConfig(do_sample=False, top_k=5)},
            "`top_k`=5 has no effect with `do",
        ),
        (
            {"strategy": "semi_autoregressive", "block_length": 2, "sliding_window": "no"},
            "`sliding_window` must be True",
        ),
        ({"bos_token_id": 23}, "`bos_token_id` must lie in the vocabulary"),
        ({"eos_token_id": 23}, "`eos_token_id` must lie in the vocabulary"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be at least 1"),
        ({"attention_mask": torch.zeros(1, 3)}, "`attention_mask` has a row of zeros only"),
        ({"assistant_model": object()}, "`assistant_model` is not supported"),
        ({"custom_generate": "org/name"}, "`custom_generate` is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **arguments)


def test_wrong_prompts_are_refused(model):
    with pytest.raises(ValueError, match="`inputs` must be an integer tensor"):
        model.generate([1, 2, 3])
    with pytest.raises(ValueError, match="`inputs` must be an integer tensor"):
        model.generate(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="`inputs` must be an integer tensor"):
        model.generate(torch.rand(1, 3))
    with pytest.raises(ValueError, match="`inputs` is an empty batch"):
        model.generate(torch.empty(0, 3, dtype=torch.long))


@pytest.mark.parametrize("token", [23, -1, 99])
def test_a_token_outside_the_vocabulary_is_refused_before_any_pass(token):
    model = FAMILIES["armd"].model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    prompt = torch.tensor([[1, token, 3]])
    if token == model.config.mask_token_id:
        prompt[0, 1] = 24
    with pytest.raises(ValueError, match="`input_ids` holds the token id .* outside the vocabulary .*tokenizer"):
        model.generate(prompt, max_new_tokens=3)


def test_a_row_of_padding_only_is_refused():
    model = FAMILIES["armd"].model()
    with pytest.raises(ValueError, match="`attention_mask` has a row of zeros only.*Leave that row out"):
        model(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_a_config_with_a_typo_is_refused():
    with pytest.raises(ValueError, match="`num_streems`.*Did you mean `num_streams`"):
        DiffusionGenerationConfig(num_streems=4)


def test_the_settings_of_a_plain_generation_config_are_used():
    model = FAMILIES["armd"].model()
    output = model.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    assert torch.equal(output, model.generate(PROMPT, max_new_tokens=4, do_sample=False))


def test_the_call_wins_over_the_config_and_the_config_over_the_model():
    model = FAMILIES["armd"].model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=9, strategy="strided", num_streams=2)
    assert model.generate(PROMPT).shape[1] == 12
    assert model.generate(PROMPT, generation_config=DiffusionGenerationConfig(max_new_tokens=5)).shape[1] == 8
    output = model.generate(PROMPT, max_length=7, return_dict_in_generate=True)
    assert output.sequences.shape[1] == 7
    assert output.nfe == 3


def test_the_strategy_of_the_call_replaces_that_of_the_model_with_its_settings():
    model = FAMILIES["armd"].model()
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=9, strategy="strided", num_streams=2)
    assert model.generate(PROMPT, strategy="autoregressive", return_dict_in_generate=True).nfe == 9
    passed = DiffusionGenerationConfig(strategy="autoregressive", max_length=7)
    assert model.generate(PROMPT, generation_config=passed).shape[1] == 7


def test_masks_that_are_padding_are_not_filled():
    model = FAMILIES["armd"].model()
    prompt = torch.tensor([[23, 23, 1, 2]])
    mask = torch.tensor([[0, 0, 1, 1]])
    output = model.generate(prompt, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
    assert output.steps.tolist() == [[-1, -1, -1, -1, 0, 1, 2]]
    assert float(output.tokens_per_forward) == 1


def test_logits_that_are_no_distribution_are_refused():
    model = FAMILIES["armd"].model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="`logits` hold NaN"):
        model.generate(PROMPT, max_new_tokens=1)


def test_nothing_is_drawn_where_everything_is_excluded():
    model = FAMILIES["armd"].model()
    for do_sample in (True, False):
        with pytest.raises(ValueError, match="exclude every token"):
            model.generate(PROMPT, max_new_tokens=2, do_sample=do_sample, suppress_tokens=list(range(23)))


def test_without_a_length_transformers_default_holds():
    assert FAMILIES["armd"].model().generate(PROMPT).shape[1] == 20


def test_padding_is_found_by_its_token_where_no_mask_is_given():
    model = FAMILIES["armd"].model(pad_token_id=0)
    padded = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inferred = model.generate(padded, max_new_tokens=5, do_sample=False)
    assert torch.equal(inferred, model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False))


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="`generate_batch`.*Pass a padded batch to `generate`"):
        FAMILIES["mdlm"].model().generate_batch(inputs=[[1, 2, 3]])


def test_none_stands_for_the_default():
    model = FAMILIES["armd"].model()
    nothing = dict.fromkeys(("do_sample", "temperature", "top_k", "num_return_sequences", "use_cache"))
    output = model.generate(PROMPT, max_new_tokens=9, seed=1, temperature=5.0)
    assert torch.equal(output, model.generate(PROMPT, max_new_tokens=9, seed=1, **{**nothing, "temperature": 5.0}))
    model.generation_config.temperature = 5.0
    assert torch.equal(output, model.generate(PROMPT, max_new_tokens=9, seed=1))
    cold = model.generate(PROMPT, max_new_tokens=9, seed=1, **nothing)
    assert torch.equal(cold, model.generate(PROMPT, max_new_tokens=9, seed=1, temperature=1.0))
    assert not torch.equal(cold, output)
    assert model.generate(PROMPT, max_new_tokens=9, num_return_sequences=2, do_sample=None).shape == (2, 12)


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_bias": {(1, 2): 9.0, (4,): -9.0}},
        {"bad_words_ids": [[1], [2, 3]], "no_repeat_ngram_size": 2},
        {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": [4, 5], "pad_token_id": 6},
        {"watermarking_config": WatermarkingConfig(bias=30.0)},
        {"guidance_scale": 3.0, "repetition_penalty": 1.7, "begin_suppress_tokens": [1]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_with_such_settings_comes_back_and_does_the_same(settings, tmp_path):
    model = FAMILIES["armd"].model(torch.float64)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(PROMPT, **arguments, **settings)
    assert not torch.equal(expected, model.generate(PROMPT, **arguments))
    config = DiffusionGenerationConfig(**arguments, **settings)
    assert torch.equal(model.generate(PROMPT, generation_config=config), expected)
    assert torch.equal(model.generate(PROMPT, generation_config=GenerationConfig(**arguments, **settings)), expected)
    model.generation_config = config
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(PROMPT), expected)
