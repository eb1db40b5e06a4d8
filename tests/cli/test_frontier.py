"""`hf-diffusion frontier` against the functions that it calls, and going on where it was interrupted."""

import hashlib
import json
import re

import pytest
from byte_judge import save_byte_judge
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.cli import frontier, main
from hf_diffusion.evaluation import Judge, draw_texts, judge_drawn, reference_pieces


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return save_byte_judge(tmp_path_factory.mktemp("judge"))


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
    described = {name: written[name] for name in ("seed", "num_texts", "length", "dtype", "references", "series")}
    assert described == {
        "seed": 5,
        "num_texts": 3,
        "length": 8,
        "dtype": "float32",
        "references": None,
        "series": {f"{n} streams": {"strategy": "strided", "num_streams": n} for n in (1, 4)},
    }


def test_a_judge_that_cannot_hold_a_text_reads_it_all_the_same_beside_the_references(tmp_path, monkeypatch):
    pytest.importorskip("mauve")
    judge = save_byte_judge(tmp_path / "judge", is_uniform=True, max_position_embeddings=10)
    text = "To be or not to be, that is the question. " * 20
    (tmp_path / "references.txt").write_text(text)
    read, texts = Judge.read, []
    monkeypatch.setattr(Judge, "read", lambda judge, of: texts.append(of) or read(judge, of))
    assert main(flags(judge, tmp_path, "--references", str(tmp_path / "references.txt"))) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    for point in written["points"]:
        assert point["quality"]["generative_perplexity"] == pytest.approx(256)
        assert 0 < point["quality"]["mauve"] < 1 + 1e-9
    pieces = reference_pieces(AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE), text, 8, 3)
    assert texts.count(pieces) == 1  # and not again for every point
    assert max(len(of.encode()) for drawn in texts for of in drawn) > 10
    assert written["reference_pieces"] == hashlib.sha256("\n".join(pieces).encode()).hexdigest()


def test_points_that_have_nothing_to_judge_are_shown(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE).__class__, "decode", lambda *a, **k: "")
    assert main(flags(judge, tmp_path, "--picture", str(tmp_path / "frontier.svg"))) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert [point["quality"]["generative_perplexity"] for point in written["points"]] == [None] * 4
    assert re.search(r"4 streams +1.00 +5.0 +[0-9.]+ +3\n", printed)


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
        (["--json", "."], "`json`='.' is a folder"),
        (["--picture", "frontier.xyz"], r"`picture`='frontier.xyz' has no ending .* 'svg'"),
        (["--device", "nowhere"], "`device`='nowhere' is not to be had here"),
    ],
)
def test_bad_flags_are_refused(judge, tmp_path, more, message, capsys):
    assert main(flags(judge, tmp_path, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
