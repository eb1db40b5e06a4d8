"""How fast each model of a comparison is trained, all of them in one run."""

from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from harness import best_seconds

from .models import make_recipe
from .parts import part
from .presets import Preset


def training_throughput(preset: Preset, tokenizer: Any, output: Path, device: str) -> dict[str, Any]:
    """Tokens per second, of CPU time on a CPU, of a step with its optimiser, by model."""

    def compute() -> dict[str, Any]:
        texts = torch.randint(len(tokenizer) - 2, (preset.shared["batch_size"], preset.shared["text_length"]))
        cases, is_cpu = {}, device == "cpu"
        for name in ("autoregressive", "mdlm", "lomdm", "armd"):
            recipe = make_recipe(name, 0, preset, text=__file__, tokenizer=output / "tokenizer", output=output)
            model = recipe.build_model(tokenizer).train().to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            batch = recipe.collator(tokenizer)([{"input_ids": text} for text in texts])
            batch = {field: value.to(device) for field, value in batch.items()}

            def step(model: Any = model, optimizer: Any = optimizer, batch: Any = batch) -> None:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if not is_cpu:
                    torch.accelerator.synchronize()

            cases[name] = step
        seconds = best_seconds(cases, rounds=5, clock=process_time if is_cpu else perf_counter)
        return {
            "device": device,
            "tokens_per_second": {name: texts.numel() / value for name, value in seconds.items()},
        }

    return part(output / "parts" / "training-throughput.json", compute)
