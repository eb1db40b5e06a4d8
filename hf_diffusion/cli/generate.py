"""`hf-diffusion generate`: text from a model, by any strategy; gaps in the prompt are filled."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from ..checkpoints import ARMD_SHAKESPEARE
from ..generation.live_view import LiveView, colour_by_step
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.output import DiffusionGenerateOutput
from .devices import check_device


SETTINGS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "masked positions to append (default: fill the gaps, or up to 20 tokens without any)"),
    "strategy": (str, "which positions come next (default: the model's own)"),
    "num_streams": (int, 'streams that are written in parallel, with "strided"'),
    "heads": (str, 'with "strided", draw the heads of the streams "first" (default) or "staggered"'),
    "block_length": (int, 'positions in a block, with "semi_autoregressive"'),
    "block_strategy": (str, "how a block is filled"),
    "max_denoising_steps": (int, "steps in which the text, or a block, is drawn"),
    "confidence_threshold": (float, 'with "confidence", keep all positions that are surer than this'),
    "entropy_bound": (float, 'with "entropy", keep the positions whose entropies sum to this, in nats'),
    "temperature": (float, "of sampling"),
    "top_k": (int, "draw from so many tokens"),
    "top_p": (float, "draw from the most likely tokens that have this probability together"),
    "repetition_penalty": (float, "above 1, tokens that are in the text already become less likely"),
    "no_repeat_ngram_size": (int, "no run of so many tokens twice"),
    "stop_strings": (str, "the text ends where it spells this"),
    "num_return_sequences": (int, "texts for each prompt"),
}
"""Arguments of `generate` that are flags here under the same names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default=ARMD_SHAKESPEARE, help="folder or Hub name (default: the one in the package)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to go on from, with gaps or without")
    source.add_argument("--prompt-file", type=Path, help="one prompt per line; - for standard input")
    parser.add_argument(
        "--mask-symbol", default="[MASK]", help='a token to fill; "[MASK]*12" for twelve (default: [MASK])'
    )
    for name, (kind, help_text) in SETTINGS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=help_text)
    parser.add_argument("--greedy", action="store_true", help="the most likely token at every position")
    parser.add_argument(
        "--learned-order",
        action=argparse.BooleanOptionalAction,
        help="for models that have learned an order: follow it (default) or not",
    )
    parser.add_argument("--seed", type=int, help="of the first text; the next one has the next seed")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--live", action="store_true", help="show the text as it is drawn")
    shown.add_argument("--show-order", action="store_true", help="colour every token by the pass that it was drawn in")
    shown.add_argument("--json", action="store_true", help="one JSON object per text")


def run(arguments: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    prompts = _prompts(arguments)
    _check(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model).eval().to(arguments.device)
    if not isinstance(model, DiffusionGenerationMixin):
        raise ValueError(f"`model`={str(arguments.model)!r} is a {type(model).__name__}, no masked-diffusion model.")
    settings = {name: getattr(arguments, name) for name in (*SETTINGS, "learned_order")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if arguments.greedy:
        settings["do_sample"] = False
    # Every text has a seed of its own: it is the same whatever other prompts are drawn before it.
    seed, texts_each = arguments.seed, arguments.num_return_sequences or 1
    if seed is None:
        seed = torch.seed() % 2**62
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", disable=len(prompts) == 1 or arguments.live)):
        ids = encode(prompt, tokenizer, model.config.mask_token_id, arguments.mask_symbol)
        streamer = LiveView(tokenizer, model.config.mask_token_id) if arguments.live else None
        output: Any = model.generate(
            ids.to(model.device),
            seed=seed + number * texts_each,
            streamer=streamer,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
            **settings,
        )
        if not arguments.live:
            given = (ids[0] != model.config.mask_token_id).tolist()
            for row in range(len(output.sequences)):
                print(_show(output, row, prompt, given, tokenizer, arguments), flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before a model is loaded."""
    if not arguments.mask_symbol:
        raise ValueError("`mask_symbol` must not be empty. Choose a word that the prompt does not hold otherwise.")
    if arguments.live and arguments.num_return_sequences not in (None, 1):
        raise ValueError(
            f"`num_return_sequences` ({arguments.num_return_sequences}) must be 1 with `live`, which shows one text."
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**62:
        raise ValueError(f"`seed` must be at least 0 and less than 2^62, got {arguments.seed}.")
    check_device(arguments.device)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.prompt_file is None:
        return [""]
    name = str(arguments.prompt_file)
    try:
        text = sys.stdin.read() if name == "-" else arguments.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompt_file`={name!r} is not UTF-8 text: {error}. Convert it.") from None
    prompts = text.removesuffix("\n").split("\n")
    if prompts == [""]:
        raise ValueError(f"`prompt_file`={name!r} is empty. Write one prompt per line.")
    return prompts


def encode(prompt: str, tokenizer: Any, mask_token_id: int, mask_symbol: str) -> torch.Tensor:
    """Token ids [1, length] of a prompt in which `mask_symbol`, or `mask_symbol*N`, stands for masked positions."""
    ids: list[int] = []
    parts = re.split(f"{re.escape(mask_symbol)}(?:\\*(\\d+))?", prompt)
    for index in range(0, len(parts), 2):
        if index:
            count = int(parts[index - 1] or 1)
            if not count:
                raise ValueError(f"`prompt` holds a gap of no token ({mask_symbol}*0): {prompt!r}. Leave it out.")
            ids += [mask_token_id] * count
        # What looks like a special token in a prompt is text.
        ids += tokenizer(parts[index], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def _show(
    output: DiffusionGenerateOutput,
    row: int,
    prompt: str,
    given: list[bool],
    tokenizer: Any,
    arguments: argparse.Namespace,
) -> str:
    assert output.sequences is not None and output.steps is not None
    assert output.confidence is not None and output.tokens_per_forward is not None
    tokens, steps = output.sequences[row].tolist(), output.steps[row].tolist()
    if arguments.show_order:
        is_given = given + [False] * (len(tokens) - len(given))
        is_text = [step >= 0 or known for step, known in zip(steps, is_given, strict=True)]  # the rest is padding
        shown = [pair for pair, kept in zip(zip(tokens, steps, strict=True), is_text, strict=True) if kept]
        return colour_by_step(tokenizer, shown)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if not arguments.json:
        return text
    described = {
        "prompt": prompt,
        "text": text,
        "token_ids": tokens,
        "steps": steps,
        "confidence": [round(value, 4) for value in output.confidence[row].tolist()],
        "nfe": output.nfe,
        "tokens_per_forward": float(output.tokens_per_forward[row]),
    }
    return json.dumps(described, ensure_ascii=False)
