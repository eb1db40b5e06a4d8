"""Settings that look at the text: transformers' own processors from left to right, what they promise in any order."""

import itertools

import numpy
import pytest
import torch
from families import FAMILIES
from transformers import WatermarkingConfig
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    WatermarkLogitsProcessor,
)


PROMPTS = torch.tensor([[9, 9, 1, 2, 3], [4, 5, 1, 2, 1], [9, 3, 3, 8, 3]])
PADDING = torch.tensor([2, 0, 1])
REAL = (torch.arange(5) >= PADDING[:, None]).long()
LENGTH, NEW = 5, 10
ENDS, PAD = [6, 7], 9
LIKELY_ENDS = [1, 11, 14, 20]


def step_by_step(model, processors, end_token_ids, choose):
    """Plain forward calls, and transformers' processors on the text so far."""
    text, mask_token_id = PROMPTS, model.config.mask_token_id
    unread = 0 if model.reads_block_index else mask_token_id  # a causal model does not see what comes later
    finished = torch.zeros(len(text), dtype=torch.bool)
    for step in range(NEW):
        canvas = torch.nn.functional.pad(text, (0, NEW - step), value=unread)
        logits = model(canvas, attention_mask=torch.nn.functional.pad(REAL, (0, NEW), value=1)).logits
        scores = logits[:, LENGTH + step].clone()
        scores[:, mask_token_id:] = -torch.inf
        token = choose(processors(text, scores), step).masked_fill(finished, PAD)
        text = torch.cat([text, token[:, None]], dim=1)
        finished |= torch.isin(token, torch.tensor(end_token_ids, dtype=torch.long)) & ~finished
        if bool(finished.all()):
            break
    return text


def greedy(scores, step):
    return scores.argmax(dim=-1)


def drawn_with(seeds):
    """Inverse of the cumulative distribution at the k-th number of a row's generator."""
    numbers = [torch.rand(NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]

    def choose(scores, step):
        cumulative = numpy.cumsum(scores.softmax(dim=-1).numpy(), axis=1)
        draws = [int((row <= numbers[number][step].item() * row[-1]).sum()) for number, row in enumerate(cumulative)]
        return torch.tensor(draws)

    return choose


def only_neighbours(row, text):
    """Tokens near the last one, other ones in other rows."""
    last = int(text[-1])
    return [(last + 1 + row) % 22, (last + 5) % 22, (last + 9) % 22]


WATERMARK = WatermarkingConfig(bias=20.0, context_width=1)
ENDING = {"eos_token_id": ENDS, "pad_token_id": PAD}
ENDING_SOON = {"eos_token_id": LIKELY_ENDS, "pad_token_id": PAD}
BIASES = [[[1], -3.0], [[3, 4], 9.0], [[2, 3, 11], 12.0], [[18], 5.0], [[18, 18], -20.0]]
CASES = {
    "repetition": ({"repetition_penalty": 3.0}, [RepetitionPenaltyLogitsProcessor(3.0, PADDING)]),
    "n-gram": ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
    # transformers takes padding for text here.
    "unigram": (
        {"no_repeat_ngram_size": 1, "suppress_tokens": [PAD]},
        [NoRepeatNGramLogitsProcessor(1), SuppressTokensLogitsProcessor([PAD])],
    ),
    "bad words": (
        {"bad_words_ids": [[1], [18, 18], [2, 2], [7]], **ENDING},
        [NoBadWordsLogitsProcessor([[1], [18, 18], [2, 2], [7]], ENDS)],
    ),
    "bias": ({"sequence_bias": BIASES}, [SequenceBiasLogitsProcessor(BIASES)]),
    "min length": ({"min_length": 10, **ENDING_SOON}, [MinLengthLogitsProcessor(10, LIKELY_ENDS)]),
    "min new tokens": (
        {"min_new_tokens": 4, **ENDING_SOON},
        [MinNewTokensLengthLogitsProcessor(LENGTH, 4, LIKELY_ENDS)],
    ),
    "decay": (
        {"exponential_decay_length_penalty": (2, 1.6), **ENDING},
        [ExponentialDecayLengthPenalty((2, 1.6), ENDS, LENGTH)],
    ),
    "forced end": (
        {"forced_eos_token_id": [14, 15], **ENDING},
        [ForcedEOSTokenLogitsProcessor(LENGTH + NEW, [14, 15])],
    ),
    "begin": ({"begin_suppress_tokens": [1, 18, 2]}, [SuppressTokensAtBeginLogitsProcessor([1, 18, 2], LENGTH)]),
    "prefix": (
        {"prefix_allowed_tokens_fn": only_neighbours},
        [PrefixConstrainedLogitsProcessor(only_neighbours, num_beams=1)],
    ),
    "watermark": (
        {"watermarking_config": WATERMARK},
        [WatermarkLogitsProcessor(23, "cpu", bias=20.0, context_width=1)],
    ),
    "many": (
        {
            **{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[18]], "min_new_tokens": 4},
            **{"suppress_tokens": [2], "begin_suppress_tokens": [1], "exponential_decay_length_penalty": (3, 1.4)},
            **{"sequence_bias": BIASES, "logits_processor": [TopKLogitsWarper(9)], **ENDING},
        },
        [
            SequenceBiasLogitsProcessor(BIASES),
            RepetitionPenaltyLogitsProcessor(1.5, PADDING),
            NoRepeatNGramLogitsProcessor(2),
            NoBadWordsLogitsProcessor([[18]], ENDS),
            MinNewTokensLengthLogitsProcessor(LENGTH, 4, ENDS),
            ExponentialDecayLengthPenalty((3, 1.4), ENDS, LENGTH),
            SuppressTokensLogitsProcessor([2]),
            SuppressTokensAtBeginLogitsProcessor([1], LENGTH),
            TopKLogitsWarper(9),
        ],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "do_sample"),
    [*((case, False) for case in CASES), ("bias", True), ("prefix", True), ("many", True)],
    ids=lambda value: value if isinstance(value, str) else "sampled" if value else "greedy",
)
@pytest.mark.parametrize("name", ["armd", "mdlm"])
def test_from_left_to_right_each_does_what_the_processor_of_transformers_does(name, case, do_sample):
    model, (arguments, processors) = FAMILIES[name].model(torch.float64), CASES[case]
    # Small differences decide nothing at temperature 3, where a sampled text is also more than the likeliest one.
    warper = [TemperatureLogitsWarper(3.0)] if do_sample else []
    settings = {"strategy": "autoregressive", "max_new_tokens": NEW, "attention_mask": REAL, "do_sample": do_sample}
    settings |= {"temperature": 3.0, "seed": 5} if do_sample else {}
    output = model.generate(PROMPTS, **settings, **arguments)
    expected = step_by_step(
        model,
        LogitsProcessorList([*processors, *warper]),
        arguments.get("eos_token_id", []),
        drawn_with([5, 6, 7]) if do_sample else greedy,
    )
    assert torch.equal(output, expected)
    plain = model.generate(PROMPTS, **settings, **{name: arguments[name] for name in ENDING if name in arguments})
    assert not torch.equal(output, plain)


