"""`hf-diffusion convert`: checkpoints of other implementations, as folders that `from_pretrained` loads."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..conversion.mdlm import convert_mdlm_checkpoint


SETTINGS: dict[str, tuple[type, str]] = {
    "mask_token_id": (int, "id of the mask token"),
    "num_attention_heads": (int, "number of attention heads"),
    "max_position_embeddings": (int, "longest text that the model was trained on, in tokens"),
    "parameterization": (str, "what the network predicts: subs, as in MDLM"),
    "noise_schedule": (str, "noise schedule: loglinear, cosine, ..."),
}
"""What a file may not hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", choices=["mdlm"], help="where the checkpoint comes from")
    parser.add_argument("checkpoint", type=Path, help="the .ckpt file")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--raw", action="store_true", help="take the raw weights in place of the averaged ones (EMA)")
    parser.add_argument("--tokenizer", help="tokenizer to write beside the model, a folder or a name on the Hub")
    settings = parser.add_argument_group("settings, for files that do not hold them")
    for name, (kind, help_text) in SETTINGS.items():
        settings.add_argument("--" + name.replace("_", "-"), type=kind, help=help_text)
    settings.add_argument(
        "--time-conditioning", action=argparse.BooleanOptionalAction, help="whether the network reads the noise level"
    )


def run(arguments: argparse.Namespace) -> None:
    names = (*SETTINGS, "time_conditioning")
    settings: dict[str, Any] = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    model, info = convert_mdlm_checkpoint(
        arguments.checkpoint, arguments.output, use_ema=not arguments.raw, tokenizer=tokenizer, **settings
    )
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {info.weights} weights")
    if tokenizer is None:
        print(f"tokenizer: {info.tokenizer or 'not named in the file'}; not written, see --tokenizer")
    print(f"written to {arguments.output}")
