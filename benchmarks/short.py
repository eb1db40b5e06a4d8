"""All benchmarks with small models, in less than a minute: the ratios that must not fall.

    python benchmarks/short.py [--check | --store] [--json short.json]

`--check` fails if a case has lost a third of its ratio to its baseline, as stored in short_reference.json by `--store`.
Both sides of a ratio are timed in the same run, in CPU time of one thread, so that the machine matters little. A case
that falls is timed once more before it counts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from decode import GPT2, Decoders
from harness import Case, report_side_by_side, side_by_side
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
        "decode": (GPT2, 6, lambda: Decoders(SHAPE, torch.float32).cases(1, 48, [1, 4])),
        "train": (TRAINED, 6, lambda: training_cases(SHAPE, 4, 64, families=True)),
        "sample": (baseline_name(NUM_STEPS), 4, lambda: sampling_cases(SHAPE, 2, 32, NUM_STEPS)),
        "load": (LOADED, 8, lambda: loading_cases(SHAPE, folder)),
    }


def ratios(title: str, path: Path | None) -> dict[str, float]:
    """By case, how many times as fast as the baseline."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        baseline, rounds, make_cases = benchmarks(Path(folder))[title]
        measured = side_by_side(make_cases(), baseline, rounds, torch.float32, process_time)
    report_side_by_side(title, measured, baseline, path)
    return {name: row["x baseline"] for name, row in measured.items() if name != baseline}


def fallen(found: dict[str, float], reference: dict[str, float]) -> list[str]:
    """Cases that have lost a third, and those that are not there any more."""
    return [name for name, ratio in reference.items() if found.get(name, 0.0) < LOST * ratio]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="fail where a ratio has lost a third")
    mode.add_argument("--store", action="store_true", help="make what is measured the reference")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    stored = json.loads(REFERENCE.read_text()) if REFERENCE.is_file() else {}
    results, failures = {}, []
    for title in ("decode", "train", "sample", "load"):
        results[title] = ratios(title, arguments.json)
        if arguments.check and (lost := fallen(results[title], stored[title])):
            again = ratios(title, arguments.json)
            failures += [
                f"{title}, {name}: {again.get(name, 0.0):.2f} times the baseline, {stored[title][name]:.2f} before"
                for name in fallen(again, {name: stored[title][name] for name in lost})
            ]
    if arguments.store:
        rounded = {title: {name: round(ratio, 2) for name, ratio in of.items()} for title, of in results.items()}
        REFERENCE.write_text(json.dumps(rounded, indent=2) + "\n")
    for failure in failures:
        print(f"lost a third: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
