"""Training throughput of ARMD beside GPT-2 of the same shape with the same loss head, in one run.

    python benchmarks/train.py [--batch-size 2] [--length 256] [--json train.json]

Forward, backward and AdamW. The two-stream half of ARMD carries twice the rows, so 1.5 times is what it should cost.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import best_seconds, report
from transformers import GPT2Config, GPT2LMHeadModel

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion
from hf_diffusion.diffusion.orders import strided_steps
from hf_diffusion.modeling.loss import chunked_cross_entropy


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(arguments.vocab_size, (arguments.batch_size, arguments.length))
    strided = strided_steps(arguments.length, 4).expand_as(ids)
    order = torch.stack([torch.randperm(arguments.length) for _ in ids])

    armd = ARMDForMaskedDiffusion(
        ARMDConfig(
            vocab_size=arguments.vocab_size,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
        )
    ).train()
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=arguments.vocab_size,
            n_embd=arguments.hidden_size,
            n_layer=arguments.layers,
            n_head=arguments.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).train()

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16)

    def gpt2_loss() -> torch.Tensor:
        with autocast():
            hidden = gpt2.transformer(ids).last_hidden_state[:, :-1]
            return chunked_cross_entropy(hidden, ids[:, 1:], gpt2.lm_head, arguments.vocab_size)

    def armd_loss(block_index: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            with autocast():
                return armd(ids, labels=ids, block_index=block_index).loss

        return loss

    cases = {
        "GPT-2, same loss head": training_step(gpt2, gpt2_loss),
        "ARMD, left to right": training_step(armd, armd_loss(None)),
        "ARMD, any order": training_step(armd, armd_loss(order)),
        "ARMD, strided S=4": training_step(armd, armd_loss(strided)),
    }
    seconds = best_seconds(cases, arguments.rounds)
    baseline = seconds["GPT-2, same loss head"]
    report(
        f"training, {arguments.layers} x {arguments.hidden_size}, batch {arguments.batch_size} x {arguments.length}, "
        f"{torch.get_num_threads()} threads, {'bfloat16 autocast' if arguments.bf16 else 'float32'}",
        ["model", "tokens/s", "time / GPT-2's"],
        [[name, ids.numel() / value, value / baseline] for name, value in seconds.items()],
        arguments.json,
    )


if __name__ == "__main__":
    main()