ANY_ORDER = [("armd", "first_hitting"), ("mdlm", "first_hitting"), ("mdlm", "confidence"), ("lomdm", "first_hitting")]
MASK = -1  # stands for the sign of the model
TEXTS = torch.tensor(
    [
        [9, 9, 0, 1, MASK, MASK, 2, MASK, 3, 3, MASK],
        [0, MASK, 0, MASK, 2, MASK, MASK, 5, MASK, 9, 9],
        [4, MASK, 9, 9, MASK, 4, 1, MASK, MASK, MASK, 2],
    ]
)
TEXTS_REAL = TEXTS != 9  # padding on the left, on the right, and inside


def drawn_in_any_order(name, strategy, shift=0.0, **arguments):
    """Two finished texts for each of `TEXTS` without padding, each with the steps in which its tokens were drawn."""
    model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
    if shift:
        model.lm_head.bias.data += shift
    prompts = TEXTS.masked_fill(TEXTS == MASK, model.config.mask_token_id)
    output = model.generate(
        prompts,
        attention_mask=TEXTS_REAL.long(),
        strategy=strategy,
        max_new_tokens=5,
        num_return_sequences=2,
        temperature=5.0,
        seed=3,
        return_dict_in_generate=True,
        **arguments,
    )
    real = torch.nn.functional.pad(TEXTS_REAL, (0, 5), value=True).repeat_interleave(2, dim=0)
    for row, is_real in enumerate(real):
        yield output.sequences[row, is_real].tolist(), output.steps[row, is_real].tolist()


def runs(text, size):
    return [tuple(text[start : start + size]) for start in range(len(text) - size + 1)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("name", "strategy"), ANY_ORDER)
def test_in_any_order_no_run_of_tokens_is_completed_twice(name, strategy, size):
    few = {} if size == 1 else {"suppress_tokens": list(range(6 if size == 2 else 3, 22))}
    for text, steps in drawn_in_any_order(name, strategy, no_repeat_ngram_size=size, **few):
        generated = [max(run) >= 0 for run in runs(steps, size)]
        for (first, is_new), (second, is_new_too) in itertools.combinations(
            zip(runs(text, size), generated, strict=True), 2
        ):
            assert first != second or not (is_new or is_new_too)


