"""`hf-diffusion generate` on the model that comes with the package."""

import io
import json
import re

import pytest
from transformers import AutoTokenizer

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.cli import main
from hf_diffusion.cli.generate import encode
from hf_diffusion.generation.live_view import colour_by_step


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)


def test_json_lines_hold_the_text_and_how_it_was_drawn(capsys, tokenizer):
    flags = ["--num-streams", "3", "--strategy", "strided", "--max-new-tokens", "9", "--num-return-sequences", "2"]
    assert main(["generate", "--prompt", "ROMEO.", "--json", "--seed", "1", *flags]) == 0
    printed = capsys.readouterr().out
    texts = [json.loads(line) for line in printed.splitlines()]
    assert len(texts) == 2
    given = len(tokenizer("ROMEO.")["input_ids"])
    for text in texts:
        assert text["prompt"] == "ROMEO."
        assert text["text"].startswith("ROMEO.")
        assert tokenizer.decode(text["token_ids"], skip_special_tokens=True) == text["text"]
        assert text["steps"][:given] == [-1] * given
        assert text["nfe"] == 5
        assert all(0 < value <= 1 for value in text["confidence"])
    assert main(["generate", "--prompt", "ROMEO.", "--json", "--seed", "1", *flags]) == 0
    assert capsys.readouterr().out == printed


def test_prompts_come_from_standard_input_a_line_each(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO.\nJULIET. [MASK]*3 night\n"))
    assert main(["generate", "--prompt-file", "-", "--json", "--greedy"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["nfe"] == 20 - first["steps"].count(-1)  # transformers' default length
    assert second["nfe"] == 3
    assert second["text"].startswith("JULIET. ")
    assert second["text"].endswith(" night")


def test_a_text_is_the_same_whatever_is_drawn_before_it(capsys, monkeypatch):
    def texts(prompts, seed):
        monkeypatch.setattr("sys.stdin", io.StringIO(prompts))
        assert main(["generate", "--prompt-file", "-", "--json", "--seed", seed, "--max-new-tokens", "9"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert texts("ROMEO.\nJULIET.\n", "4")[1] == texts("JULIET.\n", "5")[0]


def test_a_text_ends_where_it_spells_a_stop_string(capsys, tokenizer):
    flags = ["generate", "--prompt", "ROMEO.\n", "--seed", "1", "--max-new-tokens", "40"]
    assert main(flags) == 0
    whole = capsys.readouterr().out
    word = whole[len("ROMEO.\n") :].split()[2]
    assert main([*flags, "--stop-strings", word]) == 0
    stopped = capsys.readouterr().out
    end = whole.index(word, len("ROMEO.\n")) + len(word)
    assert whole[:end] == stopped[:end]
    assert len(stopped) < len(whole)


def test_a_gap_is_as_many_masks_as_are_written(tokenizer):
    ids = encode("To [MASK] or [MASK]*4.", tokenizer, 7000, "[MASK]")[0].tolist()
    assert ids.count(7000) == 5
    assert ids[-1:] == tokenizer(".")["input_ids"]
    assert 7000 not in encode("To [MASK]", tokenizer, 7000, "___")[0].tolist()


def test_the_order_is_shown_in_colours(capsys, monkeypatch, tokenizer):
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ["generate", "--show-order", "--greedy", "--prompt", "ROMEO.", "--max-new-tokens", "4"]
    assert main(arguments) == 0
    coloured = capsys.readouterr().out
    assert re.sub(r"\033\[[0-9;]*m", "", coloured.split("ROMEO.")[0]) == ""
    assert len(set(re.findall(r"38;5;(\d+)m", coloured))) == 4
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(arguments) == 0
    numbered = capsys.readouterr().out
    assert re.findall("[₀-₉]", numbered) == ["₀", "₁", "₂", "₃"]
    assert re.sub("[₀-₉]", "", numbered) == re.sub(r"\033\[[0-9;]*m", "", coloured)


def test_given_text_after_a_gap_is_shown_and_padding_is_not(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["generate", "--show-order", "--greedy", "--prompt", "JULIET. [MASK]*3 night"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("JULIET.")
    assert shown.endswith(" night\n")
    assert re.findall("[₀-₉]", shown) == ["₀", "₁", "₂"]


def test_a_character_of_several_tokens_stays_whole(tokenizer, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ids = tokenizer("é 你")["input_ids"]
    assert len(ids) > 3
    assert colour_by_step(tokenizer, [(token, -1) for token in ids]) == "é 你"
    numbered = colour_by_step(tokenizer, [(token, step) for step, token in enumerate(ids)])
    assert re.sub("[₀-₉]", "", numbered) == "é 你"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "diagonal"], "`strategy` must be one of"),
        (["--mask-symbol", ""], "`mask_symbol` must not be empty"),
        (["--live", "--num-return-sequences", "2"], "`num_return_sequences` .2. must be 1 with `live`"),
        (["--device", "nowhere"], "`device`='nowhere' is not to be had here"),
        (["--seed", str(2**70)], "`seed` must be at least 0 and less than"),
        (["--prompt", "a [MASK]*0 b"], "`prompt` holds a gap of no token"),
        (["--strategy", "velocity"], "follows an order that the model has learned; this one has not learned any"),
        (["--learned-order"], "`learned_order`=True has no effect"),
    ],
)
def test_bad_input_is_refused(flags, message, capsys):
    assert main(["generate", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_live_view_goes_to_a_pipe_as_finished_text(capsys):
    assert main(["generate", "--prompt", "ROMEO.", "--live", "--seed", "1", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("ROMEO.")
