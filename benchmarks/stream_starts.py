"""Other ways to begin the streams of a causal model than heads first at equal distances: what each would cost.

    python benchmarks/stream_starts.py MODEL TEXT [--adapter FOLDER] [--num-streams 4] [--num-windows 8]

All are orders, so their cost is the excess of an exact negative log-likelihood, as in causal_lm.py:

- lag D: a stream starts D passes after the one before it, which has written D tokens by then (1 is "staggered");
- sentences: streams begin where a sentence or a line of the true text begins, as near as may be to equal distances;
- seams last M: the first M tokens of every later stream are left open, and drawn from left to right when all else is
  there. This suggests what they would cost if they were drawn first and revised in the end, and does not show it: here
  all else is the true text, read in the order of streams; a revision reads drafts, anew, and the suffix first.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from causal_lm import first_windows, mean_and_error, negative_log_likelihood
from harness import report
from peft import PeftModel
from transformers import AutoTokenizer

from hf_diffusion.conversion import from_causal_lm


def from_starts(starts: list[int], length: int, open_places: int = 0) -> torch.Tensor:
    """Steps [length]: heads first, then all streams; before every later stream some places that come last."""
    steps, num_streams = torch.empty(length, dtype=torch.long), len(starts)
    heads = [start + open_places * (start > 0) for start in starts]
    for number, (head, end) in enumerate(zip(heads, [*starts[1:], length], strict=True)):
        steps[head] = number
        steps[head + 1 : end] = num_streams + torch.arange(end - head - 1)
    last = num_streams + max(end - head for head, end in zip(heads, [*starts[1:], length], strict=True)) - 1
    for start in starts[1:]:
        steps[start : start + open_places] = last + torch.arange(open_places)
    return steps


def lagging(length: int, num_streams: int, lag: int) -> torch.Tensor:
    """Steps [length] of streams that start one after the other."""
    return torch.cat([lag * number + torch.arange(length // num_streams) for number in range(num_streams)])


def near_sentences(window: torch.Tensor, begins: torch.Tensor, starts: list[int]) -> list[int]:
    """The positions of `window` [length] next to `starts` whose left neighbour is one of the tokens `begins`."""
    places = torch.isin(window[:-1], begins).nonzero()[:, 0] + 1
    if not len(places):
        return starts
    nearest = [int(places[(places - start).abs().argmin()]) for start in starts[1:]]
    moved = [0, *nearest]
    return moved if moved == sorted(set(moved)) else starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--start-token", type=int, default=0)
    parser.add_argument("--num-streams", type=int, default=4)
    parser.add_argument("--num-windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = from_causal_lm(arguments.model, gap_token_id=arguments.start_token, dtype=torch.float32).eval()
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    length, num_streams = arguments.window_length, arguments.num_streams
    windows = first_windows(tokenizer, arguments.text, arguments.num_windows, length, arguments.start_token)
    equal = list(range(0, length, length // num_streams))
    begins = torch.tensor([token for text, token in tokenizer.get_vocab().items() if text.endswith((".", "Ċ"))])
    moved = [near_sentences(window[1:], begins, equal) for window in windows]
    ways = {"equal distances": from_starts(equal, length)}
    ways |= {f"lag {lag}": lagging(length, num_streams, lag) for lag in (1, 8, 32)}
    ways["sentences"] = torch.stack([from_starts(starts, length) for starts in moved])
    ways |= {f"seams last {size}": from_starts(equal, length, size) for size in (4, 16)}
    left_to_right = negative_log_likelihood(model, windows, torch.arange(length))
    rows = []
    for name, steps in ways.items():
        costs = negative_log_likelihood(model, windows, steps) - left_to_right
        streams = costs.unflatten(1, (num_streams, -1))
        parts = (costs, streams[:, 1:, :4], streams[:, 1:, 4:16], streams[:, 1:, 16:])
        rows.append([name, int(steps.max()) + 1, *map(mean_and_error, parts)])
        print(rows[-1], flush=True)
    columns = ["streams begin", "passes", "excess", "first 4 tokens", "next 12", "the rest of later streams"]
    title = f"nats per token over left to right ({left_to_right.mean():.3f}), S={num_streams}, {len(windows)} windows"
    report(title, columns, rows, arguments.json)


if __name__ == "__main__":
    main()
