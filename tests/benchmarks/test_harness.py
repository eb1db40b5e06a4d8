"""Ratios, limits and what counts as a regression."""

import itertools
import json

import pytest
import short
import torch
from harness import Case, Ceilings, matrix_weights, side_by_side

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion


def test_the_slower_ceiling_is_the_limit():
    ceilings = Ceilings(bytes_per_second=100.0, operations_per_second=1000.0)
    assert ceilings.floor(200, 1000) == 2.0  # two seconds to move, one to compute
    assert ceilings.floor(50, 3000) == 3.0


def test_cases_are_compared_with_their_baseline_by_the_clock():
    clock = itertools.count()
    now = [0.0]
    cases = {
        name: Case(lambda seconds=seconds: now.__setitem__(0, now[0] + seconds), 0, 0, tokens=12)
        for name, seconds in (("base", 4.0), ("twice", 2.0))
    }
    rows = side_by_side(cases, "base", 2, torch.float32, lambda: now[0] + 1e-9 * next(clock))
    assert rows["base"]["x baseline"] == 1.0
    assert rows["twice"]["x baseline"] == pytest.approx(2.0, rel=1e-6)
    assert rows["twice"]["tokens/s"] == pytest.approx(6.0, rel=1e-6)


def test_weights_that_a_row_is_multiplied_with_are_those_of_the_model():
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = ARMDForMaskedDiffusion(ARMDConfig(**shape))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    of_layers_and_head = sum(module.weight.numel() for module in linear if module.weight.shape != (16, 64))
    assert matrix_weights(shape) == pytest.approx(of_layers_and_head, rel=0.2)
    assert matrix_weights(shape, layers=0) == 16 * 50
    assert matrix_weights(shape, head=False) == 3 * 12 * 16**2


def test_a_third_lost_is_a_regression_and_so_is_a_case_that_is_gone():
    reference = {"slower": 3.0, "as fast": 3.0, "gone": 1.0}
    assert short.fallen({"slower": 1.9, "as fast": 2.1, "new": 0.1}, reference) == ["slower", "gone"]


def test_references_are_stored_for_every_benchmark(tmp_path):
    stored = json.loads(short.REFERENCE.read_text())
    assert stored.keys() == short.benchmarks(tmp_path).keys()
    assert all(ratio > 0 for of in stored.values() for ratio in of.values())
