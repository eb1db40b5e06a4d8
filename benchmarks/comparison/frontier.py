"""What the models of a comparison write, by temperature and number of passes, under one judge."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion.evaluation import DrawnTexts, Judge, draw_texts, judge_drawn, measure_samples, reference_pieces

from .models import NAMES, AutoregressiveScorer
from .presets import Preset


def points(name: str, preset: Preset) -> dict[str, dict[str, Any]]:
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
        seconds += clock() - started
        token_ids += drawn[:, 1:].tolist()
    return DrawnTexts(token_ids, length, sum(map(len, token_ids)) / seconds)


def draw_and_judge(
    name: str, model: Any, tokenizer: Any, preset: Preset, judge_name: str, reference: str, device: str
) -> dict[str, Any]:
    """Every point of a model's frontier, and what people wrote. An end of text is a token like others here.

    Args:
        reference: a text, of which pieces as long as what is drawn are spread evenly.
    """
    judge = Judge(
        AutoModelForCausalLM.from_pretrained(judge_name).eval().to(device), AutoTokenizer.from_pretrained(judge_name)
    )
    length, batch_size = preset.shared["text_length"], min(16, preset.num_samples)
    clock = time.process_time if device == "cpu" else time.perf_counter
    references = reference_pieces(tokenizer, reference, length, preset.num_samples)
    found = []
    for series, settings in points(name, preset).items():
        for temperature in preset.temperatures:
            if name == "autoregressive":
                drawn = draw_autoregressively(model, preset.num_samples, length, batch_size, clock, temperature)
            else:
                drawn = draw_texts(
                    model,
                    preset.num_samples,
                    length,
                    batch_size=batch_size,
                    clock=clock,
                    temperature=temperature,
                    eos_token_id=None,
                    **settings,
                )
            found.append(asdict(judge_drawn(series, temperature, drawn, tokenizer, judge, references)))
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in references]
    return {"judge": judge_name, "points": found, "references": asdict(measure_samples(ids, references, judge))}
