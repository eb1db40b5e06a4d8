"""What the models of a comparison write, by temperature and number of passes, under one judge."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion.evaluation import DrawnTexts, Judge, draw_texts, judge_drawn, measure_samples, reference_pieces
from hf_diffusion.evaluation.frontier import time_when_done
from hf_diffusion.evaluation.samples import check_mauve
from hf_diffusion.evaluation.text_likelihood import fingerprint

from .models import NAMES, AutoregressiveScorer
from .parts import part
from .presets import Preset


BATCH_SIZE = 16


def series_of(name: str, preset: Preset) -> dict[str, dict[str, Any]]:
    """Settings of `generate` by series, with the best cache that the model has; none for models that do not take part.

    Masked diffusion has no exact cache. Its steps that reveal nothing take no pass.
    """
    if name == "autoregressive":
        return {NAMES[name]: {}}
    if name == "armd_strided":
        return {f"ARMD, S={s}": {"strategy": "strided", "num_streams": s} for s in preset.num_streams}
    if name in ("mdlm", "lomdm"):
        in_steps = {
            f"{NAMES[name]}, {steps} steps": {"strategy": "ancestral", "max_denoising_steps": steps}
            for steps in preset.denoising_steps
        }
        return {**in_steps, f"{NAMES[name]}, a token a pass": {"strategy": "first_hitting"}}
    return {}


class Frontier:
    """The points of all models. Those of one judge have a folder of their own, a file for each.

    An end of text is a token like others here.

    Args:
        parts: folder of the comparison's parts.
        tokenizer: of the models.
        judge: folder or Hub name of a causal model.
        reference: a text, of which pieces as long as what is drawn are spread evenly.
    """

    def __init__(self, parts: Path, preset: Preset, tokenizer: Any, judge: str, reference: str, device: str) -> None:
        check_mauve()
        self.preset, self.tokenizer, self.device = preset, tokenizer, device
        model = AutoModelForCausalLM.from_pretrained(judge).eval().to(device)
        self.judge = Judge(model, AutoTokenizer.from_pretrained(judge))
        self.judge_name = f"{Path(judge).name}-{fingerprint(model)[:8]}"
        self.folder = parts / f"frontier-{self.judge_name}"
        self.pieces = reference_pieces(tokenizer, reference, preset.shared["text_length"], preset.num_samples)
        self.judged_pieces = self.judge.read(self.pieces)

    def references(self) -> dict[str, Any]:
        """The same figures of what people wrote."""

        def compute() -> dict[str, Any]:
            ids = [self.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in self.pieces]
            digest = hashlib.sha256("\n".join(self.pieces).encode()).hexdigest()
            quality = asdict(measure_samples(ids, self.pieces, self.judge))
            return {"judge": self.judge_name, "pieces": digest, "quality": quality}

        return part(self.folder / "references.json", compute)

    def points(self, name: str, seed: int, load: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        """
        Args:
            load: gives the trained model, and is called if a point of it is missing.
        """
        load_once = cache(load)
        for series, settings in series_of(name, self.preset).items():
            for temperature in self.preset.temperatures:
                draw = partial(self._draw, name, load_once, temperature, settings)
                yield self._point(series, temperature, seed, draw)

    def _point(self, series: str, temperature: float, seed: int, draw: Callable[[], DrawnTexts]) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            point = judge_drawn(series, temperature, draw(), self.tokenizer, self.judge, self.judged_pieces)
            return {**asdict(point), "judge": self.judge_name, "device": self.device}

        name = series.lower().replace(", ", "-").replace(" ", "-")
        return part(self.folder / f"{name}-at-{temperature}-seed-{seed}.json", compute)

    def _draw(self, name: str, load: Callable[[], Any], temperature: float, settings: dict[str, Any]) -> DrawnTexts:
        num_texts, length = self.preset.num_samples, self.preset.shared["text_length"]
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        if name == "autoregressive":
            return draw_autoregressively(load(), num_texts, length, BATCH_SIZE, clock, temperature)
        settings = {"temperature": temperature, "eos_token_id": None, **settings}
        return draw_texts(load(), num_texts, length, batch_size=BATCH_SIZE, clock=clock, **settings)


@torch.no_grad()
def draw_autoregressively(
    scorer: AutoregressiveScorer,
    num_texts: int,
    length: int,
    batch_size: int,
    clock: Callable[[], float],
    temperature: float,
) -> DrawnTexts:
    """By transformers' own `generate`, with its cache, from the start token."""
    token_ids, seconds = [], 0.0
    torch.manual_seed(0)
    for first in range(0, num_texts, batch_size):
        size = min(batch_size, num_texts - first)
        start = torch.full((size, 1), scorer.config.eos_token_id, device=scorer.model.device)
        started = clock()
        drawn = scorer.model.generate(
            start,
            attention_mask=torch.ones_like(start),  # else `generate` takes the start for padding, and hides it
            max_new_tokens=length,
            do_sample=True,
            top_k=0,
            temperature=temperature,
            eos_token_id=None,
        )
        seconds += time_when_done(start.device, clock) - started
        token_ids += drawn[:, 1:].tolist()
    return DrawnTexts(token_ids, length, sum(map(len, token_ids)) / seconds)
