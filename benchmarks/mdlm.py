"""MDLM beside a plain implementation of the reference's algorithm: forward, training step and sampling, in one run.

    python benchmarks/mdlm.py [--sizes 128x4 512x8] [--batch-sizes 1 8] [--steps 128 1000] [--json mdlm.json]

Random weights, the same on both sides, which are checked to give the same logits and losses. One thread, whose CPU time
is taken. A training step is forward and backward, with half of the tokens masked, which is the mean in training.
Peak memory is what a process of its own takes for it (read from /proc, so on Linux only). Sampling is 128 tokens from
nothing. Our side runs whole. The plain sampler has two kinds of steps, with a pass of the network and without: both are
timed and multiplied by their expected numbers, unless `--whole` lets it run to its end, which may take hours.
"""

import argparse
import math
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from harness import best_seconds, report
from plain_mdlm import PlainMDLM
from transformers.core_model_loading import revert_weight_conversion

from hf_diffusion import MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.diffusion.masking import NoisedText


LENGTH = 128
HEAD_DIM = 64


def random_model(size: str) -> MDLMForMaskedDiffusion:
    """A model of `size`, "<hidden size>x<layers>", that takes every token for as likely as it is in text."""
    hidden_size, num_layers = map(int, size.split("x"))
    config = MDLMConfig(
        hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=hidden_size // HEAD_DIM
    )
    model = MDLMForMaskedDiffusion(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)  # fresh gates are shut, and all fresh predictions the same
        # Zipf's law. The plain sampler misses rare tokens, and with equal ones it would hardly reveal any.
        model.lm_head.bias -= torch.arange(1, config.vocab_size + 1).log()
    return model


def plain_twin(model: MDLMForMaskedDiffusion) -> PlainMDLM:
    """The same weights in the plain implementation."""
    plain = PlainMDLM(model.config)
    plain.load_published(revert_weight_conversion(model, model.state_dict()))
    return plain


def random_text(batch_size: int, mask_token_id: int) -> tuple[torch.Tensor, NoisedText]:
    """Tokens [batch, LENGTH], and the same at evenly spread times."""
    text = torch.randint(mask_token_id, (batch_size, LENGTH))
    t = (torch.arange(batch_size)[:, None] + 0.5) / batch_size
    masked = torch.rand(text.shape).argsort(dim=1) < t * LENGTH
    return text, NoisedText(text.masked_fill(masked, mask_token_id), 1 / t, -torch.log1p(-0.999 * t))


Task = Callable[[], Any]


def tasks_of_ours(model: MDLMForMaskedDiffusion, text: torch.Tensor, noised: NoisedText) -> dict[str, Task]:
    @torch.no_grad()
    def forward() -> None:
        model.eval()(noised.input_ids)

    def training_step() -> None:
        model.train()(text, labels=text, noised=noised).loss.backward()
        model.zero_grad()

    return {"forward": forward, "training step": training_step}


def tasks_of_plain(plain: PlainMDLM, text: torch.Tensor, noised: NoisedText) -> dict[str, Task]:
    @torch.no_grad()
    def forward() -> None:
        plain.eval()(noised.input_ids)

    def training_step() -> None:
        plain.train().loss(text, noised).backward()
        plain.zero_grad()

    return {"forward": forward, "training step": training_step}


@torch.no_grad()
def check_agreement(model: MDLMForMaskedDiffusion, plain: PlainMDLM) -> None:
    """Raise RuntimeError unless both sides compute the same thing: otherwise their times say nothing."""
    text, noised = random_text(1, model.config.mask_token_id)
    model.eval()
    plain.eval()
    logits, expected = model(noised.input_ids).logits, plain(noised.input_ids)
    difference = (logits - expected)[..., : model.config.mask_token_id].abs().max()
    losses = float(model(text, labels=text, noised=noised).loss), float(plain.loss(text, noised))
    if difference > 1e-4 or not math.isclose(*losses, rel_tol=1e-5):
        raise RuntimeError(f"The two sides differ by {difference:.1e} in their logits; their losses are {losses}.")


