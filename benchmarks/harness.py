"""Timing side by side: every case in turn, several rounds, the best of each; then a table and a JSON file."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_diffusion.evaluation import environment


def best_seconds(
    cases: dict[str, Callable[[], Any]],
    rounds: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Shortest seconds of each case. Rounds are interleaved, so that a slow minute hits all cases alike.

    Args:
        warm_up: leave out the first call of each case, which allocates and chooses kernels.
        clock: `time.process_time` for what runs in one thread: then other processes count less.
    """
    best = dict.fromkeys(cases, float("inf"))
    for case in cases.values() if warm_up else ():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            start = clock()
            case()
            best[name] = min(best[name], clock() - start)
    return best


def read_bandwidth() -> float:
    """Bytes per second at which this machine reads a large tensor: the floor under every pass over the weights."""
    weights = torch.ones(2**26)
    seconds = best_seconds({"sum": weights.sum}, rounds=5)["sum"]
    return weights.numel() * weights.element_size() / seconds


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = best_seconds({"product": lambda: left @ right}, rounds=5)["product"]
    return 2 * 1024**3 / seconds


def report(title: str, columns: list[str], rows: list[list[Any]], json_path: Path | None, **extra: Any) -> None:
    """Print a table, and write it with the environment as JSON if a path is given."""
    cells = [columns, *([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    print(f"\n{title}")
    for name, *values in cells:
        padded = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *padded]))
    if json_path is not None:
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        entries = json.loads(json_path.read_text()) if json_path.exists() else []
        json_path.write_text(
            json.dumps([*entries, {"title": title, **environment(), **extra, "table": table}], indent=2)
        )
