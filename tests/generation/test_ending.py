"""Where texts end: what is drawn in any order ends where it would have ended from left to right."""

import itertools
import time

import pytest
import torch
from families import FAMILIES
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.generation import MaxLengthCriteria, StoppingCriteria


PAD = 21
PROMPTS = torch.tensor([[9, 9, 1, 2, 3], [4, 5, 1, 2, 1], [3, 3, 8, 3, 9], [7, 7, 7, 7, 7]])
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
LENGTH, NEW = 5, 12
REMASKING = {"strategy": "ancestral", "max_denoising_steps": 5, "remasking": "cap", "remasking_strength": 0.4}
CASES = [
    ("armd", {"strategy": "autoregressive"}),
    ("armd", {"strategy": "strided", "num_streams": 3}),
    ("armd", {"strategy": "first_hitting"}),
    ("mdlm", {"strategy": "semi_autoregressive", "block_length": 5, "block_strategy": "first_hitting"}),
    ("mdlm", {"strategy": "confidence", "confidence_threshold": 0.3}),
    ("mdlm", REMASKING),
    ("mdlm_blocks", {"strategy": "semi_autoregressive", "block_strategy": "first_hitting"}),
    ("lomdm", {"strategy": "ancestral", "max_denoising_steps": 4}),
    ("causal_streams", {"strategy": "strided", "num_streams": 3}),
]


def settings(strategy, **arguments):
    shared = {"attention_mask": REAL, "max_new_tokens": NEW, "temperature": 4.0, "seed": 11, "pad_token_id": PAD}
    return {**shared, **strategy, **arguments}


def model_of(name):
    return FAMILIES[name].model(torch.float64, num_hidden_layers=2)


def without_padding_inside(text, real):
    """As transformers pads prompts: in front."""
    return torch.stack([torch.cat([row[~is_real], row[is_real]]) for row, is_real in zip(text, real, strict=True)])


def read_from_left_to_right(whole, stops):
    """`whole` with padding after the first position at which `stops` (text, row) is True; without empty columns."""
    real = torch.nn.functional.pad(REAL.bool(), (0, NEW), value=True)
    expected, width = whole.clone(), 0
    for row in range(len(whole)):
        kept = whole.shape[1]
        for column in range(LENGTH, whole.shape[1]):
            text = without_padding_inside(whole[:, : column + 1], real[:, : column + 1])
            if stops(text, row):
                kept = column + 1
                break
        expected[row, kept:] = PAD
        width = max(width, kept)
    return expected[:, :width]


def ends_in_two_of_a_kind(text):
    return text[-1] // 3 == text[-2] // 3


class TwoOfAKind(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.stack([ends_in_two_of_a_kind(text) for text in input_ids])


def nine_of_them(input_ids, scores):
    return torch.tensor([text[-1] % 2 == 0 and len(text) > 9 for text in input_ids])


def never(input_ids, scores):
    return False


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_text_ends_where_it_would_end_from_left_to_right(name, strategy):
    model = model_of(name)
    whole = model.generate(PROMPTS, **settings(strategy))
    criteria = [never, TwoOfAKind(), nine_of_them]

    def stops(text, row):
        return bool(TwoOfAKind()(text, None)[row] | nine_of_them(text, None)[row])

    expected = read_from_left_to_right(whole, stops)
    assert bool((expected[:, -1] == PAD).any())  # rows end at different places
    assert expected.shape[1] < whole.shape[1]
    output = model.generate(PROMPTS, **settings(strategy, stopping_criteria=criteria, return_dict_in_generate=True))
    assert torch.equal(output.sequences, expected)
    generated = torch.zeros_like(expected, dtype=torch.bool)
    for row, text in enumerate(expected.tolist()):
        end = len(text) - len(list(itertools.takewhile(lambda token: token == PAD, reversed(text))))
        generated[row, LENGTH:end] = True
    assert torch.equal(output.steps >= 0, generated)
    assert bool((output.confidence[~generated] == 1).all())


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_end_tokens_and_criteria_end_a_text_at_whichever_comes_first(name, strategy):
    model, ends = model_of(name), [1, 11, 12]
    whole = model.generate(PROMPTS, **settings(strategy))
    expected = read_from_left_to_right(whole, lambda text, row: text[row, -1] in ends or text.shape[1] >= 13)
    criteria = [MaxLengthCriteria(13)]
    output = model.generate(PROMPTS, **settings(strategy, stopping_criteria=criteria, eos_token_id=ends))
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("name", "strategy"), CASES)
@pytest.mark.parametrize("least", [{"min_new_tokens": 6}, {"min_length": 10}], ids=["min_new_tokens", "min_length"])
def test_no_end_token_is_drawn_too_early(name, strategy, least):
    arguments = settings(strategy, eos_token_id=list(range(14)), return_dict_in_generate=True)
    model = model_of(name)
    early = model.generate(PROMPTS, **arguments)
    assert bool(((early.steps >= 0).sum(dim=1) < 5).any())
    output = model.generate(PROMPTS, **arguments, **least)
    first = LENGTH + 6 if "min_new_tokens" in least else 10
    assert bool((output.sequences[:, LENGTH:first] >= 14).all())
    assert bool((output.steps[:, LENGTH:first] >= 0).all())


