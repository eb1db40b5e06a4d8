"""What a checkpoint must hold, and errors that name the file and the tensor where it does not.

transformers loads a checkpoint that lacks tensors, or has some too many, with a warning, and does not look at values.
Everything here but `check_finite` reads file headers only, and only after something has gone wrong.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file


SUMMABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def name_damaged_file(source: str | os.PathLike, options: dict[str, Any]) -> Iterator[None]:
    """Say which file of weights, or index of them, is lacking or cannot be read, and which tensors that costs."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        if isinstance(error, OSError) and not os.path.isdir(source):
            raise  # the Hub's own errors say what could not be fetched
        for path in sorted(_folder(source, options).glob("pytorch_model*.bin")):
            if not zipfile.is_zipfile(path):  # whose directory stands at its end
                raise ValueError(f"`{path}` is damaged or cut off ({error}). Fetch it again.") from error
        if isinstance(error, EOFError | RuntimeError):
            raise
        shards = _shards(source, options)
        for path in sorted({*_files(source, options), *shards.values()}):
            if not path.is_file():
                held = [name for name, shard in shards.items() if shard == path]
                raise FileNotFoundError(
                    f"`{path}` is missing, which holds `{min(held)}`{_and_more(held)}. Fetch it again."
                ) from error
            try:
                _tensors(path)
            except SafetensorError as own_error:
                lost = _cut_off(path) or [name for name, shard in shards.items() if shard == path]
                names = f": `{min(lost)}` cannot be read{_and_more(lost)}" if lost else ""
                raise ValueError(f"`{path}` is damaged or cut off{names} ({own_error}). Fetch it again.") from error
        raise


def check_tensors(
    model: Any,
    report: dict[str, Any],
    source: str | os.PathLike,
    options: dict[str, Any],
    other_shapes: bool,
    other_tensors: bool,
) -> None:
    """Raise ValueError unless the checkpoint holds the tensors of the model, and no more.

    A checkpoint of another class of the family may lack this class's head, and have its own.

    Args:
        report: `output_loading_info` of transformers.
        options: of `from_pretrained`.
        other_shapes: whether tensors may have other shapes than in the model.
        other_tensors: whether tensors may be missing, or left over.
    """
    if report["mismatched_keys"] and not other_shapes:
        name, found, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"`{name}` has the shape {tuple(found)} in {_holders(name, source, options)}, and {tuple(wanted)} by the "
            f"configuration{_and_more(report['mismatched_keys'])}. Mend {CONFIG_NAME}; `ignore_mismatched_sizes=True` "
            "starts such tensors afresh."
        )
    if other_tensors:
        return
    missing, left_over = report["missing_keys"], report["unexpected_keys"]
    architectures = model.config.architectures
    if architectures and type(model).__name__ not in architectures:
        base = f"{model.base_model_prefix}."
        left_over = {name for name in left_over if name.startswith(base)}
        if model.base_model is not model:
            missing = {name for name in missing if name.startswith(base)}
    remedy = f"Fetch it again, or mend {CONFIG_NAME}; `output_loading_info=True` loads it all the same."
    if missing:
        name = min(missing)
        raise ValueError(f"`{name}` is missing in {_holders(name, source, options)}{_and_more(missing)}. {remedy}")
    if left_over:
        name = min(left_over)
        raise ValueError(
            f"`{name}` in {_holders(name, source, options)} has no place in a {type(model).__name__} of this "
            f"configuration{_and_more(left_over)}. {remedy}"
        )


def check_finite(model: torch.nn.Module, source: str | os.PathLike, options: dict[str, Any]) -> None:
    """Raise ValueError for a weight that is NaN or infinite.

    Costs a sum over each weight. Weights that are not in memory (offloaded) and quantised ones are not looked at.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta or weight.dtype not in SUMMABLE or type(weight) is not torch.nn.Parameter:
            continue
        # A sum is not finite if any of its terms is not, and is cheaper; if it has only overflown, look closer.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(
                f"`{name}` holds NaN or infinite values in {_holders(name, source, options)}. The checkpoint is of no "
                "use: take an earlier one."
            )


def _folder(source: str | os.PathLike, options: dict[str, Any]) -> Path:
    """Where the files of a checkpoint are, which have been fetched."""
    subfolder = options.get("subfolder", "")
    if os.path.isdir(source):
        return Path(source, subfolder)
    where = {name: options[name] for name in ("cache_dir", "revision", "token") if options.get(name) is not None}
    return Path(cached_file(source, CONFIG_NAME, subfolder=subfolder, local_files_only=True, **where)).parent


def _files(source: str | os.PathLike, options: dict[str, Any]) -> list[Path]:
    return sorted(_folder(source, options).glob("*.safetensors"))


def _shards(source: str | os.PathLike, options: dict[str, Any]) -> dict[str, Path]:
    """The file that holds each tensor, by the index; nothing for a checkpoint without one."""
    index = _folder(source, options) / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return {}
    try:
        held = json.loads(index.read_text())["weight_map"]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{index}` is damaged or cut off, and so no tensor can be found ({error}). Fetch it again."
        ) from error
    return {name: index.with_name(file) for name, file in held.items()}


def _cut_off(path: Path) -> list[str]:
    """The tensors of a safetensors file that lie beyond its end; nothing if its header is damaged too."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError:
            return []
    size = path.stat().st_size - 8 - length
    header.pop("__metadata__", None)
    return [name for name, tensor in header.items() if tensor["data_offsets"][1] > size]


def _tensors(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _holders(name: str, source: str | os.PathLike, options: dict[str, Any]) -> str:
    """The file that holds a tensor or, by the index, should; all files if its name does not say."""
    paths, shards = _files(source, options), _shards(source, options)
    holders = [path for path in paths if shards.get(name) == path or name in _tensors(path)]
    return ", ".join(f"`{path}`" for path in holders or paths) or f"`{source}`"


def _and_more(names: Iterable) -> str:
    others = len(list(names)) - 1
    return f", and so for {others} more" if others else ""
