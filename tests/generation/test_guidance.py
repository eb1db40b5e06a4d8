"""Classifier-free guidance: both texts read with plain forward calls, and the formula."""

import pytest
import torch
from families import FAMILIES


PROMPTS = [[1, 2, 3], [4, 5, 1, 2, 1], [8]]
OTHERS = [[5, 5], [6], [7, 8, 9, 10]]
NEW, SCALE = 7, 2.5
LEFT_TO_RIGHT = {"strategy": "autoregressive", "do_sample": False}


def batch(rows, side):
    width = max(map(len, rows))
    ids, real = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[number, where], real[number, where] = torch.tensor(row, dtype=torch.long), 1
    return ids, real


def log_probs(model, beginning, drawn, rest):
    """Of the next token after `beginning` and `drawn`, [vocab_size]; `rest` follows, with what is not known."""
    if model.reads_block_index:  # from what is known alone, in its order
        known = [token for token in rest if token != model.config.mask_token_id]
        assert not known
        rest = []
    canvas = torch.tensor([[*beginning, *drawn, model.config.mask_token_id, *rest]])
    return model(canvas).logits[0, len(beginning) + len(drawn), :22].log_softmax(dim=-1)


def guided_text(model, prompt, other, num_new=NEW, suffix=()):
    drawn = []
    for step in range(num_new):
        rest = [model.config.mask_token_id] * (num_new - step - 1) + list(suffix)
        text, against = log_probs(model, prompt, drawn, rest), log_probs(model, other, drawn, rest)
        drawn.append(int((against + SCALE * (text - against)).argmax()))
    return drawn


@torch.no_grad()
@pytest.mark.parametrize("sides", ["left left", "right left", "left right", "right right"])
@pytest.mark.parametrize("name", ["armd", "armd_left_neighbour", "mdlm", "lomdm"])
def test_greedy_text_is_that_of_the_formula(name, sides):
    model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
    (ids, real), (others, others_real) = (
        batch(rows, side) for rows, side in zip((PROMPTS, OTHERS), sides.split(), strict=True)
    )
    output = model.generate(
        ids,
        attention_mask=real,
        max_new_tokens=NEW,
        guidance_scale=SCALE,
        negative_prompt_ids=others,
        negative_prompt_attention_mask=others_real,
        suppress_tokens=[22] if name.startswith("armd") else None,
        return_dict_in_generate=True,
        **LEFT_TO_RIGHT,
    )
    expected = [guided_text(model, prompt, other) for prompt, other in zip(PROMPTS, OTHERS, strict=True)]
    assert output.sequences[:, ids.shape[1] :].tolist() == expected
    assert output.nfe == 2 * NEW
    assert output.tokens_per_forward.tolist() == [0.5] * 3
    plain = model.generate(ids, attention_mask=real, max_new_tokens=NEW, **LEFT_TO_RIGHT)
    assert not torch.equal(output.sequences, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["armd", "mdlm"])
def test_without_a_negative_prompt_the_other_text_has_no_beginning(name):
    model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
    ids, real = batch(PROMPTS, "left")
    arguments = {"attention_mask": real, "guidance_scale": SCALE, "max_new_tokens": NEW, **LEFT_TO_RIGHT}
    arguments["suppress_tokens"] = [22] if name == "armd" else None
    output = model.generate(ids, **arguments)
    assert output[:, ids.shape[1] :].tolist() == [guided_text(model, prompt, []) for prompt in PROMPTS]


@torch.no_grad()
def test_gaps_before_given_tokens_are_filled_by_the_formula():
    """Both texts go on with the same tokens; uneven gaps, and rows that begin with one."""
    model = FAMILIES["mdlm"].model(torch.float64, num_hidden_layers=2)
    mask = model.config.mask_token_id
    ids = torch.tensor([[1, 2, mask, mask, 3, 4], [7, 1, 2, 3, mask, 5], [mask, mask, mask, 9, 9, 7]])
    real = torch.tensor([[1] * 6, [0, *[1] * 5], [*[1] * 5, 0]])
    others, others_real = batch(OTHERS, "left")
    output = model.generate(
        ids,
        attention_mask=real,
        guidance_scale=SCALE,
        negative_prompt_ids=others,
        negative_prompt_attention_mask=others_real,
        **LEFT_TO_RIGHT,
    )
    expected = ids.clone()
    expected[0, 2:4] = torch.tensor(guided_text(model, [1, 2], OTHERS[0], 2, [3, 4]))
    expected[1, 4] = torch.tensor(guided_text(model, [1, 2, 3], OTHERS[1], 1, [5]))
    expected[2, :3] = torch.tensor(guided_text(model, [], OTHERS[2], 3, [9, 9]))
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mdlm_blocks"])
@pytest.mark.parametrize("strategy", ["autoregressive", "first_hitting"])
def test_a_scale_of_1_is_no_guidance_and_one_of_0_reads_the_other_text_alone(name, strategy):
    model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
    ids, real = batch(PROMPTS, "left")
    others, others_real = batch(OTHERS, "left")
    arguments = {"max_new_tokens": NEW, "strategy": strategy, "seed": 4}
    plain = model.generate(ids, attention_mask=real, **arguments)
    assert torch.equal(plain, model.generate(ids, attention_mask=real, guidance_scale=1.0, **arguments))
    if name == "lomdm" and strategy == "first_hitting":  # its order is that of the text itself
        return
    negative = {"negative_prompt_ids": others, "negative_prompt_attention_mask": others_real}
    output = model.generate(ids, attention_mask=real, guidance_scale=0.0, **negative, **arguments)
    alone = model.generate(others, attention_mask=others_real, **arguments)
    assert torch.equal(output[:, -NEW:], alone[:, -NEW:])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mdlm_blocks"])
def test_against_the_prompt_itself_guidance_changes_nothing(name):
    """Where texts end early, are filled in parallel, and have padding."""
    for strategy in FAMILIES[name].strategies:
        model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
        ids, real = batch(PROMPTS, "left")
        arguments = {"attention_mask": real, "max_new_tokens": NEW, "seed": 4, **strategy}
        arguments |= {"eos_token_id": [1, 2, 3, 4], "pad_token_id": 5, "temperature": 2.0}
        plain = model.generate(ids, **arguments)
        negative = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": real}
        assert torch.equal(plain, model.generate(ids, guidance_scale=SCALE, **negative, **arguments))


def test_nothing_to_fill_needs_no_guidance():
    model = FAMILIES["mdlm"].model(num_hidden_layers=2)
    ids = torch.tensor([[1, 2, 3]])
    output = model.generate(ids, max_length=3, guidance_scale=SCALE, return_dict_in_generate=True)
    assert torch.equal(output.sequences, ids)
    assert output.nfe == 0
