"""Tells MDLM checkpoints from those of models that use the same network, and so the same names, for something else.

BD3-LM, DUO, Eso-LM, UDLM and SEDD files would all load as MDLM, and none would mean what MDLM takes it to mean.
"""

from collections.abc import Mapping
from typing import Any


ALGORITHMS = {
    "bd3lm": "a block diffusion model (BD3-LM): it was trained to predict a noisy block from clean ones before it, "
    "with the noisy and the clean text side by side. Reading its files is not supported",
    "duo": "a DUO model: its noise replaces tokens by random ones and has no mask token, so it cannot be read as a "
    "masked-diffusion model. Uniform-state diffusion is not supported",
    "esolm": "an Eso-LM: it attends causally in the order of generation, with positions sorted, which MDLM does not. "
    "Eso-LM is not supported",
    "udlm": "a uniform-state diffusion model (UDLM): its noise replaces tokens by random ones and has no mask token. "
    "Uniform-state diffusion is not supported",
    "sedd": "a SEDD model: it predicts ratios of probabilities in place of tokens. Score-entropy diffusion is not "
    "supported",
    "d3pm": "a D3PM model: it was trained without SUBS, whose predictions exclude the mask token and keep visible "
    "tokens. Only the parametrisations 'subs' and 'ar' are supported",
    "mamba": "a model with the Mamba backbone. Only the transformer (DiT) is supported",
}
"""What a file is that is not MDLM's, by the name that it is refused under."""


def setting(settings: Mapping[str, Any], *path: str) -> Any:
    """The value at `path` in nested settings; None if it is not there or an interpolation that nobody has resolved."""
    value: Any = settings
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if isinstance(value, str) and (value.startswith("${") or value == "???") else value


def find_sibling(checkpoint: Mapping[str, Any], settings: Mapping[str, Any], names: set[str]) -> str | None:
    """The key in `ALGORITHMS` of a file that is not MDLM's; None for one that may be.

    Args:
        checkpoint: the file's top level.
        settings: its hyper-parameters, {} if there are none.
        names: the names of its parameters and buffers.
    """
    if "sampling_eps_min" in checkpoint or "sampling_eps_min" in names:
        return "bd3lm"
    if any(name.startswith(("backbone.cond_map.", "cond_map.")) for name in names):
        return "udlm"
    if any(".mixer." in name for name in names) or "mamba" in str(setting(settings, "backbone")):
        return "mamba"
    model = checkpoint.get("model")
    if isinstance(model, Mapping) and any(str(name).endswith("vocab_embed.embedding") for name in model):
        return "sedd"  # its own repository keeps the weights under this name
    if setting(settings, "graph", "type") is not None:
        return "sedd"  # and its noise under this one
    algorithm = str(setting(settings, "algo", "name") or "").lower().replace("-", "").replace("_", "")
    for prefix, sibling in (("bd3", "bd3lm"), ("duo", "duo"), ("distill", "duo"), ("eso", "esolm"), ("udlm", "udlm")):
        if algorithm.startswith(prefix):
            return sibling
    if algorithm in ("sedd", "d3pm"):
        return algorithm
    if setting(settings, "diffusion") == "uniform":
        return "udlm"
    meaning = parameterization(settings)
    return meaning if meaning in ("sedd", "d3pm") else None


def parameterization(settings: Mapping[str, Any]) -> str | None:
    """What the network's output means, as the settings of any of the repositories name it; None if they do not."""
    return setting(settings, "algo", "parameterization") or setting(settings, "parameterization")


def describe_folder(config: Mapping[str, Any] | None) -> str:
    """What a folder is, and what to do with it, by the `config.json` in it; None if it has none."""
    if config is None:
        return "is a folder. Name the checkpoint file in it"
    model_type = config.get("model_type")
    if model_type in ("mdlm", "mdlm_ar", "lomdm"):
        return "is a folder that loads as it is. Use AutoModel.from_pretrained"
    named = str(model_type).lower()
    sibling = named if named in ALGORITHMS else find_sibling({}, config, set())
    if sibling is not None:
        return f"is {ALGORITHMS[sibling]}"
    what = "names no `model_type`" if model_type is None else f"names the `model_type` {model_type!r:.80}"
    return f"is a folder whose `config.json` {what}, so it is not of MDLM. Name a checkpoint file if it has one"
