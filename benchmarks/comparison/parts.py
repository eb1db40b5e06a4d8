"""What a comparison has finished, one file a part: a run that is interrupted goes on from them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_diffusion.evaluation import environment

from .presets import Preset


def part(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in `path`, which is computed first if it is not there."""
    if not path.is_file():
        print(path.stem, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**compute(), "environment": environment()}, indent=2) + "\n")
        unfinished.replace(path)
    return json.loads(path.read_text())


def check_settings(output: Path, preset: Preset, texts: dict[str, str]) -> None:
    """Raise ValueError if `output` holds parts of another comparison."""
    settings = json.loads(json.dumps({"preset": asdict(preset), "texts": texts}))
    path = output / "settings.json"
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
    found = json.loads(path.read_text())
    for name in settings:
        if found.get(name) != settings[name]:
            raise ValueError(
                f"`output`={str(output)!r} holds a comparison with another {name}. Name another folder for this one."
            )
