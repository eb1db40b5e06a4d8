"""Ratios, limits and what counts as a regression."""

import itertools
import json
import re

import pytest
import short
import torch
from decode import Decoders
from families import FAMILIES
from harness import Case, Ceilings, matrix_weights, measure_ceilings, side_by_side
from sample import sampling_cases
from torch.utils.flop_counter import FlopCounterMode
from train import training_cases


SHAPE = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_the_slower_ceiling_is_the_limit():
    ceilings = Ceilings(bytes_per_second=100.0, operations_per_second=1000.0)
    assert ceilings.floor(200, 1000) == (2.0, "bytes")  # two seconds to move, one to compute
    assert ceilings.floor(50, 3000) == (3.0, "operations")


def test_ceilings_are_what_a_second_is_enough_for():
    ticks = itertools.count()
    ceilings = measure_ceilings(torch.float32, lambda: next(ticks))  # whatever is timed takes one second
    assert ceilings.bytes_per_second == 256 * 2**20
    with FlopCounterMode(display=False) as counter:
        torch.ones(1024, 1024) @ torch.ones(1024, 1024)
    assert ceilings.operations_per_second == counter.get_total_flops()


@pytest.fixture
def compared(monkeypatch):
    """Two cases that take 4 and 2 seconds, on a machine that is slower before than after."""
    now = [0.0]
    ceilings = iter([Ceilings(100.0, 600.0), Ceilings(50.0, 1000.0)])
    monkeypatch.setattr("harness.measure_ceilings", lambda dtype, clock: next(ceilings))
    cases = {
        name: Case(lambda seconds=seconds: now.__setitem__(0, now[0] + seconds), *limits, tokens=12)
        for name, seconds, *limits in (("base", 4.0, 100, 200), ("twice", 2.0, 50, 1800))
    }
    return side_by_side(cases, "base", 2, torch.float32, lambda: now[0])


def test_cases_are_compared_with_their_baseline_and_with_the_higher_ceilings(compared):
    base, twice = compared.rows["base"], compared.rows["twice"]
    assert (base["x baseline"], twice["x baseline"]) == (1.0, 2.0)
    assert (base["tokens/s"], twice["tokens/s"]) == (3.0, 6.0)
    assert (base["share of limit"], base["limit"]) == (0.25, "bytes")  # 1 second of 4
    assert (twice["share of limit"], twice["limit"]) == (0.9, "operations")  # 1.8 seconds of 2


def test_tables_and_files_say_what_the_shares_are_of_and_how_they_came_about(compared, tmp_path, capsys):
    path = tmp_path / "out.json"
    for seed in (3, 4):
        compared.report("two cases", {"seed": seed, "json": path}, path)
    printed = capsys.readouterr().out
    assert "limits: 0.0 GB and 0.0 billion operations a second" in printed
    assert re.search(r"twice +2\.00 +6\.00 +2\.00 +0\.90 +operations", printed)
    first, second = json.loads(path.read_text())
    assert first["ceilings"] == {"bytes_per_second": 100.0, "operations_per_second": 1000.0}
    assert (first["arguments"]["seed"], second["arguments"]["seed"]) == (3, 4)
    assert first["table"][1]["limit"] == "operations"


def test_weights_that_a_row_is_multiplied_with_are_those_of_the_model():
    for family in ("armd", "mdlm"):
        config_class, model_class = FAMILIES[family].config_class, FAMILIES[family].model_class
        model = model_class(config_class(**SHAPE))
        multiplied = [*model.model.layers.parameters(), *model.lm_head.parameters()]
        square = [weight for weight in multiplied if weight.ndim == 2 and 128 not in weight.shape]  # no conditioning
        assert matrix_weights(SHAPE) == sum(weight.numel() for weight in square)
    assert matrix_weights(SHAPE, layers=0) == 64 * 100
    assert matrix_weights(SHAPE, head=False) == 2 * 12 * 64**2


def count_operations(run):
    """Of matrix products with weights, those of attention left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )


@pytest.mark.parametrize(
    "make_cases",
    [
        lambda: training_cases(SHAPE, 4, 16, families=True),
        lambda: Decoders(SHAPE, torch.float32).cases(2, 12, []),
        lambda: sampling_cases(SHAPE, 2, 16, 8),
    ],
    ids=["train", "decode", "sample"],
)
def test_no_more_operations_are_said_to_be_needed_than_are_run(make_cases):
    torch.manual_seed(0)
    uncounted = ("tuned alike", "with history")  # packed weights, whose products torch does not count
    for name, case in make_cases().items():
        if not name.endswith(uncounted):
            runs = 4 if name in ("MDLM", "LoMDM") else 1  # how many tokens are masked is drawn
            counted = sum(count_operations(case.run) for _ in range(runs)) / runs
            least = 0.3 if name.startswith("reference's algorithm") else 0.8  # which runs more than it must
            assert least * counted <= case.operations <= 1.001 * counted, name


def test_a_third_lost_is_a_regression_and_so_is_a_case_that_is_gone():
    reference = {"slower": 3.0, "as fast": 3.0, "gone": 1.0}
    assert short.fallen({"slower": 1.9, "as fast": 2.1, "new": 0.1}, reference) == ["slower", "gone"]


def test_references_are_stored_for_every_benchmark(tmp_path):
    stored = json.loads(short.REFERENCE.read_text())
    assert stored.keys() == short.benchmarks(tmp_path).keys()
    assert all(ratio > 0 for of in stored.values() for ratio in of.values())


@pytest.mark.parametrize(("lost", "code"), [(0.7, 0), (0.6, 1)])
def test_the_check_fails_where_a_ratio_stays_a_third_below_its_reference(tmp_path, monkeypatch, capsys, lost, code):
    """Run as it is in CI, but on two cases that always take the same time."""
    (tmp_path / "reference.json").write_text(json.dumps({"two": {"faster": 4.0}}))
    now, runs = [0.0], []

    def two_cases():
        runs.append(1)
        seconds = {"base": 4.0, "faster": 1 / lost}
        return {name: Case(lambda s=s: now.__setitem__(0, now[0] + s), 1, 1) for name, s in seconds.items()}

    monkeypatch.setattr(short, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(short, "benchmarks", lambda folder: {"two": ("base", 1, two_cases)})
    monkeypatch.setattr(short, "process_time", lambda: now[0])
    monkeypatch.setattr("harness.measure_ceilings", lambda dtype, clock: Ceilings(1.0, 1.0))
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("sys.argv", ["short.py", "--check"])
    assert short.main() == code
    assert len(runs) == 1 + code  # what falls is timed once more
    assert ("lost a third: two, faster: 2.40 times the baseline, 4.00 before" in capsys.readouterr().err) == bool(code)
    monkeypatch.setattr("sys.argv", ["short.py", "--store"])
    assert short.main() == 0
    assert json.loads((tmp_path / "reference.json").read_text()) == {"two": {"faster": round(4 * lost, 2)}}
    monkeypatch.setattr("sys.argv", ["short.py", "--check"])
    assert short.main() == 0
