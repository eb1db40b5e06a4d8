"""Nothing is ignored silently: what `generate` cannot act on is refused, with the remedy, before any pass."""

import pytest
import torch
from families import FAMILIES
from transformers import GenerationConfig

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
        ({"repetition_penalty": 1.5}, "`repetition_penalty`=1.5 has no effect"),
        ({"num_streams": 4}, '`num_streams`=4 has no effect with `strategy="autoregressive"`'),
        ({"strategy": "strided"}, "needs `num_streams`"),
        ({"strategy": "diagonal"}, "`strategy` must be one of"),
        ({"strategy": "strided", "num_streams": 0}, "`num_streams` must be a positive integer"),
        ({"strategy": "strided", "num_streams": 7, "max_new_tokens": 6}, "`num_streams` must be between 1 and.*6"),
        (
            {"strategy": "semi_autoregressive", "block_length": 2, "max_denoising_steps": 3},
            "`max_denoising_steps` must",
        ),
        ({"max_new_tokens": 62}, "text of 65 tokens, longer than the model's context.*64"),
        ({"max_length": 2}, "`max_length` .2. is less than"),
        ({"attention_mask": torch.ones(1, 2)}, "`attention_mask` must have the shape of `inputs`"),
        ({"input_ids": PROMPT}, "`inputs` and `input_ids` are the same thing"),
        ({"assistant_model": object()}, "`assistant_model` is not supported"),
        ({"stopping_criteria": [lambda *_: True]}, "`stopping_criteria` is not supported"),
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


@pytest.mark.parametrize("token", [23, -1, 99])
def test_a_token_outside_the_vocabulary_is_refused_before_the_network_runs(token):
    model = FAMILIES["armd"].model()
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
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


def test_without_a_length_transformers_default_holds():
    assert FAMILIES["armd"].model().generate(PROMPT).shape[1] == 20


def test_padding_is_found_by_its_token_where_no_mask_is_given():
    model = FAMILIES["armd"].model(pad_token_id=0)
    padded = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    inferred = model.generate(padded, max_new_tokens=5, do_sample=False)
    assert torch.equal(inferred, model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False))
