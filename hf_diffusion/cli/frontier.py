"""`hf-diffusion frontier`: how good a model's texts are, by temperature and number of passes, in a table or picture."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..evaluation.environment import environment
from ..evaluation.finished_parts import FinishedParts
from ..evaluation.frontier import FrontierPoint, check_picture, draw_texts, judge_drawn, plot_frontier, reference_pieces
from ..evaluation.judge import Judge
from ..evaluation.samples import SampleQuality, check_mauve
from ..evaluation.text_likelihood import fingerprint
from .devices import check_device
from .evaluate import add_model_arguments, load_model


OF_PASSES = ("num_streams", "max_denoising_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--judge", required=True, help="folder or Hub name of a causal language model")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.0], help="of sampling")
    parser.add_argument("--strategy", help="which positions come next (default: what the model has for the passes)")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--num-streams", type=int, nargs="+", help='streams in parallel, with "strided"')
    passes.add_argument("--max-denoising-steps", type=int, nargs="+", help="steps in which a text is drawn")
    parser.add_argument("--num-texts", type=int, default=64, help="for every point (default: 64)")
    parser.add_argument("--length", type=int, help="tokens of a text (default: the model's context)")
    parser.add_argument("--references", type=Path, help="a file of plain text, whose pieces are compared by MAUVE")
    parser.add_argument("--seed", type=int, default=0, help="of the first text of every point (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts drawn together (default: 16)")
    parser.add_argument("--picture", type=Path, help="draw the frontier: a .png, .svg or .pdf file")
    parser.add_argument("--json", type=Path, help="write the results here; what is interrupted goes on from beside it")


def run(arguments: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    check_device(arguments.device)
    for name in ("num_texts", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(arguments, name)}.")
    for name in ("json", "picture"):
        path = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"`{name}`={str(path)!r}: there is no such folder. Make it first.")
        if path is not None and path.is_dir():
            raise ValueError(f"`{name}`={str(path)!r} is a folder. Name a file in it.")
    if arguments.picture is not None:
        check_picture(arguments.picture)
    if arguments.references is not None:
        check_mauve()
    model, tokenizer = load_model(arguments)
    length = model.config.max_position_embeddings if arguments.length is None else arguments.length
    pieces = None
    if arguments.references is not None:
        text = arguments.references.read_text(encoding="utf-8")
        pieces = reference_pieces(tokenizer, text, length, arguments.num_texts)
    judge_model = AutoModelForCausalLM.from_pretrained(arguments.judge).eval().to(arguments.device)
    judge = Judge(judge_model, AutoTokenizer.from_pretrained(arguments.judge), arguments.batch_size)
    references = None if pieces is None else judge.read(pieces)

    described: dict[str, Any] = {
        "model": arguments.model,
        "model_weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "judge": arguments.judge,
        "judge_weights": fingerprint(judge_model),
        "references": None if arguments.references is None else str(arguments.references),
        "reference_pieces": None if pieces is None else hashlib.sha256("\n".join(pieces).encode()).hexdigest(),
        "series": series_of(arguments),
        "length": length,
        **{name: getattr(arguments, name) for name in ("num_texts", "temperatures", "seed", "device")},
    }
    parts_file = None if arguments.json is None else arguments.json.with_name(arguments.json.name + ".parts")
    finished = FinishedParts(parts_file, described)
    wanted = [(name, fields, t) for name, fields in series_of(arguments).items() for t in arguments.temperatures]
    for number, (name, fields, temperature) in enumerate(tqdm(wanted, unit="point")):
        if number in finished.parts:
            continue
        fields = {"temperature": temperature, **fields}
        drawn = draw_texts(model, arguments.num_texts, length, arguments.seed, arguments.batch_size, **fields)
        finished.add(number, asdict(judge_drawn(name, temperature, drawn, tokenizer, judge, references)))
    points = [point_of(finished.parts[number]) for number in range(len(wanted))]
    print_table(points)
    if arguments.picture is not None:
        plot_frontier(points, arguments.picture, max(arguments.temperatures))
    if arguments.json is not None:
        described |= {"points": list(map(asdict, points)), "environment": environment()}
        arguments.json.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    finished.remove_file()


def series_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Settings of `generate` by the name of a series: one for every number of streams, or of steps."""
    strategy: dict[str, Any] = {} if arguments.strategy is None else {"strategy": arguments.strategy}
    if arguments.num_streams is not None:
        strategy = {"strategy": "strided", **strategy}
    for field in OF_PASSES:
        if getattr(arguments, field) is not None:
            numbers = getattr(arguments, field)
            words = field.removeprefix("num_").removeprefix("max_").replace("_", " ")
            return {f"{number} {words}": {**strategy, field: number} for number in numbers}
    return {arguments.strategy or "the model's own strategy": strategy}


def point_of(part: dict[str, Any]) -> FrontierPoint:
    quality = part["quality"]
    distinct = {int(n): share for n, share in quality["distinct"].items()}  # JSON has no integers for names
    return FrontierPoint(**{**part, "quality": SampleQuality(**{**quality, "distinct": distinct})})


def print_table(points: list[FrontierPoint]) -> None:
    print(f"{'':>24}  temp.  gen. perplexity  entropy  distinct 2  MAUVE  passes  tokens/s  empty")
    for point in points:
        quality = point.quality
        print(
            f"{point.series:>24}  {point.temperature:5.2f}  {shown(quality.generative_perplexity, 1):>15}  "
            f"{shown(quality.unigram_entropy, 3):>7}  {shown(quality.distinct[2], 3):>10}  "
            f"{shown(quality.mauve, 2):>5}  {point.nfe:6.1f}  {point.tokens_per_second:8.1f}  {quality.num_empty:5}"
        )


def shown(value: float | None, digits: int) -> str:
    """What could not be measured is left empty."""
    return "" if value is None else f"{value:.{digits}f}"


__all__ = ["add_arguments", "run"]
