"""The demonstration, on the checkpoint that is shipped."""

import io
import re

import pytest
import torch

from hf_diffusion.cli import main
from hf_diffusion.generation.live_view import LiveView, wrap


def test_demo_shows_texts_and_a_table_that_adds_up(capsys):
    assert main(["demo", "--num-streams", "1", "4", "--max-new-tokens", "30", "--seconds-per-step", "0"]) == 0
    printed = capsys.readouterr().out
    assert "--- 1 stream ---" in printed
    assert "--- 4 streams ---" in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r" +[14]  ", line)]
    assert [row[:3] for row in rows] == [["1", "30", "1.00"], ["4", "11", "2.73"]]
    # A model that knows nothing of its language would score log 2048 = 7.6 nats on any text.
    assert all(0 < float(loss) < 6 for row in rows for loss in row[4:])


@pytest.mark.parametrize("arguments", [["--num-streams", "31", "--max-new-tokens", "30"], ["--max-new-tokens", "999"]])
def test_impossible_demos_are_refused(arguments, capsys):
    assert main(["demo", *arguments]) == 2
    assert re.search("`num_streams` must be|more than the model's context", capsys.readouterr().err)


class Words:
    def decode(self, ids):
        return {0: "one ", 1: "two\n", 2: "three"}[ids[0]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_view_draws_over_what_it_drew_before(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    view = LiveView(Words(), mask_token_id=9, stream_of=[0, 0, 1], file=screen)
    view.put(torch.tensor([[0]]))
    view.put_draft(torch.tensor([[9, 2]]))
    view.put_draft(torch.tensor([[1, 2]]))
    view.put(torch.tensor([[1, 2]]))
    view.end()
    drafts = screen.getvalue().split("\033[J")[1:]
    plain = [re.sub(r"\033\[[0-9;]*[mA]|\r", "", draft) for draft in drafts]
    assert plain == ["one ·three\n", "one two\nthree\n", "one two\nthree\n"]
    assert screen.getvalue().count("\033[1A") == 1
    assert screen.getvalue().count("\033[2A") == 1


def test_a_pipe_gets_the_finished_text_only():
    pipe = io.StringIO()
    view = LiveView(Words(), mask_token_id=9, stream_of=[0, 1], file=pipe)
    view.put_draft(torch.tensor([[9, 2]]))
    view.put(torch.tensor([[0, 2]]))
    view.end()
    assert pipe.getvalue() == "one three\n"


def test_lines_are_wrapped_by_what_is_visible():
    assert wrap([("abc", 31), ("def", None), ("g\nh", None)], width=4) == ["\033[31mabc\033[0m", "defg", "h"]
    assert wrap([("abcdefghij", None)], width=4) == ["abcd", "efgh", "ij"]
