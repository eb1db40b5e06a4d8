"""`hf-diffusion demo`: the model that comes with the package writes in 1, 2, 4 and 8 parallel streams."""

import argparse
import time

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from ..checkpoints import ARMD_SHAKESPEARE
from ..diffusion.orders import strided_steps
from ..generation.live_view import LiveView


TEXTS_FOR_MEAN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of streams to show")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="length of each text (default: 192)")
    parser.add_argument("--temperature", type=float, default=0.9, help="of sampling (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--seconds-per-step", type=float, default=0.04, help="how long each step is shown at least")


def run(arguments: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
    model = AutoModel.from_pretrained(ARMD_SHAKESPEARE).eval()
    prompt = tokenizer(arguments.prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
    table = []
    for num_streams in arguments.num_streams:
        settings = {
            "strategy": "strided",
            "num_streams": num_streams,
            "max_new_tokens": arguments.max_new_tokens,
            "temperature": arguments.temperature,
            "return_dict_in_generate": True,
        }
        print(f"\n--- {num_streams} stream{'s' * (num_streams > 1)} ---\n", flush=True)
        view = LiveView(
            tokenizer,
            model.config.mask_token_id,
            _stream_of(prompt.shape[1], arguments.max_new_tokens, num_streams),
            arguments.seconds_per_step,
        )
        generator = torch.Generator().manual_seed(arguments.seed)
        output = model.generate(prompt, generator=generator, streamer=view, **settings)
        # The view takes time, so speed is measured on a text that nobody watches.
        start = time.perf_counter()
        model.generate(prompt, generator=generator, **settings)
        seconds = time.perf_counter() - start
        texts = model.generate(prompt, generator=generator, num_return_sequences=TEXTS_FOR_MEAN, **settings).sequences
        table.append(
            f"{num_streams:>7}  {output.nfe:>6}  {float(output.tokens_per_forward[0]):>18.2f}  "
            f"{arguments.max_new_tokens / seconds:>17.0f}  {_loss(model, output.sequences, prompt):>9.2f}  "
            f"{_loss(model, texts, prompt):>10.2f}"
        )
    print(f"\nstreams  passes  tokens per forward  tokens per second  this text  mean of {TEXTS_FOR_MEAN}")
    print("\n".join(table))
    print(
        "\nThe last two columns: negative log-likelihood of the text, in nats per token, under the model's own left\n"
        f"to right order at temperature 1, of the text shown and of {TEXTS_FOR_MEAN} others."
    )


def _stream_of(prompt_length: int, num_new: int, num_streams: int) -> list[int]:
    """The stream that each position belongs to; the prompt counts to the first."""
    steps = strided_steps(num_new, num_streams)
    return [0] * prompt_length + ((steps < num_streams).cumsum(0) - 1).tolist()


@torch.no_grad()
def _loss(model: torch.nn.Module, texts: torch.Tensor, prompt: torch.Tensor) -> float:
    labels = texts.clone()
    labels[:, : prompt.shape[1]] = -100
    return float(model(texts, labels=labels).loss)