SPELT = [*"abcdefxyz", "ab", "bc", "cde", "fa", "xa", "bx", "yz", "zy", "ef", "abc", "dx", "cab", "-", "<mask>"]


def tokenizer_of_letters():
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(SPELT)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>")


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_stop_strings_end_a_text(name, strategy):
    """Token by token as the tokenizer spells them: a string may be part of a token, or of several."""
    model, strings = model_of(name), ["bc", "fab", "xyz"]
    whole = model.generate(PROMPTS, **settings(strategy, suppress_tokens=[22] if name == "armd" else None))

    def stops(text, row):
        # The string ends within the last token.
        before, last = "".join(SPELT[token] for token in text[row, :-1].tolist()), SPELT[text[row, -1]]
        return any(string in (before + last)[-len(string) - len(last) + 1 :] for string in strings)

    expected = read_from_left_to_right(whole, stops)
    output = model.generate(
        PROMPTS,
        **settings(strategy, suppress_tokens=[22] if name == "armd" else None, tokenizer=tokenizer_of_letters()),
        stop_strings=strings,
    )
    assert torch.equal(output, expected)
    assert bool((output == PAD).any())


class Watching(StoppingCriteria):
    """Remembers what it was asked, row by row."""

    def __init__(self, model):
        self.mask_token_id, self.asked = model.config.mask_token_id, []

    def __call__(self, input_ids, scores, **kwargs):
        assert not bool((input_ids == self.mask_token_id).any())
        self.asked.append((input_ids.clone(), scores))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_criteria_are_not_shown_what_can_still_change(name, strategy):
    model = model_of(name)
    watching = Watching(model)
    arguments = settings(strategy, return_dict_in_generate=True, eos_token_id=[1, 11])
    output = model.generate(PROMPTS, **arguments, output_scores=True, stopping_criteria=[watching])
    real = torch.nn.functional.pad(REAL.bool(), (0, NEW), value=True)[:, : output.sequences.shape[1]]
    for text, scores in watching.asked:
        width = text.shape[1]
        shown = without_padding_inside(output.sequences[:, :width], real[:, :width])
        for row in range(len(text)):
            # A beginning of the finished text, and padding where it is not known yet.
            is_shown = (text[row] == shown[row]).long().cumprod(0).bool()
            assert bool((text[row, ~is_shown] == PAD).all())
        assert len(scores) == width - LENGTH
    # About every beginning of every text they are asked.
    for row, column in (output.steps >= 0).nonzero().tolist():
        beginning = without_padding_inside(output.sequences[:, : column + 1], real[:, : column + 1])[row]
        asked = [text[row] for text, _ in watching.asked if text.shape[1] == column + 1]
        assert any(torch.equal(text, beginning) for text in asked)


