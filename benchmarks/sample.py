"""Sampling from MDLM and LoMDM, by strategy, beside the reference's algorithm on the same weights, in one run.

    python benchmarks/sample.py [--hidden-size 512] [--layers 8] [--batch-size 4] [--json sample.json]

The baseline is the plain implementation of the reference in plain_mdlm.py, with the cache that the reference has: it
reads again only after a step that has revealed something. `mdlm.py` compares more sizes and memory.
"""

from functools import partial
from time import process_time

import torch
from harness import Case, matrix_weights, read_shape, shape_parser, side_by_side
from plain_mdlm import PlainMDLM
from transformers.core_model_loading import revert_weight_conversion

from hf_diffusion import LoMDMConfig, LoMDMForMaskedDiffusion, MDLMConfig, MDLMForMaskedDiffusion


def random_weights(model: torch.nn.Module) -> None:
    """Fresh gates are shut, and all fresh predictions the same."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)


def baseline_name(num_steps: int) -> str:
    return f"reference's algorithm, {num_steps} steps"


@torch.no_grad()
def sampling_cases(shape: dict[str, int], batch_size: int, length: int, num_steps: int) -> dict[str, Case]:
    """
    Args:
        shape: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size`.
        num_steps: of ancestral sampling.
    """
    mdlm = MDLMForMaskedDiffusion(MDLMConfig(**shape, residual_dropout=0.0)).eval()
    lomdm = LoMDMForMaskedDiffusion(LoMDMConfig(**shape, residual_dropout=0.0)).eval()
    random_weights(mdlm)
    random_weights(lomdm)
    plain = PlainMDLM(mdlm.config).eval()
    plain.load_published(revert_weight_conversion(mdlm, mdlm.state_dict()))
    tokens, nothing = batch_size * length, torch.empty(batch_size, 0, dtype=torch.long)

    def ours(model: MDLMForMaskedDiffusion, **settings: object) -> Case:
        run = partial(model.generate, nothing, max_new_tokens=length, **settings)
        output = run(seed=0, return_dict_in_generate=True)
        # A text takes no part in a pass that would reveal nothing in it.
        positions_read = float((length / output.tokens_per_forward).sum()) * length
        layers = shape["num_hidden_layers"] + 1 * model.learns_order  # of its two heads one reads the masked text
        # Of the last layer, positions that are not drawn need the keys and values only: two of twelve parts.
        of_read, of_drawn = (layers, 0) if model.learns_order else (layers - 10 / 12, 10 / 12)
        operations = positions_read * matrix_weights(shape, of_read, head=False)
        operations += tokens * matrix_weights(shape, of_drawn)
        num_bytes = 4 * output.nfe * matrix_weights(shape, layers)
        return Case(partial(run, seed=0), num_bytes, 2 * operations, tokens)

    in_steps = {"strategy": "ancestral", "max_denoising_steps": num_steps}
    of_mdlm = ours(mdlm, **in_steps)

    def reference() -> None:
        plain.sample(batch_size, length, num_steps)

    return {
        baseline_name(num_steps): Case(reference, of_mdlm.num_bytes, of_mdlm.operations, tokens),
        f"MDLM, {num_steps} steps": of_mdlm,
        "MDLM, a token a pass": ours(mdlm, strategy="first_hitting"),
        f"MDLM, the surest first in {num_steps // 4} steps": ours(
            mdlm, strategy="confidence", max_denoising_steps=num_steps // 4
        ),
        f"LoMDM, {num_steps} steps": ours(lomdm, **in_steps),
    }


def main() -> None:
    parser = shape_parser(__doc__, 512, 8, 8, 50258)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    shape = read_shape(arguments)
    cases = sampling_cases(shape, arguments.batch_size, arguments.length, arguments.steps)
    baseline = baseline_name(arguments.steps)
    measured = side_by_side(cases, baseline, arguments.rounds, torch.float32, process_time)
    title = f"{arguments.batch_size} texts of {arguments.length} tokens, {arguments.layers} x {arguments.hidden_size}"
    measured.report(f"{title}, float32, one thread", vars(arguments), arguments.json)


if __name__ == "__main__":
    main()
