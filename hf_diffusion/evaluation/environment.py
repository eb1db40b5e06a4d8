"""What a measured number depends on besides the code that it is measured with."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "lm_eval", "mauve-text")


def environment() -> dict[str, Any]:
    """Commit, versions (None for what is not installed) and hardware, fit for JSON."""
    from .. import __version__

    return {
        **checkout(Path(__file__)),
        "hf_diffusion": __version__,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "accelerator": _accelerator(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def checkout(file: Path) -> dict[str, Any]:
    """Of the checkout that a file is tracked in; another repository around an installed package does not count.

    Returns:
        "commit", and "uncommitted_changes": whether any tracked file differs from it. None for both outside a checkout.
    """
    outputs = []
    commands = (
        ["ls-files", "--error-unmatch", file.name],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no"],
    )
    for command in commands:
        try:
            done = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return {"commit": None, "uncommitted_changes": None}
        outputs.append(done.stdout.strip())
    return {"commit": outputs[1], "uncommitted_changes": bool(outputs[2])}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    """The processor's name: Linux says it in a file, others to `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    name = device.type if get_name is None else get_name()
    return f"{torch.accelerator.device_count()} x {name}"


__all__ = ["checkout", "environment"]