@pytest.mark.parametrize(("name", "strategy"), ANY_ORDER)
def test_in_any_order_no_bad_word_is_completed(name, strategy):
    bad = [[1], [0, 0], [2, 3], [3, 2], [0, 2, 0], [4, 4], [5, 0, 3]]
    suppressed = {"suppress_tokens": list(range(6, 22))}
    seen = set()
    for text, steps in drawn_in_any_order(name, strategy, bad_words_ids=bad, **suppressed):
        seen.update(runs(text, 2))
        for word in bad:
            for run, when in zip(runs(text, len(word)), runs(steps, len(word)), strict=True):
                assert run != tuple(word) or max(when) < 0
    assert {(0, 2), (2, 0)} & seen  # the parts of a longer one are allowed


@pytest.mark.parametrize(("name", "strategy"), [case for case in ANY_ORDER if case[0] != "armd"])
def test_in_any_order_a_huge_penalty_repeats_no_token_that_is_known(name, strategy):
    # Below 0, where it makes every token less likely.
    for text, steps in drawn_in_any_order(name, strategy, shift=-100.0, repetition_penalty=1e6):
        for token, step in zip(text, steps, strict=True):
            known = {other for other, when in zip(text, steps, strict=True) if when < step}
            assert step < 0 or token not in known


@pytest.mark.parametrize(("name", "strategy"), ANY_ORDER)
def test_in_any_order_a_sequence_is_wanted_at_all_of_its_places(name, strategy):
    """A large bias draws what completes a sequence wherever all of it but one token is known."""
    wanted, found = (4, 5, 6), 0
    for text, steps in drawn_in_any_order(name, strategy, sequence_bias=[[[4, 5, 6], 1e6], [[4], 25.0], [[6], 25.0]]):
        for start, (run, when) in enumerate(zip(runs(text, 3), runs(steps, 3), strict=True)):
            last = when.index(max(when))
            if when[last] >= 0 and all(run[place] == wanted[place] for place in range(3) if place != last):
                assert wanted in runs(text[max(0, start + last - 2) : start + last + 3], 3)
                found += 1
    assert found


def test_the_function_of_allowed_tokens_is_told_the_row_and_what_is_before():
    """Rows count all sequences that are returned; gaps hold the mask, padding is in front."""
    model, calls = FAMILIES["mdlm"].model(torch.float64, num_hidden_layers=2), []
    mask = model.config.mask_token_id
    prompts = TEXTS.masked_fill(TEXTS == MASK, mask)

    def allowed(row, text):
        calls.append((row, text.tolist()))
        return [row, row + 1]

    output = model.generate(
        prompts,
        attention_mask=TEXTS_REAL.long(),
        strategy="first_hitting",
        num_return_sequences=2,
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
    )
    generated = output.steps >= 0
    assert len(calls) == int(generated.sum())
    for row in range(6):
        assert set(output.sequences[row, generated[row]].tolist()) <= {row, row + 1}
    real = TEXTS_REAL.repeat_interleave(2, dim=0)
    for row, text in calls:
        column, step = len(text), output.steps[row, len(text)]
        known = output.steps[row, :column] < step
        before = output.sequences[row, :column].where(known, mask)
        is_real = real[row, :column]
        assert text == [*before[~is_real].tolist(), *before[is_real].tolist()]
        assert step >= 0


def test_gaps_at_the_end_of_a_prompt_are_what_max_new_tokens_appends():
    model = FAMILIES["armd"].model(torch.float64, num_hidden_layers=2)
    settings = {"do_sample": False, "exponential_decay_length_penalty": (2, 3.0), "forced_eos_token_id": 14, **ENDING}
    appended = model.generate(PROMPTS, attention_mask=REAL, max_new_tokens=NEW, **settings)
    gaps = torch.nn.functional.pad(PROMPTS, (0, NEW), value=model.config.mask_token_id)
    mask = torch.nn.functional.pad(REAL, (0, NEW), value=1)
    assert torch.equal(appended, model.generate(gaps, attention_mask=mask, **settings))
    padded = model.generate(
        torch.nn.functional.pad(gaps, (0, 3), value=PAD),
        attention_mask=torch.nn.functional.pad(mask, (0, 3)),
        **settings,
    )
    assert torch.equal(appended, padded[:, : appended.shape[1]])


def test_a_processor_may_write_over_its_scores_and_widen_them():
    model, kept = FAMILIES["armd"].model(num_hidden_layers=2), []

    def favour(input_ids, scores):
        kept.append(scores.dtype)
        scores[:, 7] += 100
        return scores.double()

    arguments = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(PROMPTS, attention_mask=REAL, logits_processor=[favour], **arguments)
    assert set(kept) == {torch.float32}
    assert bool((output.sequences[:, LENGTH:] == 7).all())
    for logits, scores in zip(output.logits, output.scores, strict=True):
        torch.testing.assert_close(scores[:, 7], logits[:, 7] + 100)
        torch.testing.assert_close(scores[:, :7], logits[:, :7])
    assert float(output.confidence[:, LENGTH:].max()) < 0.9  # of the model, not of what was made of it
