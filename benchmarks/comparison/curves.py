"""The course of training of all models of a comparison in one picture."""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from .models import NAMES


Curve = dict[int, float]


def validation_curve(folder: Path) -> Curve:
    """Validation loss in nats per token by step, of weights as they are then, not averaged; ARMD left to right."""
    states = list(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))
    if not states:
        return {}
    last = max(states, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")))
    history = json.loads(last.read_text())["log_history"]
    names = ("eval_left_to_right_loss", "eval_bound_loss")
    return {entry["step"]: entry[name] for entry in history for name in names if name in entry}


def mean_curve(curves: list[Curve]) -> Curve:
    """Over seeds, at steps that all have."""
    steps = set.intersection(*map(set, curves)) if curves else set()
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(steps)}


def plot_curves(curves: dict[str, list[Curve]], tokens_per_step: int, path: Path) -> None:
    """
    Args:
        curves: one for each seed, by name of the model.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, of_seeds) in enumerate(curves.items()):
        for seed, curve in enumerate(of_seeds):
            tokens = [step * tokens_per_step / 1e6 for step in curve]
            label = NAMES[name] if seed == 0 else None
            axes.plot(tokens, list(curve.values()), color=f"C{number}", linewidth=1.2, label=label)
    axes.set_xlabel("tokens read (millions)")
    axes.set_ylabel("validation loss or bound (nats per token)")
    axes.legend(fontsize=8)
    figure.savefig(path)
