"""What `left_neighbour` is worth: the same training with and without it, and an ordinary autoregressive model beside.

    python benchmarks/left_neighbour.py TEXT [--steps 600] [--seeds 0 1] [--json left_neighbour.json]

Left to right throughout; validation loss in nats per token on the held-out end of the text.
"""

import argparse
import tempfile
from pathlib import Path

from harness import report

from hf_diffusion.training.families import ARMDRecipe, LlamaRecipe
from hf_diffusion.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--text-length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    left_to_right = {"validation_streams": (1,), "max_shuffled": 1, "strided_start": 1.0}
    models = {
        "ARMD, as in the paper": (ARMDRecipe, {**left_to_right, "left_neighbour": False}),
        "ARMD, left neighbour": (ARMDRecipe, {**left_to_right, "left_neighbour": True}),
        "autoregressive (Llama)": (LlamaRecipe, {}),
    }
    rows = []
    for name, (recipe, choice) in models.items():
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                results = train(
                    recipe(
                        text=arguments.text,
                        output=Path(folder),
                        steps=arguments.steps,
                        evaluate_every=arguments.steps,
                        hidden_size=arguments.hidden_size,
                        text_length=arguments.text_length,
                        warmup_steps=60,
                        ema_decay=0.99,
                        seed=seed,
                        **choice,
                    )
                )
            loss = results["validation_loss_nats_per_token"]["left_to_right"]
            rows.append([name, seed, results["parameters"], results["training_tokens"], f"{loss:.3f}"])
    report("left to right", ["model", "seed", "parameters", "tokens", "nats per token"], rows, arguments.json)


if __name__ == "__main__":
    main()
