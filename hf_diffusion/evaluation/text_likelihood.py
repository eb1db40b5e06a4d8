"""The likelihood of a text of any length, per token, per word and per byte, so that tokenizers can be compared."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from .finished_parts import FinishedParts
from .windows import Window, cut_windows


@dataclass(frozen=True)
class TextLikelihood:
    """
    Attributes:
        log_likelihood: of the whole text in nats, windows taken to be independent; a lower bound unless `is_exact`.
        standard_error: of an estimated bound, in nats; None if exact.
        num_tokens, num_bytes: of the text.
        num_words: words with line ends, which published word-level perplexities of WikiText divide by.
        num_unknown_tokens: what the tokenizer could not spell. If there are any, likelihoods per word and byte are
            those of a text that says less.
        num_windows, window, stride: how the text was read (see `cut_windows`).
        is_exact, estimator, sampler: as in `Likelihood`.
        nfe: forward passes.
    """

    log_likelihood: float
    standard_error: float | None
    num_tokens: int
    num_words: int
    num_bytes: int
    num_unknown_tokens: int
    num_windows: int
    window: int
    stride: int | None
    is_exact: bool
    estimator: str
    sampler: str
    nfe: int

    def figures(self) -> dict[str, dict[str, float]]:
        """What is reported, by name: "value", and "standard_error" of bounds (to first order, in `exp`)."""
        error = 0.0 if self.standard_error is None else self.standard_error
        nats = -self.log_likelihood
        per_token, per_word = nats / self.num_tokens, nats / max(self.num_words, 1)
        values = {
            "nats_per_token": (per_token, error / self.num_tokens),
            "perplexity": (_exp(per_token), _exp(per_token) * error / self.num_tokens),
            "word_perplexity": (_exp(per_word), _exp(per_word) * error / max(self.num_words, 1)),
            "bits_per_byte": (nats / math.log(2) / self.num_bytes, error / math.log(2) / self.num_bytes),
        }
        if self.is_exact:
            return {name: {"value": value} for name, (value, _) in values.items()}
        return {name: {"value": value, "standard_error": error} for name, (value, error) in values.items()}


def evaluate_text(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    parts_file: str | Path | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> TextLikelihood:
    """Score a text in windows.

    Args:
        model: one of this package's, in evaluation mode.
        tokenizer: that belongs to it. What looks like a special token in the text is text, and none are added.
        text: of one token at least.
        window: most tokens that are read together; the model's context if not given.
        stride: tokens scored in every window but the first; the rest is given, which makes for a better likelihood and
            more passes. None for windows that do not overlap.
        batch_size: windows read together. The result does not depend on it but for rounding.
        seed: of the first window's draws; the next one has the next seed.
        parts_file: keeps what is finished, from which an interrupted evaluation goes on. It stays when all is
            finished: delete it once the result is safe.
        settings: of `model.score`: strategy, `num_draws`, `estimator`, ... What is scored of the last window may be
            fewer tokens than `num_streams`; it then has as many streams as tokens.

    Raises:
        ValueError: for a text without tokens, a window beyond the context, more streams than a window has tokens to
            score, parts of other settings, and whatever `score` refuses.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    context = model.config.max_position_embeddings
    window = context if window is None else window
    if window > context:
        raise ValueError(f"`window` ({window}) is more than the model's context ({context} tokens). Lower it.")
    num_streams, num_scored = settings.get("num_streams"), window if stride is None else stride
    if num_streams is not None and num_streams > num_scored:
        name = "window" if stride is None else "stride"
        raise ValueError(
            f"`num_streams` ({num_streams}) is more than the {num_scored} tokens that are scored of a window. "
            f"Lower it, or raise `{name}`."
        )
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    windows = cut_windows(len(ids), window, stride)
    described = {
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": hashlib.sha256(str(ids).encode()).hexdigest(),
        "model": fingerprint(model),
        "window": window,
        "stride": stride,
        "seed": seed,
        "settings": settings,
    }
    finished = FinishedParts(None if parts_file is None else Path(parts_file), described)
    tokens = torch.tensor(ids)
    with tqdm(total=len(windows), initial=len(finished.parts), unit="window", disable=not show_progress) as bar:
        for numbers in _batches(windows, finished.parts, batch_size):
            batch = torch.stack([tokens[windows[number].start : windows[number].end] for number in numbers])
            labels = batch.clone()
            labels[:, : windows[numbers[0]].scored_from - windows[numbers[0]].start] = -100
            seeds, num_scored = [seed + number for number in numbers], int((labels[0] != -100).sum())
            of_batch = settings
            if num_streams is not None:
                of_batch = {**settings, "num_streams": min(num_streams, num_scored)}
            scored = model.score(batch, labels=labels, seed=seeds, **of_batch)
            for row, number in enumerate(numbers):
                error = 0.0 if scored.standard_error is None else float(scored.standard_error[row])
                part = {
                    "log_likelihood": float(scored.log_likelihood[row]),
                    "standard_error": error,
                    "num_tokens": int(scored.num_tokens[row]),
                    # Passes are made for a batch.
                    "nfe": scored.nfe if row == 0 else 0,
                    "is_exact": scored.is_exact,
                    "estimator": scored.estimator,
                    "sampler": scored.sampler,
                }
                finished.add(number, part)
            bar.update(len(numbers))
    parts = [finished.parts[number] for number in range(len(windows))]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return TextLikelihood(
        log_likelihood=math.fsum(part["log_likelihood"] for part in parts),
        standard_error=None if parts[0]["is_exact"] else math.hypot(*(part["standard_error"] for part in parts)),
        num_tokens=sum(part["num_tokens"] for part in parts),
        num_words=len(text.split()) + text.count("\n"),
        num_bytes=len(text.encode()),
        num_unknown_tokens=0 if unknown is None else ids.count(unknown),
        num_windows=len(windows),
        window=window,
        stride=stride,
        is_exact=parts[0]["is_exact"],
        estimator=parts[0]["estimator"],
        sampler=parts[0]["sampler"],
        nfe=sum(part["nfe"] for part in parts),
    )


def fingerprint(model: Any) -> str:
    """Of what a score depends on besides the text: weights, configuration, and the version of this package.

    Two models that differ have different ones, but for an unlikely accident.
    """
    from .. import __version__

    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps([__version__, config], sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().double().flatten()
        ramp = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {float(flat @ ramp):.6e}".encode())
    return digest.hexdigest()


def _batches(windows: list[Window], finished: dict[int, Any], batch_size: int) -> Iterator[list[int]]:
    """Numbers of windows that are not finished, of one shape in each batch: then nothing is padded."""
    batch: list[int] = []
    shape = None
    for number, window in enumerate(windows):
        if number in finished:
            continue
        of_window = (window.end - window.start, window.scored_from - window.start)
        if batch and (of_window != shape or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(number)
        shape = of_window
    if batch:
        yield batch


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
