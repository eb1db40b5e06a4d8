"""The tables and pictures of a comparison."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_diffusion.evaluation import FrontierPoint, SampleQuality, plot_frontier

from . import papers
from .curves import mean_curve, plot_curves, validation_curve
from .models import NAMES
from .presets import Preset


def write_summary(results: dict[str, Any], preset: Preset, output: Path) -> str:
    """Write results.json, results.md and pictures into `output`, and return the tables.

    Args:
        results: every part by its name, "train-armd-0" and the like.
    """
    tables = [
        perplexities(results),
        strided_orders(results),
        course_of_training(results, preset, output),
        throughput(results),
        frontier(results, output),
    ]
    text = "\n\n".join(table for table in tables if table) + "\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


def of_seeds(results: dict[str, Any], what: str, name: str) -> list[Any]:
    parts = (results.get(f"{what}-{name}-{seed}") for seed in results["seeds"])
    return [part for part in parts if part is not None]


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"### {title}", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def perplexities(results: dict[str, Any]) -> str:
    rows = []
    for name in NAMES:
        trained, validated = of_seeds(results, "train", name), of_seeds(results, "validation", name)
        tested = of_seeds(results, "test", name)
        for label in validated[0] if validated else ():
            if label.startswith("S=") or label == "environment":
                continue

            def figures(parts: list[Any], figure: str, label: str = label) -> list[float]:
                return [part[label]["figures"][figure]["value"] for part in parts]

            exact = "exact" if validated[0][label]["is_exact"] else "bound"
            rows.append(
                [
                    NAMES[name],
                    len(validated),
                    f"{trained[0]['parameters']:,}",
                    f"{trained[0]['training_tokens']:,}",
                    f"{exact}, {label}" if exact not in label else label,
                    mean_and_spread(figures(validated, "nats_per_token"), 3),
                    mean_and_spread(figures(validated, "perplexity")),
                    mean_and_spread(figures(validated, "word_perplexity"), 0),
                    mean_and_spread(figures(tested, "nats_per_token"), 3),
                    mean_and_spread(figures(tested, "perplexity")),
                    mean_and_spread(figures(tested, "word_perplexity"), 0),
                    papers.PERPLEXITY[name],
                ]
            )
    columns = ["model", "seeds", "parameters", "tokens read", "what it is", "validation, nats per token"]
    columns += ["perplexity", "per word", "test, nats per token", "perplexity", "per word", "the paper's perplexity"]
    return markdown("Perplexity", columns, rows) if rows else ""


def strided_orders(results: dict[str, Any]) -> str:
    rows = []
    for split in ("validation", "test"):
        for name in ("armd", "armd_strided", "armd_paper"):
            parts = of_seeds(results, split, name)
            if not parts:
                continue
            labels = [label for label in parts[0] if label != "environment"]
            nats = {label: [part[label]["figures"]["nats_per_token"]["value"] for part in parts] for label in labels}
            first = nats["left to right"]
            row: list[str] = [NAMES[name], split, mean_and_spread(first, 3)]
            for label in labels[1:]:
                row.append(mean_and_spread([value - base for value, base in zip(nats[label], first, strict=True)], 3))
            rows.append(row)
            columns = ["model", "text", "left to right, nats per token", *(f"more at {label}" for label in labels[1:])]
    return markdown("Strided orders, exact", columns, rows) if rows else ""


def course_of_training(results: dict[str, Any], preset: Preset, output: Path) -> str:
    """Validation loss of the weights as they are after a third, two thirds and all of the steps."""
    curves = {}
    for name in NAMES:
        folders = (output / f"{name}-{seed}" for seed in results["seeds"] if f"train-{name}-{seed}" in results)
        found = [curve for curve in map(validation_curve, folders) if curve]
        if found and name != "armd_strided":  # which begins where another ends
            curves[name] = found
    if not curves:
        return ""
    plot_curves(curves, preset.shared["batch_size"] * preset.shared["text_length"], output / "curves.svg")
    shares = {"a third": 1 / 3, "two thirds": 2 / 3, "all": 1.0}
    rows = []
    for name, found in curves.items():
        mean = mean_curve(found)
        row: list[Any] = [NAMES[name]]
        for share in shares.values():
            nearest = min(mean, key=lambda step: abs(step - share * preset.shared["steps"]))
            row.append(f"{mean[nearest]:.3f}")
        rows.append([*row, papers.TRAINING.get(name.removesuffix("_paper"), "")])
    columns = ["model", *(f"after {share}" for share in shares), "the paper's steps"]
    return markdown("Validation loss in training, nats per token, weights not averaged", columns, rows)


def throughput(results: dict[str, Any]) -> str:
    speeds = {name: value for name, value in results["throughput"].items() if name in NAMES}
    base = speeds["autoregressive"]
    rows = [[NAMES[name], f"{speed:.0f}", f"{speed / base:.2f}"] for name, speed in speeds.items()]
    return markdown("Training", ["model", "tokens per CPU second", "of the autoregressive model's"], rows)


def frontier(results: dict[str, Any], output: Path) -> str:
    """The mean over seeds of every point."""
    by_point: dict[tuple[str, float], list[dict[str, Any]]] = {}
    written: dict[str, Any] = {}
    for name in NAMES:
        for part in of_seeds(results, "frontier", name):
            written = part["references"]
            for point in part["points"]:
                by_point.setdefault((point["series"], point["temperature"]), []).append(point)
    if not by_point:
        return ""

    def mean(points: list[dict[str, Any]], read: Callable[[dict[str, Any]], float]) -> float:
        return statistics.fmean(map(read, points))

    rows, drawn = [], []
    for (series, temperature), points in by_point.items():
        quality = {
            figure: mean(points, lambda point, figure=figure: point["quality"][figure])  # type: ignore[misc]
            for figure in ("generative_perplexity", "unigram_entropy", "mauve")
        }
        distinct = mean(points, lambda point: point["quality"]["distinct"]["2"])
        nfe, speed = (mean(points, lambda p, name=name: p[name]) for name in ("nfe", "tokens_per_second"))  # type: ignore[misc]
        of_family = papers.GENERATION.get(series.split(",")[0].lower(), "")
        paper = papers.GENERATION.get(series.replace("ARMD", "armd"), of_family)
        cells = [f"{quality['generative_perplexity']:.0f}", f"{quality['unigram_entropy']:.3f}"]
        cells += [f"{distinct:.3f}", f"{quality['mauve']:.3f}", f"{nfe:.1f}", f"{speed:.0f}"]
        rows.append([series, temperature, *cells, paper if temperature == 1.0 else ""])
        of_point = SampleQuality(
            generative_perplexity=quality["generative_perplexity"],
            num_judged_tokens=sum(point["quality"]["num_judged_tokens"] for point in points),
            unigram_entropy=quality["unigram_entropy"],
            distinct={2: distinct},
            mauve=quality["mauve"],
            num_texts=sum(point["quality"]["num_texts"] for point in points),
        )
        drawn.append(FrontierPoint(series, temperature, nfe, speed, of_point))
    plot_frontier(drawn, output / "frontier.svg")
    cells = [f"{written['generative_perplexity']:.0f}", f"{written['unigram_entropy']:.3f}"]
    rows.append(["the validation text itself", "", *cells, f"{written['distinct']['2']:.3f}", "", "", "", ""])
    columns = ["model", "temperature", "generative perplexity", "unigram entropy", "distinct 2-grams", "MAUVE"]
    columns += ["passes", "tokens per CPU second", "the paper's perplexity (entropy)"]
    return markdown("Generation", columns, rows)
