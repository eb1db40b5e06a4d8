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


def damage(data, generator):
    damaged = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 4, 16))):
        damaged[generator.randrange(len(data))] = generator.choice((0, 255, generator.randrange(256)))
    if generator.random() < 0.1:
        del damaged[generator.randrange(len(damaged)) :]
    return bytes(damaged)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_refused_or_makes_no_difference(tmp_path, sound, seed):
    """Anywhere: in storages, headers, the directory, or in what nobody reads."""
    value, data = sound
    generator = random.Random(seed)
    path, outcomes = tmp_path / "x.pt", set()
    for _ in range(100):
        path.write_bytes(damage(data, generator))
        try:
            mine = read_checkpoint(path)
        except CheckpointError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert torch.equal(mine.pop("object").state["weight"], value["object"].weight)
            assert_same(mine, {key: item for key, item in value.items() if key != "object"})
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("seed", range(3))
def test_damaged_pickles_with_right_checksums_are_read_or_refused(tmp_path, sound, seed):
    """As somebody who means it would write them: no checksum is in the way of what a pickle asks for."""
    _, data = sound
    generator = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        program = file.read("x/data.pkl")
        storages = [file.read(name) for name in sorted(file.namelist()) if name.startswith("x/data/")]
    outcomes = set()
    for _ in range(50):
        path = archive(tmp_path / "x.pt", damage(program, generator), storages)
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


@pytest.mark.parametrize("record", ["data.pkl", "byteorder", "data/0", "data/1", "data/2", "data/3", "data/4"])
def test_a_flipped_bit_is_found_and_its_record_named(tmp_path, sound, record):
    _, data = sound
    path, name = tmp_path / "x.pt", f"x/{record}"
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        content = file.read(name)
        start = data.index(content, file.getinfo(name).header_offset + 30 + len(name))
    position = start + len(content) // 2
    path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    with zipfile.ZipFile(path) as file:
        assert file.testzip() == name
    with pytest.raises(CheckpointError, match=rf"x\.pt: its record '{name}' is damaged .*Download or save it again"):
        read_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"x": torch.arange(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert read_checkpoint(path)["x"].tolist() == [0, 1, 2]


def test_the_sound_file_is_sound(tmp_path, sound):
    value, data = sound
    (tmp_path / "x.pt").write_bytes(data)
    mine = read_checkpoint(tmp_path / "x.pt")
    for key in ("state_dict", "ema", "texts"):
        assert_same(mine[key], torch.load(tmp_path / "x.pt", weights_only=False)[key])
    assert torch.equal(mine["state_dict"]["b"], value["state_dict"]["b"])
