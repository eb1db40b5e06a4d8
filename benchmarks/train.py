"""Training throughput of the families beside transformers' GPT-2 of the same shape with its own loss, in one run.

    python benchmarks/train.py [--batch-size 2] [--length 256] [--families] [--json train.json]

Forward, backward and AdamW. The two-stream half of ARMD carries twice the rows, so 1.5 times is the most that it
should cost.
"""

import time
from collections.abc import Callable

import torch
from harness import Case, armd_weights, matrix_weights, read_shape, shape_parser, side_by_side
from transformers import GPT2Config, GPT2LMHeadModel

from hf_diffusion import (
    ARMDConfig,
    ARMDForMaskedDiffusion,
    LoMDMConfig,
    LoMDMForMaskedDiffusion,
    MDLMConfig,
    MDLMForMaskedDiffusion,
)
from hf_diffusion.diffusion.orders import strided_steps


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


BASELINE = "GPT-2, its own loss"
FORWARD_AND_BACKWARD = 6
"""Operations for a weight and a row: two forward, four backward."""
UPDATE = 28
"""Bytes that an update of a weight in float32 moves at least: weight, gradient and two moments in, all but one out."""


def training_cases(
    shape: dict[str, int], batch_size: int, length: int, bf16: bool = False, families: bool = False
) -> dict[str, Case]:
    """
    Args:
        shape: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size`.
        families: MDLM and LoMDM too.
    """
    ids = torch.randint(shape["vocab_size"] - 1, (batch_size, length))
    strided = strided_steps(length, 4).expand_as(ids)
    order = torch.stack([torch.randperm(length) for _ in ids])
    armd = ARMDForMaskedDiffusion(ARMDConfig(**shape)).train()
    gpt2_config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_embd=shape["hidden_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",  # which transformers does not find out from the name of the class
    )
    gpt2 = GPT2LMHeadModel(gpt2_config).train()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def loss_of(model: torch.nn.Module, **more: torch.Tensor) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            with autocast():
                return model(ids, labels=ids, **more).loss

        return loss

    def case(model: torch.nn.Module, weights: float, **more: torch.Tensor) -> Case:
        """`weights` is how many a token is multiplied with, forward and backward."""
        num_bytes = UPDATE * sum(weight.numel() for weight in model.parameters())
        step = training_step(model, loss_of(model, **more))
        return Case(step, num_bytes, FORWARD_AND_BACKWARD * ids.numel() * weights, ids.numel())

    in_layers, in_head = matrix_weights(shape, head=False), matrix_weights(shape, layers=0)
    of_armd = sum(armd_weights(shape)) + in_head
    cases = {
        BASELINE: case(gpt2, in_layers + in_head),
        "ARMD, left to right": case(armd, of_armd),
        "ARMD, any order": case(armd, of_armd, block_index=order),
        "ARMD, strided S=4": case(armd, of_armd, block_index=strided),
    }
    if families:
        mdlm, lomdm = (
            MDLMForMaskedDiffusion(MDLMConfig(**shape, residual_dropout=0.0)).train(),
            LoMDMForMaskedDiffusion(LoMDMConfig(**shape, residual_dropout=0.0)).train(),
        )
        # Half of the tokens are masked on average, and only they go through the head. LoMDM reads the clean text
        # without a gradient, which is a third of the work, and two masked copies with one. Its schedulers, a layer
        # each, read all of them; the gradient of one ends at its keys, values and queries.
        schedulers = (1 - 1 / 12 + 2) * matrix_weights(shape, layers=1, head=False)
        cases["MDLM"] = case(mdlm, in_layers + in_head / 2)
        cases["LoMDM"] = case(lomdm, (1 / 3 + 2) * in_layers + schedulers + 2 * in_head / 2)
    return cases


def main() -> None:
    parser = shape_parser(__doc__, 768, 12, 12, 50257)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--families", action="store_true", help="MDLM and LoMDM too")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    shape = read_shape(arguments)
    cases = training_cases(shape, arguments.batch_size, arguments.length, arguments.bf16, arguments.families)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    measured = side_by_side(cases, BASELINE, arguments.rounds, dtype, time.perf_counter)
    title = (
        f"training, {arguments.layers} x {arguments.hidden_size}, batch {arguments.batch_size} x {arguments.length}, "
        f"{torch.get_num_threads()} threads, {'bfloat16 autocast' if arguments.bf16 else 'float32'}"
    )
    measured.report(title, vars(arguments), arguments.json)


if __name__ == "__main__":
    main()
