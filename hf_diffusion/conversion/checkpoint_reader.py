"""Reads pickled PyTorch checkpoints without running anything that they contain.

A pickle is a program: it may import any module and call anything in it. `read_checkpoint` follows it on a machine of
its own, which knows plain values, containers and tensors, and cannot import or call. Whatever else the file names
becomes an inert `Shell`. So it reads files from strangers, and files whose classes are gone or not installed.
"""

import mmap
import os
import pickletools
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import torch


__all__ = ["CheckpointError", "Shell", "read_checkpoint", "to_plain"]


class CheckpointError(ValueError):
    """The file is not a readable PyTorch checkpoint. The message names the file, the fault and the remedy."""


@dataclass(eq=False, repr=False, slots=True)
class Shell:
    """Stands in the place of an object whose class is not admitted. It holds what the file said and does nothing."""

    module: str
    qualname: str
    args: tuple | None = None  # what the class or function would have been called with; None if it is only named
    kwargs: dict | None = None
    state: Any = None  # what its __setstate__ would have been given
    items: list[Any] = field(default_factory=list)  # what would have been put into it: values or (key, value) pairs

    def __repr__(self) -> str:
        keys = [key for key in self.state if type(key) is str] if isinstance(self.state, dict) else []
        text = f"<inert {self.module}.{self.qualname}{' with ' * bool(keys)}{', '.join(keys)}>"
        return ascii(text)[1:-1]  # no control characters from a file


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a dict that `torch.save` wrote (in its zip format, the default since torch 1.6) and runs none of it.

    Tensors come on the CPU with their dtype, shape and strides, and share memory where they did. They are mapped from
    the file, which is read once to compare checksums, and again where they are used: leave it alone as long as they
    live. Writing into them does not reach it.

    Numbers, strings and builtin containers come as they are, a `defaultdict` as a dict, everything else as a `Shell`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, is not of this kind, or holds tensors that are not plain dense ones.
            Damage inside a record is found by its checksum, which `torch.save` writes unless told not to
            (`torch.serialization.set_crc32_options`).
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        try:
            value = _read_archive(file)
        except CheckpointError as error:
            raise CheckpointError(f"Cannot read {name}: {error}.") from None
        except Exception as error:  # damaged bytes fail anywhere and in any way
            reason = f"it is truncated or damaged ({type(error).__name__}: {error})"
            raise CheckpointError(f"Cannot read {name}: {reason}. Download or save it again.") from error
    if not isinstance(value, dict):
        what = value if isinstance(value, Shell) else f"a {type(value).__name__}"
        raise CheckpointError(f"Cannot read {name}: it holds {what}, not a dict. Save a dict, such as a state dict.")
    return value


def to_plain(value: Any) -> Any:
    """Copies nested dicts, lists and tuples, with the omegaconf shells in them turned into dicts, lists and values.

    Interpolations stay the text that they are (`${...}`), as does `???`. Tensors and other shells stay what they are.
    """
    if isinstance(value, Shell) and value.module.startswith("omegaconf.") and isinstance(value.state, dict):
        content = value.state.get("_content", value.state.get("_val", value))  # of a container, of a leaf
        return content if content is value else to_plain(content)
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return type(value)(map(to_plain, value)) if type(value) in (list, tuple) else value


def _refuse_other_formats(head: bytes) -> None:
    if bytes.fromhex("6cfc9c46f9206aa85019") in head:
        raise CheckpointError("it is in the format of torch before 1.6. Load it with torch.load and save it again")
    if head[6:9] == b"\0\0{":
        raise CheckpointError("it is a safetensors file. Read it with safetensors.torch.load_file")
    if head and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head):
        raise CheckpointError("it is text, as a download page or a Git LFS pointer is. Download the file itself")


