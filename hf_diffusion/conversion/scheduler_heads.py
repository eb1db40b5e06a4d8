"""Finds the parameters of LoMDM's two scheduler heads among tensors whose names nobody has published.

A tensor is taken where names and shapes leave one possibility. Where they leave more, the error lists what there is and
what is wanted, and a mapping says which is which.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..modeling.scheduler_head import SchedulerHead
from .checkpoint_reader import CheckpointError


HEADS = ("forward_scheduler", "reverse_scheduler")

ROLES = (("phi", "psi"), ("forward", "reverse"), ("forward", "backward"), ("posterior", "prior"), ("q", "p"))
"""Words that tell the head that reads the clean text from the other. A pair counts if every name has one of the two."""

NAMES = {
    "layer.input_layernorm": "norm1",
    "layer.post_attention_layernorm": "norm2",
    "layer.self_attn.q_proj": "q_proj",
    "layer.self_attn.k_proj": "k_proj",
    "layer.self_attn.v_proj": "v_proj",
    "layer.self_attn.o_proj": "attn_out",
}
"""Names that tell modules of equal shapes apart. What has one of them is taken for nothing else."""

_QKV = ("layer.self_attn.q_proj", "layer.self_attn.k_proj", "layer.self_attn.v_proj")
_FORM = '{"our name": "name in the file"}, or {"our name": {"name": ..., "rows": [start, stop]}} for a part of a tensor'

Shape = tuple[int, ...]


class Source(NamedTuple):
    """Where a parameter comes from: a tensor of the file, or some of its rows."""

    name: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors[self.name] if self.rows is None else tensors[self.name][slice(*self.rows)]


def head_shapes(config: Any) -> dict[str, Shape]:
    """Name and shape of every parameter of the two heads."""
    with torch.device("meta"):
        parameters = SchedulerHead(config).state_dict()
    return {f"{head}.{name}": tuple(tensor.shape) for head in HEADS for name, tensor in parameters.items()}


def read_mapping(mapping: Any) -> dict[str, Source]:
    """The sources that a mapping names, by our names. Raises ValueError if it has not the form of one."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"`mapping` is {mapping!r:.80}. It must be a dict: {_FORM}.")
    sources = {}
    for ours, value in mapping.items():
        match value:
            case str():
                sources[ours] = Source(value)
            case {"name": str(name), "rows": [int(start), int(stop)], **rest} if not rest:
                sources[ours] = Source(name, (start, stop))
            case _:
                raise ValueError(f"`mapping` has {value!r:.80} for `{ours}`. It must be of the form {_FORM}.")
    return sources


