"""The tables and pictures of a comparison."""

import json
import statistics
from collections.abc import Sequence
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
        perplexities(results, preset),
        strided_orders(results),
        course_of_training(results, preset, output),
        throughput(results),
        frontier(results, preset, output),
    ]
    text = "\n\n".join(table for table in tables if table) + "\n"
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


def of_seeds(results: dict[str, Any], what: str, name: str) -> list[Any]:
    parts = (results.get(f"{what}-{name}-{seed}") for seed in results["seeds"])
    return [part for part in parts if part is not None]


def mean_and_spread(values: Sequence[float], digits: int = 2, errors: Sequence[float] = ()) -> str:
    """Mean, the standard deviation over seeds if there are several, and in brackets a seed's own standard error.

    Args:
        errors: of every seed's value, which other draws would change; their mean is shown.
    """
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{text} ({statistics.fmean(errors):.{digits}f})" if errors else text


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    table = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return "\n".join([f"### {title}", "", *([note, ""] if note else []), *table])


FIGURES = {"nats_per_token": 3, "perplexity": 2, "word_perplexity": 0, "bits_per_byte": 3}
"""Of a text, with the digits that are shown."""


def perplexities(results: dict[str, Any], preset: Preset) -> str:
    rows = []
    for name in NAMES:
        trained, validated = of_seeds(results, "train", name), of_seeds(results, "validation", name)
        tested = of_seeds(results, "test", name)
        for label in validated[0] if validated else ():
            if label.startswith("S=") or label == "environment":
                continue
            exact = "exact" if validated[0][label]["is_exact"] else "bound"
            row = [NAMES[name], len(validated), f"{trained[0]['parameters']:,}"]
            row += [f"{tokens_read(name, trained[0], preset):,}", f"{exact}, {label}" if exact not in label else label]
            for parts in (validated, tested):
                for figure, digits in FIGURES.items():
                    found = [part[label]["figures"][figure] for part in parts]
                    errors = [seed["standard_error"] for seed in found if "standard_error" in seed]
                    row.append(mean_and_spread([seed["value"] for seed in found], digits, errors))
            rows.append([*row, papers.PERPLEXITY[name]])
    of_text = ["perplexity", "per word", "bits per byte"]
    columns = ["model", "seeds", "parameters", "tokens read", "what it is", "validation, nats per token", *of_text]
    columns += ["test, nats per token", *of_text, "the paper's perplexity"]
    note = "± is the standard deviation over seeds. In brackets: a seed's standard error, of a bound from its draws."
    return markdown("Perplexity", columns, rows, note) if rows else ""


def tokens_read(name: str, trained: dict[str, Any], preset: Preset) -> int:
    """In training; the strided phase goes on from a model that has read as many as the others."""
    if name != "armd_strided":
        return trained["training_tokens"]
    return trained["training_tokens"] * (preset.shared["steps"] + preset.strided_steps) // preset.strided_steps


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
    """Validation loss of the weights as they are at the evaluations nearest to a third, two thirds and all steps."""
    curves = {}
    for name in NAMES:
        folders = (output / f"{name}-{seed}" for seed in results["seeds"] if f"train-{name}-{seed}" in results)
        found = [curve for curve in map(validation_curve, folders) if curve]
        if found and name != "armd_strided":  # which begins where another ends
            curves[name] = found
    if not curves:
        return ""
    plot_curves(curves, preset.shared["batch_size"] * preset.shared["text_length"], output / "curves.svg")
    shares = {"about a third": 1 / 3, "about two thirds": 2 / 3, "all": 1.0}
    rows = []
    for name, found in curves.items():
        mean = mean_curve(found)
        row: list[Any] = [NAMES[name]]
        for share in shares.values():
            nearest = min(mean, key=lambda step: abs(step - share * preset.shared["steps"]))
            row.append(f"{mean[nearest]:.3f} (step {nearest})")
        rows.append([*row, papers.TRAINING.get(name.removesuffix("_paper"), "")])
    columns = ["model", *(f"after {share}" for share in shares), "the paper's steps"]
    return markdown("Validation loss in training, nats per token, weights not averaged", columns, rows)


