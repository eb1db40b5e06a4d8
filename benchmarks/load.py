"""Loading a checkpoint of each family beside GPT-2 of as many weights, in one run.

    python benchmarks/load.py [--hidden-size 512] [--layers 8] [--json load.json]

`from_pretrained` of a folder that the system has in its memory. What must move is the file, once.
"""

import tempfile
from functools import partial
from pathlib import Path
from time import process_time

import torch
from harness import Case, read_shape, shape_parser, side_by_side
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from hf_diffusion import (
    ARMDConfig,
    ARMDForMaskedDiffusion,
    LoMDMConfig,
    LoMDMForMaskedDiffusion,
    MDLMConfig,
    MDLMForMaskedDiffusion,
)


BASELINE = "GPT-2"


def loading_cases(shape: dict[str, int], folder: Path) -> dict[str, Case]:
    """
    Args:
        shape: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size`.
        folder: empty, for the checkpoints.
    """
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    renamed = {names.get(key, key): value for key, value in shape.items()}
    gpt2_config = GPT2Config(**renamed, bos_token_id=None, eos_token_id=None)
    models = {
        BASELINE: GPT2LMHeadModel(gpt2_config),
        "ARMD": ARMDForMaskedDiffusion(ARMDConfig(**shape)),
        "MDLM": MDLMForMaskedDiffusion(MDLMConfig(**shape)),
        "LoMDM": LoMDMForMaskedDiffusion(LoMDMConfig(**shape)),
    }
    cases = {}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        load = GPT2LMHeadModel if name == BASELINE else AutoModel
        num_bytes = (folder / name / "model.safetensors").stat().st_size
        cases[name] = Case(partial(load.from_pretrained, folder / name), num_bytes, 0)
    return cases


def main() -> None:
    parser = shape_parser(__doc__, 512, 8, 8, 50257)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    shape = read_shape(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cases = loading_cases(shape, Path(folder))
        measured = side_by_side(cases, BASELINE, arguments.rounds, torch.float32, process_time)
    measured.report(f"loading, {arguments.layers} x {arguments.hidden_size}", vars(arguments), arguments.json)


if __name__ == "__main__":
    main()
