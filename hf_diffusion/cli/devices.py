"""Whether the machine has what `--device` names, before a model is loaded."""

import torch


def check_device(device: str) -> None:
    """Raise ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device`={device!r} is not to be had here: {reason} Try cpu.") from None