def _read_archive(file: IO[bytes]) -> Any:
    """Reads a zip archive of `<folder>/data.pkl`, `<folder>/byteorder` and `<folder>/data/<key>`."""
    _refuse_other_formats(file.read(64))
    infos = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    folder = next(iter(infos), "").split("/")[0]
    if f"{folder}/data.pkl" not in infos:
        raise CheckpointError("it is a zip archive, but not one of torch.save. Unpack it if a checkpoint is inside")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    storages: dict[str, torch.Tensor] = {}

    def record(name: str) -> memoryview:
        info = infos[f"{folder}/{name}"]
        signature, name_size, extra_size = struct.unpack_from("<4s22x2H", mapped, info.header_offset)
        if signature != b"PK\x03\x04" or info.compress_type or info.flag_bits & 1:
            raise ValueError(f"the record {name!a} is compressed, encrypted or not in its place")
        start = info.header_offset + 30 + name_size + extra_size
        content = memoryview(mapped)[start : start + info.file_size]
        if info.CRC and zlib.crc32(content) != info.CRC:  # 0 is what torch.save writes in place of a checksum
            raise CheckpointError(f"its record {info.filename!a} is damaged (checksum). Download or save it again")
        return content

    def elements(reference: Any) -> torch.Tensor:
        """What a persistent id stands for: the elements of a storage."""
        _, kind, key, _, count = reference if type(reference) is tuple else ()
        if type(key) is not str or kind.qualname not in _DTYPES:
            raise CheckpointError(f"it holds a {kind} that is not of a plain tensor. Save plain dense tensors")
        dtype = _DTYPES[kind.qualname]
        if key not in storages:
            flat = torch.frombuffer(record(f"data/{key}"), dtype=torch.uint8) if count else torch.empty(0).byte()
            storages[key] = flat.clone() if flat.data_ptr() % 16 else flat  # numbers must be aligned
        if len(storages[key]) != count * dtype.itemsize:
            raise ValueError(f"the storage {key!a} has {len(storages[key])} bytes instead of {count * dtype.itemsize}")
        return storages[key].view(dtype)

    if f"{folder}/byteorder" in infos and bytes(record("byteorder")) != sys.byteorder.encode():
        raise CheckpointError(f"its numbers are not {sys.byteorder}-endian. Save it on a computer like this one")
    return _interpret(bytes(record("data.pkl")), elements)


