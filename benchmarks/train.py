"""Training throughput of the families beside GPT-2 of the same shape with the same loss head, in one run.

    python benchmarks/train.py [--batch-size 2] [--length 256] [--families] [--json train.json]

Forward, backward and AdamW. The two-stream half of ARMD carries twice the rows, so 1.5 times is what it should cost.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Case, matrix_weights, report_side_by_side, side_by_side
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
from hf_diffusion.modeling.loss import chunked_cross_entropy


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


BASELINE = "GPT-2, same loss head"
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
    layers = shape["num_hidden_layers"]
    armd = ARMDForMaskedDiffusion(ARMDConfig(**shape)).train()
    gpt2_config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_embd=shape["hidden_size"],
        n_layer=layers,
        n_head=shape["num_attention_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = GPT2LMHeadModel(gpt2_config).train()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    def gpt2_loss() -> torch.Tensor:
        with autocast():
            hidden = gpt2.transformer(ids).last_hidden_state[:, :-1]
            return chunked_cross_entropy(hidden, ids[:, 1:], gpt2.lm_head, shape["vocab_size"])

    def loss_of(model: torch.nn.Module, **more: torch.Tensor) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            with autocast():
                return model(ids, labels=ids, **more).loss

        return loss

    def case(model: torch.nn.Module, loss: Callable[[], torch.Tensor], layers: float, rows: float = 1.0) -> Case:
        operations = FORWARD_AND_BACKWARD * rows * ids.numel() * matrix_weights(shape, layers=layers)
        num_bytes = UPDATE * sum(weight.numel() for weight in model.parameters())
        return Case(training_step(model, loss), num_bytes, operations, ids.numel())

    cases = {
        BASELINE: case(gpt2, gpt2_loss, layers),
        "ARMD, left to right": case(armd, loss_of(armd), 1.5 * layers),
        "ARMD, any order": case(armd, loss_of(armd, block_index=order), 1.5 * layers),
        "ARMD, strided S=4": case(armd, loss_of(armd, block_index=strided), 1.5 * layers),
    }
    if families:
        mdlm, lomdm = (
            MDLMForMaskedDiffusion(MDLMConfig(**shape, residual_dropout=0.0)).train(),
            LoMDMForMaskedDiffusion(LoMDMConfig(**shape, residual_dropout=0.0)).train(),
        )
        # Half of the tokens are masked on average, which is where MDLM's head is needed. LoMDM reads the clean text
        # without a gradient and two masked copies with one.
        cases["MDLM"] = case(mdlm, loss_of(mdlm), layers)
        cases["LoMDM"] = case(lomdm, loss_of(lomdm), layers, rows=2 + 1 / 3)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--families", action="store_true", help="MDLM and LoMDM too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = {
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "vocab_size": arguments.vocab_size,
    }
    cases = training_cases(shape, arguments.batch_size, arguments.length, arguments.bf16, arguments.families)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    measured = side_by_side(cases, BASELINE, arguments.rounds, dtype, time.perf_counter)
    title = (
        f"training, {arguments.layers} x {arguments.hidden_size}, batch {arguments.batch_size} x {arguments.length}, "
        f"{torch.get_num_threads()} threads, {'bfloat16 autocast' if arguments.bf16 else 'float32'}"
    )
    report_side_by_side(title, measured, BASELINE, arguments.json)


if __name__ == "__main__":
    main()
