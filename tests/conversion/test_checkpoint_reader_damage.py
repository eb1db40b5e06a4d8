"""Damaged files: what is read from one is what was written, or it is refused."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch
from pickled_files import Custom, archive, assert_same, save, tensors_of

from hf_diffusion.conversion.checkpoint_reader import CheckpointError, read_checkpoint


@pytest.mark.parametrize(
    "program", [b"}(K\x01u.", b"](K\x01K\x02u.", b"}K\x01a.", b"}]Ns.", b"}R.", b"}h\x01.", b"u.", b"."]
)
def test_senseless_pickles_are_refused(tmp_path, program):
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(archive(tmp_path / "x.pt", program))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A file with a bit of everything, and its bytes."""
    torch.manual_seed(0)
    base = torch.randn(3, 4)
    value = {
        "state_dict": OrderedDict(a=base, b=base.T, c=torch.arange(5).to(torch.bfloat16), d=torch.nn.Parameter(base)),
        "object": Custom(),
        "ema": [torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.uint16)],
        "texts": ["a" * 20, b"bytes", 1.5, None, (1, 2, 3), {("k", 1): 2}],
    }
    path = save(value, tmp_path_factory.mktemp("sound") / "x.pt")
    return value, path.read_bytes()


def test_truncated_files_are_refused(tmp_path, sound):
    _, data = sound
    path = tmp_path / "x.pt"
    lengths = {0, 1, 3, 4, 10, 29, 30, 31, 64, 100, 1000, *range(len(data) - 40, len(data))}
    for length in lengths | {random.Random(0).randrange(len(data)) for _ in range(60)}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            read_checkpoint(path)


def test_truncated_pickles_are_refused(tmp_path):
    program = pickle.dumps({"a": [1, 2.5, "text", (None, True)], "b": Custom}, protocol=2)
    assert set(read_checkpoint(archive(tmp_path / "x.pt", program))) == {"a", "b"}
    for length in range(len(program)):
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            read_checkpoint(archive(tmp_path / "x.pt", program[:length]))


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_read_or_refused(tmp_path, sound, seed):
    _, data = sound
    generator = random.Random(seed)
    path, outcomes = tmp_path / "x.pt", set()
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        program = next(info for info in file.infolist() if info.filename.endswith("data.pkl"))
    for trial in range(100):
        damaged = bytearray(data)
        # half of the damage goes to the pickle, the rest anywhere: storages, headers, directory
        low, high = (program.header_offset, program.header_offset + program.file_size) if trial % 2 else (0, len(data))
        for _ in range(generator.choice((1, 1, 1, 4, 16))):
            damaged[generator.randrange(low, high)] = generator.choice((0, 255, generator.randrange(256)))
        if generator.random() < 0.1:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            value = read_checkpoint(path)
        except CheckpointError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            for tensor in tensors_of(value):
                if tensor.numel() < 10_000:
                    tensor.clone()  # touches all of it
    assert outcomes == {"read", "refused"}


def test_the_sound_file_is_sound(tmp_path, sound):
    value, data = sound
    (tmp_path / "x.pt").write_bytes(data)
    mine = read_checkpoint(tmp_path / "x.pt")
    for key in ("state_dict", "ema", "texts"):
        assert_same(mine[key], torch.load(tmp_path / "x.pt", weights_only=False)[key])
    assert torch.equal(mine["state_dict"]["b"], value["state_dict"]["b"])
