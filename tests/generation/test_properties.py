"""What holds of every text, whatever `generate` is asked for: given tokens, gaps, ends, padding, what is reported."""

import functools

import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


NUM_TOKENS = 22
CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]
CASES += [
    ("mdlm", {"strategy": "ancestral", "max_denoising_steps": 4, "remasking": "cap", "remasking_strength": 0.4}),
    ("mdlm", {"strategy": "semi_autoregressive", "block_length": 3, "approximate_cache": True}),
]
PROCESSORS = [
    {},
    {"repetition_penalty": 1.5},
    {"bad_words_ids": [[3], [4, 5], [5, 5]]},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 1},
    {"suppress_tokens": [1, 2], "begin_suppress_tokens": [5]},
    {"sequence_bias": [[[5], 3.0], [[5, 6], 2.0]]},
    {"stopping_criteria": [lambda input_ids, scores: input_ids[:, -1] % 5 == 2]},
    {"logits_processor": [lambda input_ids, scores: scores.roll(1, dims=-1)]},
]
NEEDS_END_TOKENS = ("min_new_tokens",)


@functools.cache
def model_of(name):
    return FAMILIES[name].model(num_hidden_layers=2)


class Recorder:
    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        self.put_in.append(value)

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    def put_draft(self, value, **kwargs):
        assert not self.ended


@st.composite
def requests(draw):
    """A model, prompts with gaps and padding anywhere, and arguments."""
    name, strategy = draw(st.sampled_from(CASES))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    prompts = torch.randint(NUM_TOKENS, (batch, length), generator=generator)
    gaps = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    side = draw(st.sampled_from(["none", "left", "right", "inside"]))
    real = torch.ones(batch, length, dtype=torch.bool)
    if side == "inside":
        real = torch.rand(batch, length, generator=generator) < 0.7
        real[~real.any(dim=1), 0] = True
    elif side != "none":
        count = torch.randint(length, (batch, 1), generator=generator)
        real = torch.arange(length) >= count
        real = real if side == "left" else real.flip(1)
    prompts = prompts.masked_fill(gaps, model_of(name).config.mask_token_id)
    num_new = draw(st.integers(3, 8))  # as many as there are streams
    arguments = {**draw(st.sampled_from(PROCESSORS)), "max_new_tokens": num_new, "do_sample": draw(st.booleans())}
    eos_token_id = draw(st.sampled_from([None, 5, [5, 6, 7, 8]]))
    if eos_token_id is None and any(needy in arguments for needy in NEEDS_END_TOKENS):
        eos_token_id = 5
    pad_token_id = draw(st.sampled_from([0, 5]))
    if arguments["do_sample"]:
        arguments |= {"temperature": draw(st.sampled_from([1.0, 6.0])), "seed": draw(st.integers(0, 99))}
        arguments["num_return_sequences"] = draw(st.sampled_from([1, 2]))
    arguments |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return name, strategy, prompts, real, arguments, draw(st.sampled_from([Recorder, DraftRecorder]))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_what_holds_of_every_text(request):
    name, strategy, prompts, real, arguments, streamer_class = request
    model, streamer = model_of(name), streamer_class()
    mask_token_id, passes = model.config.mask_token_id, []
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: passes.append(inputs["attention_mask"].shape[0]), with_kwargs=True
    )
    try:
        output = model.generate(
            prompts,
            attention_mask=real.long(),
            streamer=streamer,
            return_dict_in_generate=True,
            output_scores=True,
            **strategy,
            **arguments,
        )
    finally:
        handle.remove()

    copies, appended = arguments.get("num_return_sequences", 1), arguments["max_new_tokens"]
    canvas = torch.nn.functional.pad(prompts, (0, appended), value=mask_token_id).repeat_interleave(copies, dim=0)
    real = torch.nn.functional.pad(real, (0, appended), value=True).repeat_interleave(copies, dim=0)
    to_fill = (canvas == mask_token_id) & real
    width = output.sequences.shape[1]
    sequences, steps = output.sequences, output.steps
    first_column = int(to_fill.any(dim=0).int().argmax())

    # Given tokens, and padding of the prompt, are as they were; every gap is filled with a token.
    kept = ~to_fill[:, :width]
    assert torch.equal(sequences[kept], canvas[:, :width][kept])
    assert not bool((sequences[to_fill[:, :width]] == mask_token_id).any())
    assert bool((sequences[to_fill[:, :width]] < model.config.vocab_size).all())

    # A text ends behind its last given token or not at all, and what is cut off or behind its end is padding.
    ends = [arguments["eos_token_id"]] if isinstance(arguments["eos_token_id"], int) else arguments["eos_token_id"]
    criteria = arguments.get("stopping_criteria")
    longest = 0
    for row in range(len(canvas)):
        given_columns = (real[row] & ~to_fill[row]).nonzero()
        after_given = int(given_columns[-1]) + 1 if len(given_columns) else 0
        end = canvas.shape[1]
        for column in range(after_given, width):
            token = int(sequences[row, column])
            stops = criteria is not None and token % 5 == 2
            if bool(to_fill[row, column]) and (token in (ends or []) or stops):
                end = column + 1
                break
        longest = max(longest, end)
        generated = to_fill[row, :width] & (torch.arange(width) < end)
        behind = to_fill[row, :width] & (torch.arange(width) >= end)
        assert bool((sequences[row, behind] == arguments["pad_token_id"]).all())

        # What is reported belongs to what was generated, and to nothing else.
        assert torch.equal(steps[row] >= 0, generated)
        assert bool((output.confidence[row, ~generated] == 1).all())
        assert bool(((output.confidence[row] >= 0) & (output.confidence[row] <= 1)).all())
        assert int(steps[row].max()) < output.nfe
        own_passes = int(generated.sum()) / float(output.tokens_per_forward[row])
        assert abs(own_passes - round(own_passes)) < 1e-3
        assert int(steps[row].max()) + 1 <= round(own_passes) <= output.nfe
        if not arguments["do_sample"]:
            for column in generated.nonzero()[:, 0].tolist():
                assert int(output.scores[column - first_column][row].argmax()) == int(sequences[row, column])
    assert width == longest
    cached_again = output.cache_logit_error is not None  # read once more to know the error, which does not count
    assert len(passes) == output.nfe or cached_again

    # The streamer has seen the text.
    assert streamer.ended
    first, *rest = streamer.put_in
    rest = [value[:, None] if value.ndim == 1 else value for value in rest]
    assert torch.equal(torch.cat([first, *rest], dim=1), sequences)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(requests())
def test_recording_streaming_and_a_cache_change_nothing(request):
    name, strategy, prompts, real, arguments, streamer_class = request
    model = FAMILIES[name].model(torch.float64, num_hidden_layers=2)
    seeded = {**arguments, "seed": 7}
    plain = model.generate(prompts, attention_mask=real.long(), **strategy, **seeded)
    output = model.generate(
        prompts,
        attention_mask=real.long(),
        use_cache=False,
        streamer=streamer_class(),
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_logits=True,
        **strategy,
        **seeded,
    )
    assert torch.equal(output.sequences, plain)
