"""LoMDM beside an MDLM of as many parameters, trained for as much computation on the same text in the same order.

    python benchmarks/lomdm.py TRAINING_TEXT VALIDATION_TEXT [--steps 2000] [--seeds 0] [--json lomdm.json]

Bounds in nats per token on the whole validation text, by the jump chain: for MDLM, whose exponents are all equal, that
is the mean over numbers of masks. LoMDM's heads are paid for with more width or layers of the MDLM, and the passes that
its objective takes with more steps. Then the spread of each estimator of the bound over draws of masks, on the last
LoMDM.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import torch
from harness import best_seconds, report
from transformers import AutoModel, AutoTokenizer

from hf_diffusion import LoMDMConfig, LoMDMForMaskedDiffusion, MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.evaluation import estimate_lomdm_bound
from hf_diffusion.training.data import TokenTexts, load_text, tokenize
from hf_diffusion.training.families import LoMDMRecipe, MDLMRecipe
from hf_diffusion.training.run import train


ESTIMATORS = ("uniform_time", "power_time", "mask_fraction", "jump_chain")


def matched_shape(shape: dict[str, int], vocab_size: int) -> dict[str, int]:
    """Width and number of layers of the MDLM whose number of parameters is nearest to that of a LoMDM of `shape`."""

    def parameters(kind: Any, config: Any, **shape: int) -> int:
        with torch.device("meta"):
            return kind(config(vocab_size=vocab_size, tie_word_embeddings=True, **shape)).num_parameters()

    wanted = parameters(LoMDMForMaskedDiffusion, LoMDMConfig, **shape)
    unit = 2 * shape["num_attention_heads"]
    widths = range(shape["hidden_size"], shape["hidden_size"] * 5 // 4, unit)
    layers = range(shape["num_hidden_layers"], shape["num_hidden_layers"] + 4)
    candidates = [
        {**shape, "hidden_size": width, "num_hidden_layers": number}
        for width, number in itertools.product(widths, layers)
    ]
    return min(candidates, key=lambda one: abs(parameters(MDLMForMaskedDiffusion, MDLMConfig, **one) - wanted))


def step_seconds(models: dict[str, Any], batch_size: int, length: int) -> dict[str, float]:
    """CPU seconds of a training step of each model."""
    texts = torch.randint(1000, (batch_size, length))

    def step(model: Any) -> None:
        model.train()(texts, labels=texts).loss.backward()
        model.zero_grad()

    return best_seconds({name: lambda m=model: step(m) for name, model in models.items()}, 5, clock=process_time)


@contextmanager
def trained(recipe: Any) -> Iterator[tuple[dict[str, Any], Any, Any]]:
    results = train(recipe)
    folder = str(recipe.output)
    yield results, AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def bound_without_timing(model: Any, texts: torch.Tensor, num_draws: int = 2) -> tuple[float, float]:
    """Mean over texts and draws, and its standard error for other draws, in nats per token."""
    generator, total, variance = torch.Generator().manual_seed(0), 0.0, 0.0
    for batch in texts.split(32):
        estimate = estimate_lomdm_bound(model, batch, num_draws=num_draws, generator=generator)
        total += float(estimate.bound_without_timing.sum())
        variance += float(estimate.standard_error_without_timing.square().sum())
    return total / texts.numel(), variance**0.5 / texts.numel()


def spread_of_estimators(model: Any, texts: torch.Tensor, num_draws: int = 16) -> list[list[Any]]:
    """Standard deviation of one draw for one text, in nats per token, by estimator; the mean beside it."""
    rows = []
    for estimator in ESTIMATORS:
        generator = torch.Generator().manual_seed(0)
        estimate = estimate_lomdm_bound(model, texts, estimator=estimator, num_draws=num_draws, generator=generator)
        length = texts.shape[1]
        deviation = estimate.standard_error.square().mean().sqrt() * num_draws**0.5 / length
        error = estimate.standard_error.square().sum().sqrt() / len(texts) / length
        rows.append([estimator, f"{estimate.bound.mean() / length:.3f} ± {error:.3f}", f"{deviation:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("validation_text", type=Path)
    parser.add_argument("--steps", type=int, default=2000, help="of LoMDM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-hidden-layers", type=int, default=4)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--text-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(arguments, name) for name in names}
    mdlm_shape = matched_shape(shape, arguments.vocab_size + 1)
    seconds = step_seconds(
        {
            "lomdm": LoMDMForMaskedDiffusion(LoMDMConfig(vocab_size=arguments.vocab_size + 1, **shape)),
            "mdlm": MDLMForMaskedDiffusion(MDLMConfig(vocab_size=arguments.vocab_size + 1, **mdlm_shape)),
        },
        arguments.batch_size,
        arguments.text_length,
    )
    steps = {"lomdm": arguments.steps, "mdlm": round(arguments.steps * seconds["lomdm"] / seconds["mdlm"])}
    print(f"CPU seconds per step: {seconds}; steps: {steps}; MDLM: {mdlm_shape}", flush=True)
    rows = []
    for seed in arguments.seeds:
        for name, recipe, own_shape in (("mdlm", MDLMRecipe, mdlm_shape), ("lomdm", LoMDMRecipe, shape)):
            with tempfile.TemporaryDirectory() as folder:
                settings = recipe(
                    text=arguments.text,
                    validation_text=arguments.validation_text,
                    output=Path(folder),
                    steps=steps[name],
                    evaluate_every=steps[name] // 10,
                    vocab_size=arguments.vocab_size,
                    text_length=arguments.text_length,
                    batch_size=arguments.batch_size,
                    validation_draws=2,
                    seed=seed,
                    **own_shape,
                )
                with trained(settings) as (results, model, tokenizer):
                    bound = results["validation_loss_nats_per_token"]["bound"]
                    error = results["standard_error_nats_per_token"]["bound"]
                    row = [name, seed, results["parameters"], steps[name], results["training_tokens"]]
                    row += [f"{bound:.3f} ± {error:.3f}", ""]
                    if name == "lomdm":
                        tokens = tokenize(load_text(str(arguments.validation_text)), tokenizer)
                        texts = TokenTexts(tokens, arguments.text_length).texts
                        mean, its_error = bound_without_timing(model, texts)
                        row[-1] = f"{mean:.3f} ± {its_error:.3f}"
                        spread = spread_of_estimators(model, texts[:32])
                    rows.append(row)
                    print(row, flush=True)
    columns = ["model", "seed", "parameters", "steps", "tokens read", "bound", "bound without timing"]
    report("bounds in nats per token", columns, rows, arguments.json)
    report("one draw for one text", ["estimator", "mean", "standard deviation"], spread, arguments.json)


if __name__ == "__main__":
    main()
