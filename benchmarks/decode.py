"""Tokens per second of ARMD's decoding beside transformers' GPT-2 of the same shape, in one run on the same threads.

    python benchmarks/decode.py [--dtype bfloat16] [--batch-size 8] [--profile 16] [--json decode.json]

Random weights, 12 layers of 768, GPT-2's vocabulary, sampling at temperature 1. Two baselines: GPT-2 through
transformers' own `generate` with its cache, and an autoregressive decoder that is tuned as ARMD's is (its layers,
packed weights, growing cache, one uniform per draw).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Case, armd_weights, matrix_weights, side_by_side
from transformers import GPT2Config, GPT2LMHeadModel

from hf_diffusion import ARMDCache, ARMDConfig, ARMDForMaskedDiffusion, pack_linear_layers
from hf_diffusion.generation.sampling import sample_categorical
from hf_diffusion.modeling.masks_armd import Attend


SHAPE = {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}


def decode_autoregressively(model: ARMDForMaskedDiffusion, batch_size: int, num_tokens: int) -> None:
    """An ordinary causal transformer made of ARMD's layers: one row a pass, which reads the token before it."""
    network, cache, rows = model.model, ARMDCache(len(model.model.layers)), slice(None)
    uniforms = torch.rand(num_tokens, batch_size, dtype=torch.float64)
    tokens = torch.zeros(batch_size, 1, dtype=torch.long)
    for step in range(num_tokens):
        hidden = network.embed_tokens(tokens)
        rotary = network.rotary_emb(hidden, torch.full((1, 1), step))
        for layer in network.layers:
            hidden = layer(hidden, rotary, rows, rows, [Attend(rows)], cache)
        logits = model.lm_head(network.norm(hidden))
        tokens = sample_categorical(logits, uniforms[step][:, None])


GPT2, TUNED = "GPT-2, transformers' generate", "AR, tuned alike"


class Decoders:
    """Models of one shape with random weights.

    Args:
        shape: as in `SHAPE`.
    """

    def __init__(self, shape: dict[str, int], dtype: torch.dtype, left_neighbour: bool = False) -> None:
        self.shape, self.dtype = shape, dtype
        config = ARMDConfig(**shape, left_neighbour=left_neighbour)
        self.plain, self.packed = (ARMDForMaskedDiffusion(config).to(dtype).eval() for _ in range(2))
        pack_linear_layers(self.packed)
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        renamed = {names.get(key, key): value for key, value in shape.items()}
        gpt2_config = GPT2Config(**renamed, bos_token_id=None, eos_token_id=None)
        self.gpt2 = GPT2LMHeadModel(gpt2_config).to(dtype).eval()

    @torch.no_grad()
    def strided(self, packed: bool, batch_size: int, num_tokens: int, num_streams: int, **more: bool) -> None:
        model = self.packed if packed else self.plain
        nothing = torch.empty(batch_size, 0, dtype=torch.long)
        model.generate(nothing, max_new_tokens=num_tokens, strategy="strided", num_streams=num_streams, **more)

    @torch.no_grad()
    def generate_gpt2(self, batch_size: int, num_tokens: int) -> None:
        start = torch.zeros(batch_size, 1, dtype=torch.long)
        nothing_padded = torch.ones_like(start)  # else `generate` takes the first token for padding, and hides it
        self.gpt2.generate(
            start, attention_mask=nothing_padded, max_new_tokens=num_tokens, do_sample=True, top_k=0, pad_token_id=0
        )

    @torch.no_grad()
    def tuned(self, batch_size: int, num_tokens: int) -> None:
        decode_autoregressively(self.packed, batch_size, num_tokens)

    def cases(self, batch_size: int, num_tokens: int, streams: list[int]) -> dict[str, Case]:
        tokens = batch_size * num_tokens
        weights = matrix_weights(self.shape)

        def case(run: Callable[[], None], passes: int, of_rows: float) -> Case:
            operations = 2 * batch_size * (of_rows + num_tokens * matrix_weights(self.shape, layers=0))
            return Case(run, passes * weights * self.dtype.itemsize, operations, tokens)

        def autoregressive(run: Callable[[int, int], None]) -> Case:
            of_rows = num_tokens * matrix_weights(self.shape, head=False)
            return case(lambda: run(batch_size, num_tokens), num_tokens, of_rows)

        def armd(num_streams: int, packed: bool = True, **more: bool) -> Case:
            of_content, of_query = armd_weights(self.shape)
            # A start symbol is read, and what is drawn but in the last pass.
            of_rows = (num_tokens - num_streams + 1) * of_content + num_tokens * of_query
            passes = num_streams + -(-num_tokens // num_streams) - 1
            return case(lambda: self.strided(packed, batch_size, num_tokens, num_streams, **more), passes, of_rows)

        return {
            GPT2: autoregressive(self.generate_gpt2),
            TUNED: autoregressive(self.tuned),
            **{f"ARMD S={s}": armd(s) for s in streams},
            "ARMD S=1, not packed": armd(1, packed=False),
            "ARMD S=4, not packed": armd(4, packed=False),
            "ARMD S=4, with history": armd(4, return_dict_in_generate=True),
        }


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
    parser.add_argument("--seed", type=int, default=0, help="of weights and of what is drawn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    dtype, batch, num_tokens = getattr(torch, arguments.dtype), arguments.batch_size, arguments.new_tokens
    decoders = Decoders(SHAPE, dtype, arguments.left_neighbour)
    if arguments.profile:
        decoders.strided(True, batch, num_tokens, arguments.profile)
        with torch.profiler.profile() as profiler:
            decoders.strided(True, batch, num_tokens, arguments.profile)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return
    cases = decoders.cases(batch, num_tokens, arguments.num_streams)
    measured = side_by_side(cases, GPT2, arguments.rounds, dtype, time.perf_counter)
    for row in measured.rows.values():
        row["x tuned AR"] = measured.rows[TUNED]["seconds"] / row["seconds"]
    title = f"{arguments.dtype}, batch {batch}, {num_tokens} new tokens, {arguments.threads} threads"
    measured.report(title, vars(arguments), arguments.json)


if __name__ == "__main__":
    main()