def throughput(results: dict[str, Any]) -> str:
    speeds = results["throughput"]["tokens_per_second"]
    base = speeds["autoregressive"]
    rows = [[NAMES[name], f"{speed:.0f}", f"{speed / base:.2f}"] for name, speed in speeds.items()]
    columns = ["model", tokens_per_second([results["throughput"]]), "of the autoregressive model's"]
    return markdown("Training", columns, rows)


def tokens_per_second(parts: Sequence[dict[str, Any]]) -> str:
    """What the tokens per second of parts are: on a CPU its own time is taken, which other work does not lengthen."""
    return "tokens per CPU second" if all(part["device"] == "cpu" for part in parts) else "tokens per second"


def frontier(results: dict[str, Any], preset: Preset, output: Path) -> str:
    """The mean over seeds of every point."""
    by_point: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for name in NAMES:
        for points in of_seeds(results, "frontier", name):
            for point in points:
                by_point.setdefault((point["series"], point["temperature"]), []).append(point)
    if not by_point:
        return ""
    rows, drawn = [], []
    for (series, temperature), points in by_point.items():
        of_family = papers.GENERATION.get(series.split(",")[0].lower(), "")
        paper = papers.GENERATION.get(series.replace("ARMD", "armd"), of_family) if temperature == 1.0 else ""
        passes, speed = (statistics.fmean(point[name] for point in points) for name in ("nfe", "tokens_per_second"))
        qualities = [point["quality"] for point in points]
        rows.append([series, temperature, *of_qualities(qualities), f"{passes:.1f}", f"{speed:.0f}", paper])
        drawn.append(FrontierPoint(series, temperature, passes, speed, mean_quality(qualities)))
    plot_frontier(drawn, output / "frontier.svg")
    references = results["references"]
    rows.append(["the validation text itself", "", *of_qualities([references["quality"]]), "", "", ""])
    columns = ["model", "temperature", "generative perplexity", "unigram entropy", "distinct 2-grams", "MAUVE", "empty"]
    columns += ["passes", tokens_per_second([point for points in by_point.values() for point in points])]
    columns += ["the paper's perplexity (entropy)"]
    note = (
        f"{preset.num_samples} texts of {preset.shared['text_length']} tokens for each point and seed, ± the standard "
        f"deviation over seeds. MAUVE of so few, from a cluster for every ten texts, tells only large differences."
    )
    return markdown(f"Generation, judged by {references['judge']}", columns, rows, note)


def of_qualities(qualities: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of a row; what could not be measured is empty."""
    digits = {"generative_perplexity": 0, "unigram_entropy": 3, "distinct": 3, "mauve": 2}
    cells = [mean_and_spread(measured(qualities, figure), digits[figure]) for figure in digits]
    return [*cells, str(sum(quality["num_empty"] for quality in qualities))]


def measured(qualities: Sequence[dict[str, Any]], figure: str) -> list[float]:
    """Of seeds that have it; of distinct n-grams, pairs."""
    found = [quality[figure]["2"] if figure == "distinct" else quality[figure] for quality in qualities]
    return [value for value in found if value is not None]


def mean_quality(qualities: Sequence[dict[str, Any]]) -> SampleQuality:
    """Over seeds; numbers of texts and tokens are sums."""

    def mean(figure: str) -> float | None:
        values = measured(qualities, figure)
        return statistics.fmean(values) if values else None

    def total(name: str) -> int:
        return sum(quality[name] for quality in qualities)

    return SampleQuality(
        generative_perplexity=mean("generative_perplexity"),
        num_judged_tokens=total("num_judged_tokens"),
        unigram_entropy=mean("unigram_entropy"),
        distinct={2: mean("distinct")},
        mauve=mean("mauve"),
        num_texts=total("num_texts"),
        num_empty=total("num_empty"),
    )