def check_sources(sources: Mapping[str, Source], tensors: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless each source fits its parameter, and all rows of what they name are used once."""
    for ours, source in sources.items():
        for name, names in ((ours, wanted), (source.name, tensors)):
            if name not in names:
                nearest = difflib.get_close_matches(str(name), names, n=1)
                what = "the heads have no parameter" if names is wanted else "besides its backbone, it holds no tensor"
                hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
                raise CheckpointError(f"`mapping` names `{name}`, but {what} of this name.{hint}")
        shape = tensors[source.name]
        if source.rows is not None:
            start, stop = source.rows
            if not shape or not 0 <= start < stop <= shape[0]:
                raise CheckpointError(f"`mapping` has `{source}` for `{ours}`, but that tensor has the shape {shape}.")
            shape = (stop - start, *shape[1:])
        if shape != wanted[ours]:
            raise CheckpointError(f"`mapping` has `{source}`, {shape}, for `{ours}`, which is {wanted[ours]}.")
    for name in dict.fromkeys(source.name for source in sources.values()):
        whole = (0, tensors[name][0])
        used = [row for source in sources.values() if source.name == name for row in range(*(source.rows or whole))]
        if sorted(used) != list(range(*whole)):
            fault = "more than once" if len(set(used)) < len(used) else "only in part"
            raise CheckpointError(f"`mapping` uses `{name}` {fault}, but each of its rows has one place.")


def match_heads(tensors: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Source]:
    """The sources of all parameters that are `wanted`, by our names. They use all of `tensors`.

    Raises:
        CheckpointError: if names and shapes leave several possibilities, or none. It lists what is left over.
    """
    sources: dict[str, Source] = {}
    heads = [head for head in HEADS if any(name.startswith(head) for name in wanted)]
    names_of_heads = _tell_apart(list(tensors), heads)
    for head, names in names_of_heads.items():
        offered = {plain: tensors[name] for plain, name in names.items()}
        asked = {name.removeprefix(f"{head}."): shape for name, shape in wanted.items() if name.startswith(head)}
        for ours, (plain, rows) in _match_head(offered, asked).items():
            sources[f"{head}.{ours}"] = Source(names[plain], rows)

    used = {source.name for source in sources.values()}
    missing = {name: shape for name, shape in wanted.items() if name not in sources}
    left = {name: shape for name, shape in tensors.items() if name not in used}
    if not missing and not left:
        return sources
    lists = f"Parameters without a tensor:\n{_lines(missing)}\nTensors without a parameter:\n{_lines(left)}\n"
    if sum(map(math.prod, missing.values())) != sum(map(math.prod, left.values())):
        raise CheckpointError(
            "its scheduler heads are of another network than ours, which is a transformer layer, a norm and an MLP, "
            f"without modulation and without biases in attention and norms. {lists}They differ in size, so no "
            "`mapping` helps."
        )
    unclear = (
        "tensor of its scheduler heads is which parameter" if names_of_heads else "scheduler head is the forward one"
    )
    raise CheckpointError(f"names and shapes do not say which {unclear}. {lists}Say it by `mapping`: {_FORM}.")


def _lines(shapes: Mapping[str, Shape]) -> str:
    return "\n".join(f"  {name} {shape}" for name, shape in shapes.items()) or "  none"


def _tell_apart(names: Sequence[str], heads: Sequence[str]) -> dict[str, dict[str, str]]:
    """For each head its names, by what they are without the word for it; {} if it is not clear whose they are."""
    if len(heads) == 1:
        return {heads[0]: {name: name for name in names}}
    readings = []
    for words in ROLES:
        reading: dict[str, dict[str, str]] = {}
        for head, word in zip(HEADS, words, strict=True):
            plain = {name: re.sub(rf"(?<![^._]){word}(?![^._])", "", name) for name in names}
            reading[head] = {short: name for name, short in plain.items() if short != name}
        if sorted(name for found in reading.values() for name in found.values()) == sorted(names):
            readings.append(reading)
    forward_ones = {frozenset(reading[HEADS[0]].values()) for reading in readings}
    return readings[0] if len(forward_ones) == 1 else {}


def _match_head(offered: Mapping[str, Shape], asked: Mapping[str, Shape]) -> dict[str, Source]:
    """Sources of the parameters of one head, as far as names and shapes leave one possibility."""
    theirs, ours = _by_module(offered), _by_module(asked)
    sources: dict[str, Source] = {}
    if all(projection in ours for projection in _QKV):
        rows, width = ours[_QKV[0]]["weight"]
        fused = [module for module, shapes in theirs.items() if shapes == {"weight": (3 * rows, width)}]
        if len(fused) == 1:
            del theirs[fused[0]]
            for start, projection in zip(range(0, 3 * rows, rows), _QKV, strict=True):
                del ours[projection]
                sources[f"{projection}.weight"] = Source(f"{fused[0]}.weight", (start, start + rows))

    pairs = {}
    for module, name in NAMES.items():
        named = [other for other in theirs if _last(other) == name]
        if module in ours and len(named) == 1 and theirs[named[0]] == ours[module]:
            pairs[module] = named[0]
    for module, shapes in ours.items():
        rivals = [other for other in ours if ours[other] == shapes and other not in pairs]
        candidates = [other for other in theirs if theirs[other] == shapes and _last(other) not in NAMES.values()]
        if rivals == [module] and len(candidates) == 1:
            pairs[module] = candidates[0]
    for module, other in pairs.items():
        sources |= {f"{module}.{parameter}": Source(f"{other}.{parameter}") for parameter in ours[module]}
    return sources


def _last(module: str) -> str:
    """The last part of a name without the word for its head."""
    return module.rpartition(".")[2].strip("_")


def _by_module(shapes: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """Shapes by the name of a module and, in it, that of a parameter."""
    modules: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = shape
    return modules
