"""Checkpoints of the MDLM reference implementation: Lightning files with raw and with averaged weights.

Nothing in the file is run, and nothing is written before everything fits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modeling.configuration_mdlm import MDLMConfig
from ..modeling.configuration_mdlm_ar import MDLMARConfig
from ..modeling.modeling_mdlm import MDLMForMaskedDiffusion
from ..modeling.modeling_mdlm_ar import MDLMARForCausalLM
from .checkpoint_reader import CheckpointError
from .imported_checkpoint import ImportedCheckpoint, build, convert
from .lightning_file import few, lightning_file
from .mdlm_network import (
    PREFIX,
    ROTARY_BUFFER,
    accept_settings,
    check_rotary,
    check_shapes,
    conditioning_size,
    first_said,
    make_config,
    network_weights,
    published_shapes,
    read_architecture,
    read_least_time,
)
from .mdlm_siblings import setting


_SCHEDULES = {"loglinear": "loglinear", "log-linear": "loglinear", "cosine": "cosine", "cosinesqr": "cosine_squared"}


def load_mdlm_checkpoint(path: str | Path, use_ema: bool = True, **settings: Any) -> ImportedCheckpoint:
    """Read a `.ckpt` file of the MDLM repository, or of one that trains the same models.

    Args:
        path: the file. It is read without running anything in it.
        use_ema: take the averaged weights, which evaluation and sampling use; the raw ones if False.
        settings: fields of `MDLMConfig` that the file does not hold or holds wrongly; and `parameterization="subs"`
            where it does not say what the network predicts.

    Returns:
        The model, an `MDLMForMaskedDiffusion`, or an `MDLMARForCausalLM` if the file is of the autoregressive baseline;
        and what else the file says.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError, a ValueError: if the file is damaged or foreign, if names are missing or too many, if shapes do
            not fit, if numbers are not finite, or if something has to be said by name.
    """
    given = accept_settings(MDLMConfig, settings)
    with lightning_file(path, use_ema) as file:
        network = network_weights(file.weights)
        _refuse_surplus([name for name in file.weights if not name.startswith(PREFIX)])
        is_causal = conditioning_size(network) is None
        found = read_architecture(network, file) | ({} if is_causal else _read_objective(file.settings))
        config = make_config(MDLMARConfig if is_causal else MDLMConfig, found, given, file.settings)
        if not is_causal and config.time_conditioning and setting(file.settings, "training", "change_of_variables"):
            raise CheckpointError(
                "it was trained with `change_of_variables` and time conditioning, so its network reads the time in "
                "place of the noise level. That is not supported."
            )
        shapes = published_shapes(config)
        check_shapes(network, shapes)
        if ROTARY_BUFFER in network:
            check_rotary(network[ROTARY_BUFFER], config)
        weights = {name: tensor for name, tensor in network.items() if name != ROTARY_BUFFER}
        _refuse_surplus([name for name in weights if name not in shapes])
        chosen = file.chosen({PREFIX + name: tensor for name, tensor in weights.items()})
        return build(MDLMARForCausalLM if is_causal else MDLMForMaskedDiffusion, config, chosen, file)


def convert_mdlm_checkpoint(
    path: str | Path, output: str | Path, use_ema: bool = True, tokenizer: Any = None, **settings: Any
) -> ImportedCheckpoint:
    """`load_mdlm_checkpoint`, and the model written to the folder `output`, in full or not at all.

    Args:
        tokenizer: a tokenizer to write beside the model. Its mask token is set to the model's.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder.
    """
    return convert(lambda: load_mdlm_checkpoint(path, use_ema, **settings), output, tokenizer)


def _refuse_surplus(names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"it holds {few(names)} besides the network of MDLM. It is a checkpoint of something else; of a LoMDM if "
            "these are its two scheduler heads, which `hf-diffusion convert lomdm` reads."
        )


def _read_objective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was trained, as fields of `MDLMConfig`; what the file does not say is left to the defaults."""
    objective: dict[str, Any] = read_least_time(settings)
    schedule = setting(settings, "noise", "type")
    if isinstance(schedule, str) and schedule in _SCHEDULES:
        objective["noise_schedule"] = _SCHEDULES[schedule]
    elif schedule in ("linear", "geometric"):
        ends = {end: setting(settings, "noise", end) for end in ("sigma_min", "sigma_max")}
        objective["noise_schedule"] = {"type": schedule, **{end: v for end, v in ends.items() if v is not None}}
    elif schedule is not None:
        objective["noise_schedule"] = None  # has to be said
    if setting(settings, "training", "antithetic_sampling") is not None:
        objective["low_discrepancy"] = bool(setting(settings, "training", "antithetic_sampling"))
    timesteps = first_said(setting(settings, "algo", "T"), setting(settings, "T"))
    if timesteps:
        return objective | {"num_timesteps": timesteps}
    if setting(settings, "training", "importance_sampling"):
        objective["time_law"] = "importance"
    return objective
