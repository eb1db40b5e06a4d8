"""Quality against diversity and passes: the same model drawn from with several temperatures and numbers of passes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .judge import Judge, JudgedTexts
from .samples import SampleQuality, measure_samples


@dataclass(frozen=True)
class DrawnTexts:
    """
    Attributes:
        token_ids: the tokens of every text up to its end, the end token among them.
        nfe: passes that a text took part in, on average.
        tokens_per_second: of the whole batch, tokens after an end not counted.
    """

    token_ids: list[list[int]]
    nfe: float
    tokens_per_second: float


@dataclass(frozen=True)
class FrontierPoint:
    """
    Attributes:
        series: points of one series are joined in pictures.
        temperature: of sampling.
    """

    series: str
    temperature: float
    nfe: float
    tokens_per_second: float
    quality: SampleQuality


def draw_texts(
    model: Any,
    num_texts: int,
    length: int,
    seed: int = 0,
    batch_size: int = 16,
    clock: Callable[[], float] = time.perf_counter,
    **settings: Any,
) -> DrawnTexts:
    """Texts from nothing.

    Args:
        model: one of this package's.
        length: most tokens of a text.
        seed: of the first text; the next one has the next seed.
        clock: `time.process_time` for what runs in one thread beside other processes.
        settings: of `generate`.
    """
    token_ids: list[list[int]] = []
    passes, seconds = 0.0, 0.0
    for start in range(0, num_texts, batch_size):
        size = min(batch_size, num_texts - start)
        nothing = torch.empty(size, 0, dtype=torch.long, device=model.device)
        started = clock()
        output = model.generate(
            nothing,
            max_new_tokens=length,
            seed=[seed + start + row for row in range(size)],
            return_dict_in_generate=True,
            **settings,
        )
        seconds += time_when_done(model.device, clock) - started
        drawn = output.steps >= 0
        token_ids += [row[is_drawn].tolist() for row, is_drawn in zip(output.sequences, drawn, strict=True)]
        passes += float((drawn.sum(dim=1) / output.tokens_per_forward).sum())
    return DrawnTexts(token_ids, passes / num_texts, sum(map(len, token_ids)) / seconds)


def time_when_done(device: torch.device, clock: Callable[[], float]) -> float:
    """What `clock` says once `device` has done all that it was given; an accelerator works on after a call returns."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock()


def judge_drawn(
    series: str,
    temperature: float,
    drawn: DrawnTexts,
    tokenizer: Any,
    judge: Judge,
    references: JudgedTexts | None = None,
) -> FrontierPoint:
    """
    Args:
        tokenizer: of the model that has drawn. End tokens and others that are no text are left out for the judge.
        references: see `measure_samples`.
    """
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in drawn.token_ids]
    quality = measure_samples(drawn.token_ids, texts, judge, references)
    return FrontierPoint(series, temperature, drawn.nfe, drawn.tokens_per_second, quality)


def reference_pieces(tokenizer: Any, text: str, length: int, number: int) -> list[str]:
    """`number` pieces of `length` tokens, spread evenly over a text, for a judge to read.

    Raises:
        ValueError: for a text of fewer tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) < length + number - 1:
        raise ValueError(f"`text` has {len(ids)} tokens, too few for {number} different pieces of {length}.")
    starts = torch.linspace(0, len(ids) - length, number).long().tolist()
    return [tokenizer.decode(ids[start : start + length]) for start in starts]


def check_picture(path: Path) -> None:
    """Whether `plot_frontier` can draw into `path`, before there is anything to draw.

    Raises:
        ValueError: for a format that matplotlib does not write.
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(f"A picture needs matplotlib: pip install 'hf-diffusion[train]'. ({error})") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"`picture`={str(path)!r} has no ending that tells its format. Take one of {sorted(formats)}.")


def plot_frontier(points: Sequence[FrontierPoint], path: Path, num_passes_at: float = 1.0) -> None:
    """Draw perplexity under the judge over entropy, and both over passes, into a picture of the format `path` names.

    Points without perplexity are left out.

    Args:
        num_passes_at: temperature of the points that are drawn over passes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes: dict[str, Any] = figure.subplot_mosaic([["frontier", "perplexity"], ["frontier", "entropy"]])
    points = [point for point in points if point.quality.generative_perplexity is not None]
    names = list(dict.fromkeys(point.series for point in points))
    for number, name in enumerate(names):
        series = sorted((point for point in points if point.series == name), key=lambda point: point.temperature)
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^Dv<>"[number // 10 % 7], "markersize": 4}
        axes["frontier"].plot(_figures(series, "entropy"), _figures(series, "perplexity"), label=name, **style)
        chosen = [point for point in series if point.temperature == num_passes_at]
        for panel in ("perplexity", "entropy"):
            axes[panel].plot([point.nfe for point in chosen], _figures(chosen, panel), **style)
    axes["frontier"].set_xlabel("unigram entropy of a text (nats)")
    axes["frontier"].set_ylabel("generative perplexity (judge's tokens)")
    axes["perplexity"].set_ylabel("generative perplexity")
    for panel in ("frontier", "perplexity"):
        axes[panel].set_yscale("log")
    axes["entropy"].set_ylabel("unigram entropy (nats)")
    axes["entropy"].set_xlabel(f"passes for a text, at temperature {num_passes_at:g}")
    axes["entropy"].sharex(axes["perplexity"])
    axes["entropy"].set_xscale("log", base=2)
    axes["entropy"].xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes["frontier"].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def _figures(points: Sequence[FrontierPoint], name: str) -> list[Any]:
    fields = {"perplexity": "generative_perplexity", "entropy": "unigram_entropy"}
    return [getattr(point.quality, fields[name]) for point in points]


__all__ = [
    "DrawnTexts",
    "FrontierPoint",
    "check_picture",
    "draw_texts",
    "judge_drawn",
    "plot_frontier",
    "reference_pieces",
    "time_when_done",
]
