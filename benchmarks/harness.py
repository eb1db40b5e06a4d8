"""Timing side by side: every case in turn, several rounds, the best of each; then a table and a JSON file."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_diffusion.evaluation import environment


def shape_parser(
    doc: str | None, hidden_size: int, layers: int, heads: int, vocab_size: int
) -> argparse.ArgumentParser:
    """Arguments of a benchmark for models of any shape, with the shape that it has if none is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=hidden_size)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--seed", type=int, default=0, help="of weights and of what is drawn")
    parser.add_argument("--json", type=Path)
    return parser


def read_shape(arguments: argparse.Namespace) -> dict[str, int]:
    """Settings of a config, from the arguments of a `shape_parser`."""
    return {
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "vocab_size": arguments.vocab_size,
    }


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


@dataclass(frozen=True)
class Ceilings:
    """
    Attributes:
        bytes_per_second: at which this machine reads a large tensor.
        operations_per_second: floating-point operations of a large matrix product.
    """

    bytes_per_second: float
    operations_per_second: float

    def floor(self, num_bytes: float, operations: float) -> tuple[float, str]:
        """Seconds below which nothing can be done that moves and computes so much, and which of the two it is."""
        moving, computing = num_bytes / self.bytes_per_second, operations / self.operations_per_second
        return (moving, "bytes") if moving >= computing else (computing, "operations")


def measure_ceilings(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    weights = torch.ones(2**26)
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = best_seconds({"sum": weights.sum, "product": lambda: left @ right}, rounds=3, clock=clock)
    return Ceilings(weights.numel() * weights.element_size() / seconds["sum"], 2 * 1024**3 / seconds["product"])


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        run: what is timed.
        num_bytes: that must move at least, of weights and files; what stays in caches is not counted.
        operations: floating-point operations that must run, of matrix products.
        tokens: that are written or read; 0 if it is about none.
    """

    run: Callable[[], Any]
    num_bytes: float
    operations: float
    tokens: int = 0


@dataclass(frozen=True)
class SideBySide:
    """
    Attributes:
        baseline: name of the case that the others are compared with.
        ceilings: of the machine, in the same minutes.
        rows: by case: "seconds", "tokens/s" where there are any, "x baseline" (how many times as fast), "share of
            limit" (the seconds that the ceilings allow, divided by those that it took), and "limit" (by which ceiling).
    """

    baseline: str
    ceilings: Ceilings
    rows: dict[str, dict[str, Any]]

    def report(self, title: str, arguments: dict[str, Any], json_path: Path | None) -> None:
        """Print a table and the ceilings, and add both to a JSON file with what they depend on.

        Args:
            arguments: of the script, its seed among them.
        """
        columns = [f"case (baseline: {self.baseline})", *next(iter(self.rows.values()))]
        ceilings = asdict(self.ceilings)
        table = [[name, *row.values()] for name, row in self.rows.items()]
        report(title, columns, table, json_path, arguments=arguments, ceilings=ceilings)
        print(
            f"limits: {self.ceilings.bytes_per_second / 1e9:.1f} GB and "
            f"{self.ceilings.operations_per_second / 1e9:.1f} billion operations a second"
        )


def side_by_side(
    cases: dict[str, Case], baseline: str, rounds: int, dtype: torch.dtype, clock: Callable[[], float]
) -> SideBySide:
    """Time cases. Ceilings are measured before and after, and the higher ones taken."""
    before = measure_ceilings(dtype, clock)
    seconds = best_seconds({name: case.run for name, case in cases.items()}, rounds, clock=clock)
    after = measure_ceilings(dtype, clock)
    ceilings = Ceilings(
        max(before.bytes_per_second, after.bytes_per_second),
        max(before.operations_per_second, after.operations_per_second),
    )
    rows = {}
    for name, case in cases.items():
        floor, limit = ceilings.floor(case.num_bytes, case.operations)
        row: dict[str, Any] = {"seconds": seconds[name]}
        if case.tokens:
            row["tokens/s"] = case.tokens / seconds[name]
        row |= {
            "x baseline": seconds[baseline] / seconds[name],
            "share of limit": floor / seconds[name],
            "limit": limit,
        }
        rows[name] = row
    return SideBySide(baseline, ceilings, rows)


def matrix_weights(shape: dict[str, int], layers: float | None = None, head: bool = True) -> float:
    """Weights that a row of a text is multiplied with, two operations each: 12 widths squared a layer, and the head's.

    Args:
        shape: `hidden_size`, `num_hidden_layers`, `vocab_size`.
        layers: of them, if not all.
    """
    width = shape["hidden_size"]
    in_layers = 12 * width**2 * (shape["num_hidden_layers"] if layers is None else layers)
    return in_layers + head * width * shape["vocab_size"]


def armd_weights(shape: dict[str, int]) -> tuple[float, float]:
    """Weights that a content row and a query row of ARMD are multiplied with, but for the head's.

    In the lower half of an even number of layers, keys and values (two widths squared of twelve) are the content
    rows'. In the last layer there these do nothing else; in the upper half there are none.
    """
    half, square = shape["num_hidden_layers"] // 2, shape["hidden_size"] ** 2
    return square * (12 * half - 10), square * (10 + 12) * half


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
            json.dumps([*entries, {"title": title, **environment(), **extra, "table": table}], indent=2, default=str)
        )