def memory(name: str) -> int:
    """Bytes of this process that are in memory: now (`VmRSS`) or at most so far (`VmHWM`)."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_memory(size: str, batch_size: int, side: str, task: str) -> float:
    """MiB that a task takes at its peak, above what the process held before. To be run in a process of its own."""
    torch.set_num_threads(1)
    model = random_model(size)
    if side == "plain":
        model = plain_twin(model)
    mask_token_id = MDLMConfig().mask_token_id
    make_tasks = tasks_of_plain if side == "plain" else tasks_of_ours
    text, noised = random_text(1, mask_token_id)
    short = NoisedText(noised.input_ids[:, :2], noised.weight, noised.sigma)
    make_tasks(model, text[:, :2], short)[task]()  # loads code
    measured = make_tasks(model, *random_text(batch_size, mask_token_id))[task]
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of building the model
    measured()
    return (memory("VmHWM") - before) / 2**20


def in_own_process(function: Callable[..., float], *arguments: Any) -> float:
    # Freed memory goes back to the system at once; if kept, that of building the model would hide the peak.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def passes_and_training(
    size: str, batch_size: int, model: MDLMForMaskedDiffusion, plain: PlainMDLM, rounds: int
) -> list[list[Any]]:
    """Rows of the first table."""
    drawn = random_text(batch_size, model.config.mask_token_id)
    ours, theirs = tasks_of_ours(model, *drawn), tasks_of_plain(plain, *drawn)
    rows = []
    for task in ours:
        seconds = best_seconds({"ours": ours[task], "plain": theirs[task]}, rounds, clock=process_time)
        peak = {side: in_own_process(peak_memory, size, batch_size, side, task) for side in seconds}
        rates = [batch_size * LENGTH / value for value in seconds.values()]
        ratio = seconds["plain"] / seconds["ours"]
        rows.append([f"{task} {size}", batch_size, *rates, ratio, *peak.values(), peak["ours"] / peak["plain"]])
    return rows


def expected_passes(batch_size: int, num_steps: int) -> float:
    """Passes of the plain sampler: at the start, after each step that reveals something in the batch, at the end.

    A position is revealed in each step with the same probability.
    """
    reveals = 1 - (1 - 1 / num_steps) ** (batch_size * LENGTH)
    return 1 + (num_steps - 1) * reveals + 1


def sampling(
    size: str, batch_size: int, model: MDLMForMaskedDiffusion, plain: PlainMDLM, arguments: argparse.Namespace
) -> list[list[Any]]:
    """Rows of the second table."""
    model.eval()
    plain.eval()
    passes: dict[str, int] = {}

    def ours(num_steps: int) -> None:
        output = model.generate(
            strategy="ancestral",
            max_denoising_steps=num_steps,
            max_new_tokens=LENGTH,
            num_return_sequences=batch_size,
            return_dict_in_generate=True,
        )
        passes[f"ours {num_steps}"] = output.nfe

    def whole(num_steps: int) -> None:
        passes[f"plain {num_steps}"] = plain.sample(batch_size, LENGTH, num_steps).passes

    canvas = random_text(batch_size, model.config.mask_token_id)[1].input_ids
    probs, t, s = plain.probs(canvas), torch.tensor(0.5), torch.tensor(0.499)
    cases: dict[str, Task] = {"pass": partial(plain.probs, canvas), "draw": partial(plain.step, canvas, probs, t, s)}
    for num_steps in arguments.steps:
        cases[f"ours {num_steps}"] = partial(ours, num_steps)
        if arguments.whole:
            cases[f"plain {num_steps}"] = partial(whole, num_steps)
    ours(1)  # loads code
    seconds = best_seconds(cases, arguments.rounds, warm_up=False, clock=process_time)

    rows = []
    for num_steps in arguments.steps:
        name, plain_name = f"ours {num_steps}", f"plain {num_steps}"
        if not arguments.whole:
            passes[plain_name] = round(expected_passes(batch_size, num_steps))
            seconds[plain_name] = passes[plain_name] * seconds["pass"] + num_steps * seconds["draw"]
        row = [f"sampling {size}", batch_size, num_steps]
        row += [passes[name], seconds[name], passes[plain_name], seconds[plain_name]]
        row += [1000 * seconds["pass"], 1000 * seconds["draw"], seconds[plain_name] / seconds[name]]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x4", "512x8", "768x12"], help="hidden size x layers")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, nargs="*", default=[128, 1000], help="of sampling; none to leave it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="run the plain sampler whole")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured, sampled = [], []
    for size in arguments.sizes:
        model = random_model(size)
        plain = plain_twin(model)
        check_agreement(model, plain)
        for batch_size in arguments.batch_sizes:
            measured += passes_and_training(size, batch_size, model, plain, arguments.rounds)
            if arguments.steps:
                sampled += sampling(size, batch_size, model, plain, arguments)
    report(
        f"length {LENGTH}, float32, one thread",
        ["task", "batch", "tokens/s", "plain", "x plain", "peak MiB", "plain", "share"],
        measured,
        arguments.json,
    )
    if sampled:
        report(
            f"{LENGTH} tokens, float32, one thread, plain sampler {'run whole' if arguments.whole else 'scaled up'}",
            ["task", "batch", "T", "passes", "s", "plain passes", "plain s", "ms/pass", "ms/draw", "x plain"],
            sampled,
            arguments.json,
        )


if __name__ == "__main__":
    main()
