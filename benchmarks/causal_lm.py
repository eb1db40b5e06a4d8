"""A pretrained causal model in parallel streams: what it costs in nats per token, and what it gains in speed.

    python benchmarks/causal_lm.py MODEL TEXT [--adapter FOLDER ...]... [--num-windows 8] [--picture excess.svg]
    python benchmarks/causal_lm.py MODEL TEXT --infill [--adapter FOLDER] [--num-windows 8]
    python benchmarks/causal_lm.py MODEL --speed [--new-tokens 256]

The first prints the excess of the exact negative log-likelihood in strided orders over that of the same model from left
to right, on the first windows of TEXT after a start token, with standard errors over windows; and where in a stream it
sits. An adapter is what `hf-diffusion train --from-causal-lm MODEL` writes; those of one `--adapter` are seeds of one
recipe: the row is their mean, with its standard error over seeds in a column of its own. The second fills the middle
quarter of the windows from left to right, with the given text read in several orders. The third prints tokens per
second beside the model's own `generate` with its cache. MODEL is a folder or Hub name.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from harness import best_seconds, report
from huggingface_hub.utils import tqdm
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion import pack_linear_layers, unpack_linear_layers
from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.diffusion import orders
from hf_diffusion.training.data import load_text


@torch.no_grad()
def negative_log_likelihood(model: Any, windows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Nats of every token [windows, length] after the first one, which is given.

    Args:
        windows: long [windows, 1 + length].
        steps: long [length] or [windows, length], the order.
    """
    given = torch.full_like(windows[:, :1], -1)
    block_index = orders.after_given(
        torch.cat([given, steps.expand(len(windows), -1)], dim=1), torch.ones_like(windows, dtype=torch.bool)
    )
    rows = []
    for window, block in tqdm(list(zip(windows, block_index, strict=True)), unit="window", leave=False):
        log_probs = model(window[None], block_index=block[None]).logits.float().log_softmax(dim=-1)
        rows.append(-log_probs.gather(-1, window[None, :, None])[0, 1:, 0])
    return torch.stack(rows)


def mean_and_error(values: torch.Tensor) -> str:
    """Mean and standard error over the rows of `values` [windows or seeds, ...]."""
    of_windows = values.flatten(1).mean(dim=1)
    return f"{of_windows.mean():+.3f} ± {of_windows.std() / len(of_windows) ** 0.5:.3f}"


def first_windows(tokenizer: Any, text: Path, count: int, length: int, start_token: int) -> torch.Tensor:
    """The first `count` windows of a text, long [count, 1 + length], each after a start token."""
    ids = torch.tensor(tokenizer(load_text(str(text))[0], verbose=False)["input_ids"])
    return torch.nn.functional.pad(ids[: count * length].view(count, length), (1, 0), value=start_token)


def costs_of_orders(
    arguments: argparse.Namespace, causal_lm: Any, windows: torch.Tensor, later_text: str, adapter: Path | None
) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
    """Nats [windows, length] from left to right, and what the orders cost above them, by heads and streams."""
    model: Any = from_causal_lm(causal_lm, later_text=later_text, gap_token_id=arguments.start_token)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    length = arguments.window_length
    left_to_right = negative_log_likelihood(model, windows, torch.arange(length))
    costs = {}
    for heads, num_streams in itertools.product(arguments.heads, arguments.num_streams):
        steps = orders.strided_steps(length, num_streams, staggered=heads == "staggered")
        costs[heads, num_streams] = negative_log_likelihood(model, windows, steps) - left_to_right
    if adapter is not None:
        model.unload()
    return left_to_right, costs


