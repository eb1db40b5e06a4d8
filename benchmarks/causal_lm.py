"""A pretrained causal model in parallel streams: what it costs in nats per token, and what it gains in speed.

    python benchmarks/causal_lm.py MODEL TEXT [--num-windows 8] [--later-text wrap native hide] [--json causal_lm.json]
    python benchmarks/causal_lm.py MODEL --speed [--new-tokens 256]

The first prints the excess of the exact negative log-likelihood in strided orders over that from left to right, on
windows of TEXT after a start token, with standard errors over windows; and where in a stream it sits. The second prints
tokens per second beside the model's own `generate` with its cache. Nothing is trained. MODEL is a folder or Hub name.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import best_seconds, report
from huggingface_hub.utils import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.diffusion import orders
from hf_diffusion.training.data import load_text


@torch.no_grad()
def negative_log_likelihood(model: Any, windows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Nats of every token [windows, length] after the first one, which is given, in the order `steps` [length]."""
    given = torch.tensor([-1])
    block_index = orders.after_given(torch.cat([given, steps])[None], torch.ones(1, len(steps) + 1, dtype=torch.bool))
    rows = []
    for window in tqdm(windows.split(1), unit="window", leave=False):
        log_probs = model(window, block_index=block_index).logits.float().log_softmax(dim=-1)
        rows.append(-log_probs.gather(-1, window[..., None])[0, 1:, 0])
    return torch.stack(rows)


def mean_and_error(values: torch.Tensor) -> str:
    """Mean and standard error over the rows of `values` [windows, ...]."""
    of_windows = values.flatten(1).mean(dim=1)
    return f"{of_windows.mean():+.3f} ± {of_windows.std() / len(of_windows) ** 0.5:.3f}"


def excess(arguments: argparse.Namespace, causal_lm: Any, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer(load_text(str(arguments.text)))["input_ids"])
    count, length = arguments.num_windows, arguments.window_length
    starts = torch.linspace(0, len(ids) - length, count).long()  # spread over the text
    windows = torch.stack([ids[start : start + length] for start in starts.tolist()])
    windows = torch.cat([torch.full((count, 1), arguments.start_token), windows], dim=1)
    rows, left_to_right = [], None
    for later_text in arguments.later_text:
        model = from_causal_lm(causal_lm, later_text=later_text, gap_token_id=arguments.start_token)
        if left_to_right is None:
            left_to_right = negative_log_likelihood(model, windows, torch.arange(length))
            print(f"left to right: {left_to_right.mean():.3f} nats per token", flush=True)
        for heads in arguments.heads:
            for num_streams in arguments.num_streams:
                steps = orders.strided_steps(length, num_streams, staggered=heads == "staggered")
                costs = negative_log_likelihood(model, windows, steps) - left_to_right
                streams = costs[:, : length // num_streams * num_streams].unflatten(1, (num_streams, -1))
                half = streams.shape[2] // 2
                parts = (costs, streams[:, 0], streams[:, -1], streams[:, 1:, :2], streams[:, :, half:])
                rows.append([f"{later_text}, {heads}", num_streams, *map(mean_and_error, parts)])
                print(rows[-1], flush=True)
    columns = ["keys on the right, heads", "S", "excess", "first stream", "last", "first two tokens", "second halves"]
    title = f"nats per token over left to right, {count} windows of {length} tokens"
    report(title, columns, rows, arguments.json, left_to_right=float(left_to_right.mean()))


@torch.no_grad()
def speed(arguments: argparse.Namespace, causal_lm: Any) -> None:
    model, num_tokens = from_causal_lm(causal_lm, gap_token_id=arguments.start_token), arguments.new_tokens
    prompt = torch.full((arguments.batch_size, 1), arguments.start_token)
    shared = {"max_new_tokens": num_tokens, "eos_token_id": None, "pad_token_id": arguments.start_token, "top_k": 0}
    cases = {
        "the model's own generate": lambda: causal_lm.generate(prompt, do_sample=True, temperature=1.0, **shared),
        **{
            f"S={count}": lambda count=count: model.generate(prompt, strategy="strided", num_streams=count, **shared)
            for count in (1, *arguments.num_streams)
        },
    }
    seconds = best_seconds(cases, arguments.rounds)
    rows = []
    for name, value in seconds.items():
        count = int(name[2:]) if name.startswith("S=") else 1
        passes = count + -(-num_tokens // count) - 1
        rate = arguments.batch_size * num_tokens / value
        rows.append([name, passes, rate, seconds["the model's own generate"] / value, seconds["S=1"] / value])
    columns = ["decoder", "passes", "tokens/s", "x own generate", "x S=1"]
    title = f"batch {arguments.batch_size}, {num_tokens} new tokens, {torch.get_num_threads()} threads"
    report(title, columns, rows, arguments.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--start-token", type=int, default=0, help="stands before every text, and in the gaps")
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--later-text", nargs="+", default=["wrap"])
    parser.add_argument("--heads", nargs="+", default=["first"])
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
    torch.set_num_threads(arguments.threads)
    causal_lm = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.speed:
        speed(arguments, causal_lm)
    else:
        excess(arguments, causal_lm, AutoTokenizer.from_pretrained(arguments.model))


if __name__ == "__main__":
    main()
