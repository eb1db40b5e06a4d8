"""A training run as pictures, kept up to date while it goes on."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .diagnostics import plot_diagnostics


logger = logging.get_logger(__name__)


def plot_losses(log_history: list[dict[str, Any]], path: Path, phases: dict[str, int] | None = None) -> None:
    """Draw every loss in a Trainer's `log_history` over steps, in nats per token, into a PNG file.

    Args:
        phases: name and first step of the phases of training, drawn as vertical lines.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name == "loss":
                curves.setdefault("training", []).append((entry["step"], value))
            elif name.startswith("eval_") and name.endswith("_loss"):
                held_out = name.removeprefix("eval_").removesuffix("_loss").removesuffix("loss")
                curves.setdefault(held_out or "validation", []).append((entry["step"], value))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves.items():
        steps, losses = zip(*points, strict=True)
        style: dict[str, Any] = (
            {"color": "0.75", "linewidth": 1} if label == "training" else {"marker": "o", "markersize": 3}
        )
        axes.plot(steps, losses, label=label.replace("_", " "), **style)
    for number, (name, step) in enumerate((phases or {}).items()):
        axes.axvline(step, color="0.6", linestyle=":", linewidth=1)
        below_top = (3, -12 * (number + 1))
        axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), xytext=below_top, textcoords="offset points")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    if curves:
        axes.legend()
    figure.savefig(path, dpi=120)


class LossCurveCallback(TrainerCallback):
    """Keeps `loss.png` in the output folder up to date, after every round of evaluations and at the end of training.

    And `diagnostics.png`, if the model says anything about itself.
    """

    def __init__(self, phases: dict[str, int] | None = None) -> None:
        self.phases = phases
        self._behind = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Several texts or orders are evaluated one after the other, and each is told of here: drawing takes a second.
        self._behind = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._behind:
            self._plot(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._plot(args, state)

    def _plot(self, args: TrainingArguments, state: TrainerState) -> None:
        self._behind = False
        if not state.is_world_process_zero or not state.log_history:
            return
        try:
            folder = Path(str(args.output_dir))
            plot_losses(state.log_history, folder / "loss.png", self.phases)
            plot_diagnostics(state.log_history, folder / "diagnostics.png")
        except ModuleNotFoundError:
            logger.warning_once("No loss curves: matplotlib is not installed (`pip install hf-diffusion[train]`).")
