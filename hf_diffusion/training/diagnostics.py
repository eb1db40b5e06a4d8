"""What a model says about itself while it is trained: in the Trainer's logs beside the loss, and as a picture."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


PREFIX = "diagnostics/"


class DiagnosticTrainer(Trainer):
    """A `Trainer` that logs the mean of every entry of its model's `outputs.diagnostics` since the last log.

    They are those of the first process, and of training batches only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._values: dict[str, list[torch.Tensor]] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            for name, value in (outputs.get("diagnostics") or {}).items():
                self._values.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            means = {PREFIX + name: torch.stack(values).mean().item() for name, values in self._values.items()}
            logs, self._values = {**logs, **means}, {}
        super().log(logs, *args, **kwargs)


def plot_diagnostics(log_history: list[dict[str, Any]], path: Path) -> bool:
    """Draw every diagnostic in a Trainer's `log_history` over steps into a PNG file. False if there are none."""
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name.startswith(PREFIX):
                curves.setdefault(name.removeprefix(PREFIX), []).append((entry["step"], value))
    if not curves:
        return False
    num_rows = -(-len(curves) // 2)
    figure = Figure(figsize=(8, 2 * num_rows), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(num_rows, 2, squeeze=False).flat, curves.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color="C0", linewidth=1)
        axes.set_title(name.replace("_", " "), fontsize=9)
    for axes in figure.axes[len(curves) :]:
        axes.set_visible(False)
    figure.supxlabel("optimiser step")
    figure.savefig(path, dpi=120)
    return True