def _interpret(program: bytes, persistent: Callable[[Any], Any]) -> Any:
    """Follows a pickle on a machine with a stack, marks in it and a memo, and returns its value."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(program):
        if opcode.name in _LITERALS:
            stack.append(arg)
        elif opcode.name in _OPERATIONS:
            count, operation = _OPERATIONS[opcode.name]
            start = len(stack) - count if count >= 0 else marks.pop() + 1 + count
            stack[start:] = [operation(*stack[start:])]
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name == "GLOBAL":
            stack.append(_name(*str(arg).split(" ", 1)))
        elif opcode.name == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif opcode.name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"torch.save does not write the opcode {opcode.name}")
    return stack.pop()


# What a file can ask for. No name that it chooses is looked up elsewhere, and no object that it makes is called.


def _name(module: str, qualname: str) -> Any:
    if type(module) is not str or type(qualname) is not str:
        raise TypeError("a name is not text")
    value = vars(torch).get(qualname) if module == "torch" else None
    return value if isinstance(value, torch.dtype) and qualname[0] != "q" else Shell(module, qualname)


def _make(callee: Shell, args: tuple, kwargs: dict | None = None) -> Any:
    qualname = callee.qualname if callee.args is None else f"{callee.qualname}()"
    name = f"{callee.module}.{qualname}"
    if name in _MAKERS and type(args) is tuple:
        return _MAKERS[name](*args)
    if name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
        raise CheckpointError(f"it holds a tensor that is not plain ({name!a}). Save plain dense tensors")
    return Shell(callee.module, qualname, args, kwargs)


def _set_state(target: Any, state: Any) -> Any:
    if isinstance(target, Shell):
        target.state = state
    elif not isinstance(target, OrderedDict):  # whose state is the version of each module, which nothing here reads
        raise TypeError(f"a {type(target).__name__} has no state")
    return target


def _put(target: Any, *values: Any) -> Any:
    if isinstance(target, set):
        target.update(_keys(values))
    else:
        (target.items if isinstance(target, Shell) else target).extend(values)
    return target


def _put_pairs(target: Any, *values: Any) -> Any:
    pairs = zip(_keys(values[::2]), values[1::2], strict=True)
    target.update(pairs) if isinstance(target, dict) else target.items.extend(pairs)
    return target


def _keys(keys: Iterable, depth: int = 3) -> Iterable:
    """The same keys. Deeply nested ones are refused: Python hashes by a recursion that can end the process."""
    for key in keys:
        if isinstance(key, (tuple, frozenset)):
            if depth == 0:
                raise ValueError("a key is nested too deeply")
            _keys(key, depth - 1)
    return keys


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, grad: bool, *rest: Any) -> torch.Tensor:
    """A tensor in the memory and of the dtype of `storage` [elements]; `rest` is hooks, not kept, and metadata."""
    if any(rest[1:]):
        raise CheckpointError("it holds a lazily conjugated or negated tensor. Save its resolve_conj().resolve_neg()")
    if not type(size) is type(stride) is tuple or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor has an impossible shape")
    end = offset + (0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)))
    if end * storage.itemsize > storage.untyped_storage().nbytes():
        raise ValueError("a tensor reaches outside of its storage")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_(grad)


_DENSE = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = {f"{name}Storage": getattr(torch, f"{name}Tensor").dtype for name in _DENSE}
_DTYPES |= {"ComplexFloatStorage": torch.cfloat, "ComplexDoubleStorage": torch.cdouble, "UntypedStorage": torch.uint8}

# Opcodes that come with a number, text or bytes.
_LITERALS = {op.name for op in pickletools.opcodes if op.arg and op.stack_after not in ([], [pickletools.anyobject])}
# How many values an opcode takes (all above the mark, or these and the one below), and what it makes of them.
_TO_MARK, _BELOW_MARK = -1, -2
_OPERATIONS: dict[str, tuple[int, Callable[..., Any]]] = {"NONE": (0, lambda: None), "NEWTRUE": (0, lambda: True)}
_OPERATIONS |= {"EMPTY_TUPLE": (0, tuple), "EMPTY_LIST": (0, list), "EMPTY_DICT": (0, dict), "EMPTY_SET": (0, set)}
_OPERATIONS |= {f"TUPLE{n or ''}": (n or _TO_MARK, lambda *values: values) for n in (0, 1, 2, 3)}
_OPERATIONS |= {"NEWFALSE": (0, lambda: False), "FROZENSET": (_TO_MARK, lambda *values: frozenset(_keys(values)))}
_OPERATIONS |= {"APPEND": (2, _put), "APPENDS": (_BELOW_MARK, _put), "ADDITEMS": (_BELOW_MARK, _put)}
_OPERATIONS |= {"SETITEM": (3, _put_pairs), "SETITEMS": (_BELOW_MARK, _put_pairs), "BUILD": (2, _set_state)}
_OPERATIONS |= {"REDUCE": (2, _make), "NEWOBJ": (2, _make), "NEWOBJ_EX": (3, _make), "STACK_GLOBAL": (2, _name)}
# The only names that give more than a shell or a dtype. `list.copy` and `tuple.__add__` refuse other iterables.
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": lambda storage, *args: _tensor(storage.view(args[5]), *args[:5], *args[6:]),
    "torch._utils._rebuild_parameter": lambda data, grad, hooks: torch.nn.Parameter(data, grad),
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: torch.nn.Parameter(data, grad),
    "torch.Size": lambda size: torch.Size(tuple.__add__((), size)),
    "collections.OrderedDict": lambda: OrderedDict(),
    "collections.defaultdict": lambda factory=None: {},
    "__builtin__.set": lambda values: set(_keys(list.copy(values))),
    "__builtin__.frozenset": lambda values: frozenset(_keys(list.copy(values))),
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": lambda text, latin1: text.encode("latin1"),  # how protocol 2 has bytes
}
