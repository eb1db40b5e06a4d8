"""Files such as `torch.save` writes, by it and by hand; and what is the same about two things read from files."""

import struct
import warnings
import zipfile

import torch


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def assert_same(mine, reference):
    """Same structure, and tensors that agree in all that a state dict can show."""
    if isinstance(reference, torch.Tensor):
        assert type(mine) is type(reference)
        assert (mine.dtype, mine.shape, mine.stride()) == (reference.dtype, reference.shape, reference.stride())
        assert (mine.storage_offset(), mine.requires_grad) == (reference.storage_offset(), reference.requires_grad)
        assert mine.device.type == "cpu" and mine.is_leaf
        whole, expected = (torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in (mine, reference))
        assert torch.equal(whole, expected)
    elif isinstance(reference, dict):
        assert list(mine) == list(reference)
        for key in reference:
            assert_same(mine[key], reference[key])
    elif isinstance(reference, (list, tuple)):
        assert type(mine) is type(reference) and len(mine) == len(reference)
        for one, other in zip(mine, reference, strict=True):
            assert_same(one, other)
    else:
        assert type(mine) is type(reference) and mine == reference


def save(value, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, **options)
    return path


def archive(path, program, storages=(), byteorder=b"little", compression=zipfile.ZIP_STORED):
    """A file such as torch.save writes, around a pickle made by hand."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", byteorder)
        for key, data in enumerate(storages):
            file.writestr(f"archive/data/{key}", data)
    return path


def text(value):
    """What puts a string on the stack of a pickle."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


class Custom:
    def __init__(self):
        self.weight = torch.ones(2)