@pytest.mark.parametrize(("name", "strategy"), CASES[:5])
def test_criteria_may_look_at_scores(name, strategy):
    """The scores of a text, up to the position in question, whatever order they were computed in."""
    model = model_of(name)
    arguments = settings(strategy, return_dict_in_generate=True, output_scores=True)
    whole = model.generate(PROMPTS, **arguments)

    def sureness(scores):
        return scores.softmax(dim=-1).amax(dim=-1)

    # Between two of them, so that rounding decides nothing.
    threshold = torch.stack([sureness(scores) for scores in whole.scores]).flatten().sort().values[-9:-7].mean()

    def is_sure(scores):
        return sureness(scores) >= threshold

    def sure(input_ids, scores):
        assert not any(bool(one.softmax(dim=-1).isnan().any()) for one in scores)
        return is_sure(scores[-1])

    expected = read_from_left_to_right(
        whole.sequences, lambda text, row: bool(is_sure(whole.scores[text.shape[1] - LENGTH - 1])[row])
    )
    assert bool((expected == PAD).any())
    output = model.generate(PROMPTS, **arguments, stopping_criteria=[sure])
    assert torch.equal(output.sequences, expected)
    for column, (scores, before) in enumerate(zip(output.scores, whole.scores, strict=False)):
        ended = output.steps[:, LENGTH + column] < 0
        torch.testing.assert_close(scores[~ended], before[~ended])
        assert bool((scores[ended].argmax(dim=-1) == PAD).all())


def test_after_an_end_nothing_of_a_text_is_reported():
    """Positions behind the end, drawn before it was known, are padding in every respect."""
    model = model_of("mdlm")
    arguments = settings({"strategy": "first_hitting"}, stopping_criteria=[TwoOfAKind()], return_dict_in_generate=True)
    output = model.generate(PROMPTS, output_scores=True, output_hidden_states=True, **arguments)
    padding = output.steps[:, LENGTH:] < 0
    assert bool(padding.any())
    sure = torch.full((23,), -torch.inf, dtype=torch.float64)
    sure[PAD] = 0
    assert torch.equal(torch.stack(output.scores, dim=1)[padding], sure.expand(int(padding.sum()), -1))
    for layers in output.hidden_states:
        assert len(layers) == 3
    states = torch.stack([layers[-1][:, 0] for layers in output.hidden_states], dim=1)
    assert torch.equal((states != 0).any(dim=-1), ~padding)
    passes = (output.steps >= 0).sum(dim=1) / output.tokens_per_forward
    torch.testing.assert_close(passes, passes.round())


def test_a_text_to_fill_in_may_end_behind_its_last_given_token_only():
    model = model_of("mdlm")
    mask = model.config.mask_token_id
    prompts = torch.tensor([[1, mask, mask, 2, mask, mask, mask], [1, mask, 3, 4, 5, mask, mask]])
    arguments = {"strategy": "first_hitting", "pad_token_id": PAD, "stopping_criteria": [lambda ids, scores: True]}
    output = model.generate(prompts, **arguments)
    assert output.shape == (2, 6)
    assert (output != PAD).sum(dim=1).tolist() == [5, 6]
    with pytest.raises(ValueError, match="`stopping_criteria` ends a text, and row 1 is given to its end"):
        model.generate(torch.tensor([[1, mask, mask], [1, mask, 3]]), **arguments)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_when_the_time_is_up_a_text_ends_before_its_first_gap(name, strategy):
    model, passes = model_of(name), []

    def slow(*_):
        passes.append(1)
        time.sleep(0.02)

    model.register_forward_pre_hook(slow)
    whole = model.generate(PROMPTS, **settings(strategy))
    passes.clear()
    output = model.generate(PROMPTS, **settings(strategy, max_time=0.01, return_dict_in_generate=True))
    assert len(passes) == output.nfe == 1
    first_gap = (output.steps[:, LENGTH:] < 0).long().cumsum(dim=1) > 0
    new = output.sequences[:, LENGTH:]
    assert torch.equal(new, whole[:, LENGTH : output.sequences.shape[1]].masked_fill(first_gap, PAD))
    if "remasking" in strategy:  # anything may be taken back
        assert new.shape[1] == 0


def test_padding_that_is_the_mask_is_refused():
    model = model_of("mdlm")
    mask = model.config.mask_token_id
    for arguments in ({"max_time": 5.0}, {"stopping_criteria": [never]}, {"eos_token_id": 3}):
        with pytest.raises(ValueError, match=f"`pad_token_id` .{mask}. is the mask token"):
            model.generate(PROMPTS, attention_mask=REAL, max_new_tokens=3, pad_token_id=mask, **arguments)
