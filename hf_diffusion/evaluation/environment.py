"""What a measured number depends on besides the code that it is measured with."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


def environment() -> dict[str, Any]:
    """Commit (None outside a checkout of this package), versions, and hardware."""
    from .. import __version__

    return {
        "commit": _commit(),
        "hf_diffusion": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _commit() -> str | None:
    """Of the checkout that this file is tracked in; another repository around an installed package does not count."""
    here = Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    return done.stdout.strip()
