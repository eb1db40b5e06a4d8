"""`hf-diffusion frontier` against the functions that it calls, and going on where it was interrupted."""

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.cli import frontier, main
from hf_diffusion.evaluation import Judge, draw_texts, judge_drawn, reference_pieces


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Folder of a causal model of bytes."""
    folder = tmp_path_factory.mktemp("judge")
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def flags(judge, tmp_path, *more):
    few = ["--num-texts", "3", "--length", "8", "--temperatures", "0.5", "1.0", "--num-streams", "1", "4"]
    return ["frontier", "--judge", judge, *few, "--json", str(tmp_path / "out.json"), *more]


def test_points_are_those_of_the_functions(judge, tmp_path, capsys):
    assert main(flags(judge, tmp_path, "--picture", str(tmp_path / "frontier.svg"), "--seed", "5")) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert [(point["series"], point["temperature"]) for point in written["points"]] == [
        ("1 streams", 0.5),
        ("1 streams", 1.0),
        ("4 streams", 0.5),
        ("4 streams", 1.0),
    ]
    assert [point["nfe"] for point in written["points"]] == [8, 8, 5, 5]
    model, tokenizer = (kind.from_pretrained(ARMD_SHAKESPEARE) for kind in (AutoModel, AutoTokenizer))
    drawn = draw_texts(model, 3, 8, seed=5, strategy="strided", num_streams=4, temperature=0.5)
    reader = Judge(LlamaForCausalLM.from_pretrained(judge).eval(), AutoTokenizer.from_pretrained(judge))
    expected = judge_drawn("4 streams", 0.5, drawn, tokenizer, reader).quality
    found = written["points"][2]["quality"]
    assert found["generative_perplexity"] == pytest.approx(expected.generative_perplexity, rel=1e-4)
    assert found["unigram_entropy"] == pytest.approx(expected.unigram_entropy)
    assert re.search(rf"4 streams +0.50 +{expected.generative_perplexity:.1f} +{expected.unigram_entropy:.3f}", printed)
    assert "<svg" in (tmp_path / "frontier.svg").read_text()
    assert not (tmp_path / "out.json.parts").exists()


def test_an_interrupted_frontier_goes_on_where_it_was(judge, tmp_path, monkeypatch):
    calls, draw = [], frontier.draw_texts

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(frontier, "draw_texts", interrupted)
    assert main(flags(judge, tmp_path)) == 130
    assert main(flags(judge, tmp_path)) == 0
    assert len(calls) == 2 + 1 + 2  # two done, one interrupted and done again with the last one
    assert len(json.loads((tmp_path / "out.json").read_text())["points"]) == 4


def test_pieces_are_spread_over_the_text():
    tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
    text = " ".join(f"{number} is a number." for number in range(50))
    ids = tokenizer(text)["input_ids"]
    pieces = reference_pieces(tokenizer, text, 10, 4)
    assert pieces[0] == tokenizer.decode(ids[:10])
    assert pieces[-1] == tokenizer.decode(ids[-10:])
    assert len(set(pieces)) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-texts", "0"], "`num_texts` must be at least 1"),
        (["--json", "no/such/folder.json"], "there is no such folder"),
        (["--device", "nowhere"], "`device`='nowhere' is not to be had here"),
    ],
)
def test_bad_flags_are_refused(judge, tmp_path, more, message, capsys):
    assert main(flags(judge, tmp_path, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
