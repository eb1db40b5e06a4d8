"""Tokens per second of ARMD's decoding beside transformers' GPT-2 of the same shape, in one run on the same threads.

    python benchmarks/decode.py [--dtype bfloat16] [--batch-size 8] [--profile 16] [--json decode.json]

Random weights, 12 layers of 768, GPT-2's vocabulary, sampling at temperature 1. Two baselines: GPT-2 through
transformers' own `generate` with its cache, and an autoregressive decoder that is tuned as ARMD's is (its layers,
packed weights, growing cache, one uniform per draw).
"""

import argparse
from pathlib import Path

import torch
from harness import best_seconds, matmul_rate, read_bandwidth, report
from transformers import GPT2Config, GPT2LMHeadModel

from hf_diffusion import ARMDCache, ARMDConfig, ARMDForMaskedDiffusion, pack_linear_layers
from hf_diffusion.generation.sampling import sample_categorical
from hf_diffusion.modeling.masks_armd import Attend


SHAPE = {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}


def decode_autoregressively(model: ARMDForMaskedDiffusion, batch_size: int, num_tokens: int) -> None:
    """An ordinary causal transformer made of ARMD's layers: one row a pass, which reads the token before it."""
    network, cache, rows = model.model, ARMDCache(SHAPE["num_hidden_layers"]), slice(None)
    uniforms = torch.rand(num_tokens, batch_size, dtype=torch.float64)
    tokens = torch.zeros(batch_size, 1, dtype=torch.long)
    for step in range(num_tokens):
        hidden = network.embed_tokens(tokens)
        rotary = network.rotary_emb(hidden, torch.full((1, 1), step))
        for layer in network.layers:
            hidden = layer(hidden, rotary, rows, rows, [Attend(rows)], cache)
        logits = model.lm_head(network.norm(hidden))
        tokens = sample_categorical(logits, uniforms[step][:, None])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--left-neighbour", action="store_true")
    parser.add_argument("--profile", type=int, help="print where the time goes with this number of streams, and stop")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype, batch, num_tokens = getattr(torch, arguments.dtype), arguments.batch_size, arguments.new_tokens

    plain = ARMDForMaskedDiffusion(ARMDConfig(**SHAPE, left_neighbour=arguments.left_neighbour)).to(dtype).eval()
    packed = ARMDForMaskedDiffusion(ARMDConfig(**SHAPE, left_neighbour=arguments.left_neighbour)).to(dtype).eval()
    pack_linear_layers(packed)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    gpt2 = GPT2LMHeadModel(GPT2Config(**{names.get(key, key): value for key, value in SHAPE.items()})).to(dtype).eval()
    start = torch.full((batch, 1), 50256)

    def strided(model: ARMDForMaskedDiffusion, num_streams: int, **more: bool) -> None:
        model.generate(start[:, :0], max_new_tokens=num_tokens, strategy="strided", num_streams=num_streams, **more)

    if arguments.profile:
        strided(packed, arguments.profile)
        with torch.profiler.profile() as profiler:
            strided(packed, arguments.profile)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return

    def generate_gpt2() -> None:
        gpt2.generate(start, max_new_tokens=num_tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=50256)

    cases = {
        "GPT-2, transformers' generate": generate_gpt2,
        "AR, tuned alike": lambda: decode_autoregressively(packed, batch, num_tokens),
        "ARMD S=1, not packed": lambda: strided(plain, 1),
        "ARMD S=4, not packed": lambda: strided(plain, 4),
        "ARMD S=4, with history": lambda: strided(packed, 4, return_dict_in_generate=True),
        **{f"ARMD S={s}": lambda s=s: strided(packed, s) for s in arguments.num_streams},
    }
    seconds = best_seconds(cases, arguments.rounds)
    weights = sum(weight.numel() for weight in packed.parameters())
    floor = weights * dtype.itemsize / read_bandwidth()
    gpt2_seconds, tuned_seconds = seconds["GPT-2, transformers' generate"], seconds["AR, tuned alike"]
    rows = []
    for name, value in seconds.items():
        num_streams = int(name.split("=")[1].split(",")[0]) if "S=" in name else 1
        passes = num_streams + -(-num_tokens // num_streams) - 1
        rows.append(
            [
                name,
                passes,
                batch * num_tokens / value,
                1000 * value / passes,
                gpt2_seconds / value,
                tuned_seconds / value,
                floor * passes / value,
            ]
        )
    rate = matmul_rate(dtype) / 1e9
    report(
        f"{arguments.dtype}, batch {batch}, {num_tokens} new tokens, {arguments.threads} threads",
        ["decoder", "passes", "tokens/s", "ms/pass", "x GPT-2", "x tuned AR", "share of bandwidth floor"],
        rows,
        arguments.json,
        matmul_gflops=rate,
        weight_floor_ms=1000 * floor,
    )
    print(f"reading the weights once takes {1000 * floor:.1f} ms; matrix products run at {rate:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
