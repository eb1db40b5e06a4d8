"""All benchmarks with small models, in less than a minute: the ratios that must not fall.

    python benchmarks/short.py [--check | --store] [--json short.json]

`python3 dev.py bench` checks them in the environment of the tests, as is done on every change.

`--check` fails if a case has lost a third of its ratio to its baseline, as stored in short_reference.json by `--store`.
Both sides of a ratio are timed in the same run, in CPU time of one thread, so that the machine matters little. A case
that falls is timed once more before it counts.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from decode import GPT2, Decoders
from harness import Case, side_by_side
from load import BASELINE as LOADED
from load import loading_cases
from sample import baseline_name, sampling_cases
from train import BASELINE as TRAINED
from train import training_cases
from transformers.utils import logging


REFERENCE = Path(__file__).with_name("short_reference.json")
SHAPE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048}
NUM_STEPS = 32
LOST = 2 / 3
"""What is left of a ratio that has lost a third."""


def benchmarks(folder: Path) -> dict[str, tuple[str, int, Callable[[], dict[str, Case]]]]:
    """Baseline, rounds and cases, by title."""
    return {
        "decode": (GPT2, 4, lambda: Decoders(SHAPE, torch.float32).cases(1, 48, [1, 4])),
        "train": (TRAINED, 4, lambda: training_cases(SHAPE, 4, 64, families=True)),
        "sample": (baseline_name(NUM_STEPS), 3, lambda: sampling_cases(SHAPE, 2, 32, NUM_STEPS)),
        "load": (LOADED, 20, lambda: loading_cases(SHAPE, folder)),
    }


def ratios(title: str, arguments: argparse.Namespace) -> dict[str, float]:
    """By case, how many times as fast as the baseline."""
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        baseline, rounds, make_cases = benchmarks(Path(folder))[title]
        measured = side_by_side(make_cases(), baseline, rounds, torch.float32, process_time)
    measured.report(title, vars(arguments), arguments.json)
    return {name: row["x baseline"] for name, row in measured.rows.items() if name != baseline}


def fallen(found: dict[str, float], reference: dict[str, float]) -> list[str]:
    """Cases that have lost a third, and those that are not there any more."""
    return [name for name, ratio in reference.items() if found.get(name, 0.0) < LOST * ratio]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail where a ratio has lost a third")
    mode.add_argument("--store", action="store_true", help="make the medians of three runs the reference")
    parser.add_argument("--seed", type=int, default=0, help="of weights and of what is drawn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stored = json.loads(REFERENCE.read_text())
    if arguments.store:
        runs = [{title: ratios(title, arguments) for title in stored} for _ in range(3)]
        medians = {
            title: {name: round(statistics.median(run[title][name] for run in runs), 2) for name in runs[0][title]}
            for title in stored
        }
        REFERENCE.write_text(json.dumps(medians, indent=2) + "\n")
        return 0
    failures = []
    for title, reference in stored.items():
        found = ratios(title, arguments)
        if arguments.check and (lost := fallen(found, reference)):
            again = ratios(title, arguments)
            failures += [
                f"{title}, {name}: {again.get(name, 0.0):.2f} times the baseline, {reference[name]:.2f} before"
                for name in fallen(again, {name: reference[name] for name in lost})
            ]
    for failure in failures:
        print(f"lost a third: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
