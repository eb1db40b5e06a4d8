"""`hf-diffusion convert`: checkpoints of other implementations, as folders that `from_pretrained` loads."""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..conversion import convert_lomdm_checkpoint, convert_mdlm_checkpoint


SETTINGS: dict[str, tuple[type, str]] = {
    "mask_token_id": (int, "id of the mask token"),
    "num_attention_heads": (int, "number of attention heads"),
    "max_position_embeddings": (int, "longest text that the model was trained on, in tokens"),
    "parameterization": (str, "what the network predicts: subs, as in MDLM"),
    "noise_schedule": (str, "noise schedule: loglinear, cosine, ... (mdlm)"),
    "c1": (float, "exponent that all positions have on average (lomdm)"),
    "c2": (float, "how far the exponents of positions may differ (lomdm)"),
}
"""What a file may not hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", choices=["mdlm", "lomdm"], help="where the checkpoint comes from")
    parser.add_argument("checkpoint", type=Path, help="the .ckpt file")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--raw", action="store_true", help="take the raw weights in place of the averaged ones (EMA)")
    parser.add_argument("--tokenizer", help="tokenizer to write beside the model, a folder or a name on the Hub")
    parser.add_argument(
        "--mapping", type=Path, help="JSON file that says which tensors are those of the scheduler heads (lomdm)"
    )
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
    if arguments.mapping is not None:
        settings["mapping"] = _read_json(arguments.mapping)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    convert = convert_lomdm_checkpoint if arguments.source == "lomdm" else convert_mdlm_checkpoint
    model, info = convert(
        arguments.checkpoint, arguments.output, use_ema=not arguments.raw, tokenizer=tokenizer, **settings
    )
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {info.weights} weights")
    if info.matched:
        print("found by name and shape, not stated anywhere:")
        print("\n".join(f"  {ours} = {theirs}" for ours, theirs in info.matched.items()))
    if tokenizer is None:
        print(f"tokenizer: {info.tokenizer or 'not named in the file'}; not written, see --tokenizer")
    print(f"written to {arguments.output}")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"Cannot read {file}: it is not JSON ({error}).") from None