def excess(arguments: argparse.Namespace, causal_lm: Any, tokenizer: Any) -> None:
    count, length = arguments.num_windows, arguments.window_length
    windows = first_windows(tokenizer, arguments.text, count, length, arguments.start_token)
    rows, curves = [], {}
    for later_text in arguments.later_text:
        for adapters in ([None], *arguments.adapter):
            measured = [costs_of_orders(arguments, causal_lm, windows, later_text, adapter) for adapter in adapters]
            recipe = "no training" if adapters == [None] else ", ".join(adapter.name for adapter in adapters)
            for heads, num_streams in itertools.product(arguments.heads, arguments.num_streams):
                costs = torch.stack([costs[heads, num_streams] for _, costs in measured])  # [seeds, windows, length]
                streams = costs.mean(dim=0)[:, : length // num_streams * num_streams].unflatten(1, (num_streams, -1))
                half = streams.shape[2] // 2
                parts = (costs.mean(dim=0), streams[:, 0], streams[:, -1], streams[:, 1:, :2], streams[:, :, half:])
                excess, *places = map(mean_and_error, parts)
                over_seeds = mean_and_error(costs) if len(adapters) > 1 else ""
                nll = f"{torch.stack([left_to_right for left_to_right, _ in measured]).mean():.3f}"
                name = f"{later_text}, {heads}, {recipe}"
                rows.append([name, num_streams, nll, excess, over_seeds, *places])
                curves[name, num_streams] = streams
                print(rows[-1], flush=True)
    columns = ["model", "S", "left to right", "excess", "over seeds", "first stream", "last", "first two tokens"]
    columns.append("second halves")
    title = f"nats per token over left to right, {count} windows of {length} tokens"
    report(title, columns, rows, arguments.json)
    if arguments.picture is not None:
        draw(arguments.picture, curves)


@torch.no_grad()
def infill(arguments: argparse.Namespace, causal_lm: Any, tokenizer: Any) -> None:
    """Cost of the middle quarter against the same model that is shown what is before it alone."""
    count, length = arguments.num_windows, arguments.window_length
    windows = first_windows(tokenizer, arguments.text, count, length, arguments.start_token)
    model: Any = from_causal_lm(causal_lm, gap_token_id=arguments.start_token)
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter[0][0]).eval()
    middle = torch.arange(length * 3 // 8, length * 5 // 8) + 1
    start, before, after = (
        torch.tensor([0]),
        torch.arange(1, int(middle[0])),
        torch.arange(int(middle[-1]) + 1, length + 1),
    )
    ways = {
        "prefix alone": None,
        "in position order": (start, before, after),
        "suffix after the start token": (start, after, before),
        "suffix first": (after, start, before),
    }
    costs = {}
    for name, given in ways.items():
        rows = []
        for window in tqdm(windows.split(1), unit="window", leave=False):
            text = window if given is not None else window[:, : int(middle[-1]) + 1]
            order = torch.cat([*(given or (start, before)), middle])
            logits = model(
                text, block_index=orders.block_index_from_order(order)[None], query_positions=middle[None]
            ).logits
            rows.append(-logits.float().log_softmax(dim=-1).gather(-1, window[:, middle, None])[0, :, 0])
        costs[name] = torch.stack(rows)
        print(name, f"{costs[name].mean():.3f}", flush=True)
    alone, in_order = costs["prefix alone"], costs["in position order"]
    rows = [[name, mean_and_error(cost - alone), mean_and_error(cost - in_order)] for name, cost in costs.items()]
    columns = ["given text is read", "over prefix alone", "over position order"]
    title = f"nats per token of the middle {len(middle)} of {length} tokens, {count} windows ({alone.mean():.3f})"
    report(title, columns, rows, arguments.json)


def draw(path: Path, curves: dict[tuple[str, int], torch.Tensor]) -> None:
    """The excess by number of streams, and by place in a stream (the first one left out), of `curves` [windows, S,
    place]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_streams, by_place = figure.subplots(1, 2)
    names = dict.fromkeys(name for name, _ in curves)
    for color, name in enumerate(names):
        mine = {num_streams: values for (other, num_streams), values in curves.items() if other == name}
        means = torch.stack([values.flatten(1).mean(1) for values in mine.values()])
        errors = means.std(dim=1) / means.shape[1] ** 0.5
        by_streams.errorbar(list(mine), means.mean(dim=1), yerr=errors, marker="o", capsize=3, label=name)
        num_streams, values = next(((s, v) for s, v in mine.items() if s == 4), next(iter(mine.items())))
        edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
        edges = [edge for edge in edges if edge < values.shape[2]] + [values.shape[2]]
        later = values[:, 1:].mean(dim=(0, 1))
        heights = [later[start:stop].mean().item() for start, stop in itertools.pairwise(edges)]
        by_place.stairs(heights, [edge + 1 for edge in edges], color=f"C{color}")
    by_streams.set_xlabel("streams")
    by_streams.set_ylabel("nats per token over left to right")
    by_streams.set_xscale("log", base=2)
    by_streams.set_xticks(list(mine), [str(num_streams) for num_streams in mine])
    by_streams.legend(fontsize=7)
    by_place.set_xscale("log", base=2)
    by_place.axhline(0, color="0.7", linewidth=1)
    by_place.set_xlabel(f"place in a stream, all but the first of {num_streams}")
    figure.savefig(path)


@torch.no_grad()
def speed(arguments: argparse.Namespace, causal_lm: Any) -> None:
    """Every decoder with plain and with packed linear layers: the model inside is the same in all cases."""
    model, num_tokens = from_causal_lm(causal_lm, gap_token_id=arguments.start_token), arguments.new_tokens
    prompt = torch.full((arguments.batch_size, 1), arguments.start_token)
    shared = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": num_tokens,
        "eos_token_id": None,
        "pad_token_id": arguments.start_token,
        "top_k": 0,
    }
    cases = {
        "the model's own generate": lambda: causal_lm.generate(prompt, do_sample=True, temperature=1.0, **shared),
        **{
            f"S={count}": lambda count=count: model.generate(prompt, strategy="strided", num_streams=count, **shared)
            for count in (1, *arguments.num_streams)
        },
    }
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows = []
    for layers in ("plain", "packed"):
        if layers == "packed":
            pack_linear_layers(causal_lm)
        seconds = best_seconds(cases, arguments.rounds, clock=clock)
        for name, value in seconds.items():
            count = int(name[2:]) if name.startswith("S=") else 1
            passes = count + -(-num_tokens // count) - 1
            rate = arguments.batch_size * num_tokens / value
            own = seconds["the model's own generate"] / value
            rows.append([f"{name}, {layers}", passes, rate, own, seconds["S=1"] / value])
    unpack_linear_layers(causal_lm)
    columns = ["decoder, linear layers", "passes", "tokens/s", "x own generate", "x S=1"]
    title = f"batch {arguments.batch_size}, {num_tokens} new tokens, {torch.get_num_threads()} threads"
    report(title, columns, rows, arguments.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument(
        "--adapter", type=Path, nargs="+", action="append", default=[], help="seeds of one recipe; may come repeatedly"
    )
    parser.add_argument("--start-token", type=int, default=0, help="stands before every text, and in the gaps")
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--later-text", nargs="+", default=["wrap"])
    parser.add_argument("--heads", nargs="+", default=["first"])
    parser.add_argument("--picture", type=Path, help="draw the excess by S and by place into this file")
    parser.add_argument("--infill", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.text is None) != arguments.speed:
        parser.error("pass either a text or --speed")
    if arguments.infill and sum(map(len, arguments.adapter)) > 1:
        parser.error("--infill takes one --adapter")
    torch.set_num_threads(arguments.threads)
    causal_lm = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.speed:
        speed(arguments, causal_lm)
    else:
        measure = infill if arguments.infill else excess
        measure(arguments, causal_lm, AutoTokenizer.from_pretrained(arguments.model))


if __name__ == "__main__":
    main()
