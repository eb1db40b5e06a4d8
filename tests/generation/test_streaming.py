"""transformers' own streamers on text that is drawn out of order."""

import pytest
import torch
from families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer


PROMPT = torch.tensor([[1, 2, 3]])
STRIDED = {"strategy": "strided", "num_streams": 3, "max_new_tokens": 8}


@pytest.fixture
def tokenizer():
    vocabulary = {f"w{number}": number for number in range(23)} | {"<mask>": 23}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>")


class Recorder:
    def __init__(self):
        self.finished, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.finished.append(value)

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    def put_draft(self, value, **kwargs):
        self.drafts.append(value.clone())


def test_a_streamer_that_takes_drafts_sees_every_step():
    model, streamer = FAMILIES["armd"].model(), DraftRecorder()
    output = model.generate(PROMPT, streamer=streamer, return_dict_in_generate=True, **STRIDED)
    assert len(streamer.drafts) == output.nfe == 3 + 3 - 1
    mask = model.config.mask_token_id
    assert [int((draft != mask).sum()) for draft in streamer.drafts] == [1, 2, 3, 6, 8]
    for draft in streamer.drafts:
        shown = draft != mask
        assert torch.equal(draft[shown], output.sequences[:, 3:][shown])
    assert torch.equal(torch.cat(streamer.finished, dim=1), output.sequences)
    assert streamer.ended


def test_a_streamer_without_drafts_gets_the_text_in_reading_order():
    model, streamer = FAMILIES["armd"].model(), Recorder()
    sequences = model.generate(PROMPT, streamer=streamer, **STRIDED)
    prompt, *columns = streamer.finished
    assert torch.equal(prompt, PROMPT)
    assert torch.equal(torch.stack(columns, dim=1), sequences[:, 3:])
    assert streamer.ended


def test_infilling_is_streamed_from_the_first_gap():
    model, streamer = FAMILIES["armd"].model(), Recorder()
    canvas = torch.tensor([[1, 23, 3, 23, 5, 6]])
    sequences = model.generate(canvas, streamer=streamer)
    prompt, *columns = streamer.finished
    assert torch.equal(prompt, canvas[:, :1])
    assert torch.equal(torch.stack(columns, dim=1), sequences[:, 1:])


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextDiffusionStreamer])
def test_printed_text_ends_with_the_decoded_sequence(streamer_class, tokenizer, capsys):
    sequences = FAMILIES["armd"].model().generate(PROMPT, streamer=streamer_class(tokenizer), **STRIDED)
    printed = capsys.readouterr().out
    assert printed.strip().endswith(tokenizer.decode(sequences[0])[-20:])
    if streamer_class is TextDiffusionStreamer:
        assert "<mask>" in printed


@pytest.mark.parametrize("canvas", [None, torch.tensor([[23, 3, 23, 4]])], ids=["nothing", "gap first"])
def test_no_text_is_taken_for_a_prompt_that_is_not_there(canvas, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    arguments = {} if canvas is not None else {"max_new_tokens": 5}
    sequences = FAMILIES["armd"].model().generate(canvas, streamer=streamer, **arguments)
    assert capsys.readouterr().out.split() == tokenizer.decode(sequences[0]).split()


def test_iterator_streamer_yields_the_text(tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=False, timeout=10)
    sequences = FAMILIES["armd"].model().generate(PROMPT, streamer=streamer, **STRIDED)
    assert "".join(streamer).split() == tokenizer.decode(sequences[0]).split()


class Timed:
    """Notes after how many passes each column arrives."""

    def __init__(self, model):
        self.columns, self.at_pass, self.passes = [], [], 0
        model.register_forward_hook(self.count)

    def count(self, *_):
        self.passes += 1

    def put(self, value):
        self.columns.append(value)
        self.at_pass.append(self.passes)

    def end(self):
        pass


def test_a_column_is_shown_as_soon_as_nothing_before_it_can_change():
    model = FAMILIES["armd"].model()
    streamer = Timed(model)
    model.generate(PROMPT, streamer=streamer, **STRIDED)
    # Streams of 3, 3 and 2: the heads take passes 1, 2 and 3, and then one position of each is drawn per pass.
    assert streamer.at_pass == [0, 1, 4, 5, 5, 5, 5, 5, 5]


def test_a_batch_is_streamed_column_by_column_with_padding_for_texts_that_have_ended():
    model = FAMILIES["armd"].model()
    streamer = Timed(model)
    sequences = model.generate(
        PROMPT.repeat(2, 1),
        max_new_tokens=5,
        streamer=streamer,
        eos_token_id=7,
        pad_token_id=9,
        prefix_allowed_tokens_fn=lambda row, tokens: [7] if row == 0 else [8],
    )
    prompt, *columns = streamer.columns
    assert torch.equal(prompt, PROMPT.repeat(2, 1))
    assert [column.tolist() for column in columns] == [[7, 8], *[[9, 8]] * 4]
    assert torch.equal(torch.stack(columns, dim=1), sequences[:, 3:])
    assert streamer.at_pass == [0, 1, 2, 3, 4, 5]


def test_the_stream_stops_where_the_text_ends():
    model = FAMILIES["armd"].model()
    streamer = Recorder()
    sequences = model.generate(
        PROMPT, max_new_tokens=9, streamer=streamer, stopping_criteria=[lambda ids, scores: ids.shape[1] == 5]
    )
    assert sequences.shape[1] == 5
    assert len(streamer.finished) == 1 + 2


def test_a_streamer_for_one_text_says_so_before_any_pass(tokenizer):
    model = FAMILIES["armd"].model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(PROMPT.repeat(2, 1), streamer=TextStreamer(tokenizer))
