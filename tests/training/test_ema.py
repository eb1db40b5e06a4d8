"""Averaged weights against the recursion solved by hand."""

import pytest
import torch
from torch import nn

from hf_diffusion.training import EMACallback


class State:
    global_step = 0
    is_world_process_zero = True


class Arguments:
    def __init__(self, output_dir):
        self.output_dir = str(output_dir)


def step(callback, model, state, value):
    state.global_step += 1
    with torch.no_grad():
        model.weight.fill_(value)
    callback.on_step_end(None, state, None, model=model)


def test_average_is_the_closed_form(tmp_path):
    model, callback, state = nn.Linear(1, 1, bias=False), EMACallback(decay=0.5), State()
    with torch.no_grad():
        model.weight.fill_(0.0)
    callback.on_train_begin(Arguments(tmp_path), state, None, model=model)
    for value in (1.0, 2.0, 3.0):
        step(callback, model, state, value)
    # Decays (1 + n) / (10 + n): 2/11, 3/12, 4/13.
    expected = 3 * 9 / 13 + 4 / 13 * (2 * 9 / 12 + 3 / 12 * (1 * 9 / 11))
    assert float(callback.average["weight"]) == pytest.approx(expected)
    with callback.applied(model):
        assert float(model.weight) == pytest.approx(expected)
    assert float(model.weight) == 3.0


def test_average_survives_a_checkpoint(tmp_path):
    model, callback, state = nn.Linear(1, 1, bias=False), EMACallback(decay=0.9), State()
    callback.on_train_begin(Arguments(tmp_path), state, None, model=model)
    step(callback, model, state, 4.0)
    (tmp_path / "checkpoint-1").mkdir()
    callback.on_save(Arguments(tmp_path), state, None)
    resumed = EMACallback(decay=0.9)
    resumed.on_train_begin(Arguments(tmp_path), state, None, model=model)
    assert float(resumed.average["weight"]) == float(callback.average["weight"]) != 4.0


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match="`decay` must be in"):
        EMACallback(decay)
