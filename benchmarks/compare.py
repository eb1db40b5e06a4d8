"""An autoregressive transformer, MDLM, LoMDM and ARMD side by side: one size, one text in one order, as many tokens.

    python benchmarks/compare.py TRAINING_TEXT VALIDATION_TEXT TEST_TEXT --output FOLDER [--preset cpu] [--seeds 0 1 2]
        [--judge NAME] [--test]

Every model, evaluation and point of the frontier is a part with a file of its own in the folder: what is there is not
done again, and a training run that was killed goes on from its last checkpoint. Sizes are in comparison/presets.py.
Everything is chosen on the validation text; `--test` scores the test text, once, at the end. Tables are written to
results.md, all figures to results.json, and pictures beside them.
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison.frontier import Frontier
from comparison.models import NAMES, load, make_recipe
from comparison.parts import check_settings, part
from comparison.presets import PRESETS, Preset
from comparison.summary import write_summary
from comparison.throughput import training_throughput
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_diffusion.evaluation import evaluate_text
from hf_diffusion.training.data import load_text, train_tokenizer
from hf_diffusion.training.ema import last_complete_checkpoint
from hf_diffusion.training.run import train


class Comparison:
    """The parts of one comparison.

    Args:
        texts: names of the files to train, validate and test on, by "training", "validation" and "test".
    """

    def __init__(self, output: Path, preset: Preset, texts: dict[str, str], device: str) -> None:
        self.output, self.preset, self.texts, self.device = output, preset, texts, device
        digests = {name: hashlib.sha256(load_text(file)[0].encode()).hexdigest() for name, file in texts.items()}
        check_settings(output, preset, digests)
        self.tokenizer_folder, self.while_training = output / "tokenizer", output / "validated_while_training.txt"
        if not self.while_training.is_file():
            train_tokenizer(load_text(texts["training"]), preset.shared["vocab_size"]).save_pretrained(
                self.tokenizer_folder
            )
            length = 8 * preset.shared["text_length"] * preset.shared["validation_texts"]
            self.while_training.write_text(load_text(texts["validation"])[0][:length], encoding="utf-8")
        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder)

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"{name}-{seed}"

    def train(self, name: str, seed: int) -> dict[str, Any]:
        folder = self.folder(name, seed)
        more = {"start_from": self.folder("armd", seed)} if name == "armd_strided" else {}

        def compute() -> dict[str, Any]:
            recipe = make_recipe(
                name,
                seed,
                self.preset,
                text=self.texts["training"],
                validation_text=self.while_training,
                tokenizer=str(self.tokenizer_folder),
                output=folder,
                resume=last_complete_checkpoint(folder / "checkpoints") is not None,
                **more,
            )
            return train(recipe)

        return part(self.output / "parts" / f"train-{name}-{seed}.json", compute)

    def evaluate(self, name: str, seed: int, split: str) -> dict[str, Any]:
        """Likelihoods or bounds of `split`, by the number of streams for ARMD."""

        def compute() -> dict[str, Any]:
            model = load(name, self.folder(name, seed), self.device)
            text = load_text(self.texts[split])[0][: self.preset.characters]
            results = {}
            for label, settings in self._scored(name).items():
                scored = evaluate_text(model, self.tokenizer, text, batch_size=32, seed=0, **settings)
                results[label] = {
                    "figures": scored.figures(),
                    "is_exact": scored.is_exact,
                    "estimator": scored.estimator,
                    "sampler": scored.sampler,
                    "num_tokens": scored.num_tokens,
                    "num_words": scored.num_words,
                    "nfe": scored.nfe,
                }
            return results

        return part(self.output / "parts" / f"{split}-{name}-{seed}.json", compute)

    def _scored(self, name: str) -> dict[str, dict[str, Any]]:
        if name == "autoregressive":
            return {"left to right": {}}
        if name == "mdlm":
            return {"bound": {"num_draws": self.preset.num_draws}}
        if name == "lomdm":
            return {
                "bound": {"num_draws": self.preset.num_draws, "estimator": "jump_chain"},
                "bound without timing": {"num_draws": self.preset.num_draws},
            }
        strided = {f"S={s}": {"strategy": "strided", "num_streams": s} for s in self.preset.num_streams if s > 1}
        return {"left to right": {"strategy": "autoregressive"}, **strided}

    def frontier(self, judge: str) -> Frontier:
        reference = load_text(self.texts["validation"])[0]
        return Frontier(self.output / "parts", self.preset, self.tokenizer, judge, reference, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training_text")
    parser.add_argument("validation_text")
    parser.add_argument("test_text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--judge", help="folder or Hub name of a causal model that judges what is drawn")
    parser.add_argument("--test", action="store_true", help="score the test text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="to evaluate on; training takes an accelerator if there is one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    texts = {split: getattr(arguments, f"{split}_text") for split in ("training", "validation", "test")}
    comparison = Comparison(arguments.output, PRESETS[arguments.preset], texts, arguments.device)
    results: dict[str, Any] = {"preset": arguments.preset, "seeds": arguments.seeds}
    for seed in arguments.seeds:
        for name in arguments.models:
            key = f"{name}-{seed}"
            results[f"train-{key}"] = comparison.train(name, seed)
            results[f"validation-{key}"] = comparison.evaluate(name, seed, "validation")
    if arguments.judge is not None:
        frontier = comparison.frontier(arguments.judge)
        results["references"] = frontier.references()
        for seed in arguments.seeds:
            for name in arguments.models:
                load_model = partial(load, name, comparison.folder(name, seed), arguments.device)
                results[f"frontier-{name}-{seed}"] = list(frontier.points(name, seed, load_model))
    if arguments.test:
        for seed in arguments.seeds:
            for name in arguments.models:
                results[f"test-{name}-{seed}"] = comparison.evaluate(name, seed, "test")
    results["throughput"] = training_throughput(
        comparison.preset, comparison.tokenizer, arguments.output, arguments.device
    )
    print(write_summary(results, comparison.preset, arguments.output))


if __name__ == "__main__":
    main()
