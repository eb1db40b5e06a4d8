"""Files that are meant to do harm: whatever a pickle asks for, nothing is run, imported, or read out of bounds."""

import contextlib
import encodings.cp437  # noqa: F401 - zipfile imports it when it first reads a name
import functools
import pickle
import sys
import threading

import pytest
import torch
from pickled_files import archive, text

from hf_diffusion.conversion.checkpoint_reader import CheckpointError, Shell, read_checkpoint, to_plain


def live_payloads(marker):
    """Pickles that put an object on the stack. Python's unpickler makes the file `marker` with each of them."""
    touch = f"open({str(marker)!r}, 'w').close()"
    argument = text(touch) + b"\x85"  # a tuple of one
    path = text(str(marker)) + text("w") + b"\x86"  # a tuple of two
    opened = b"c__builtin__\nopen\n" + path + b"R"
    executed = b"c__builtin__\nexec\n" + argument + b"R"
    return {
        "exec": executed,
        "eval": b"c__builtin__\neval\n" + argument + b"R",
        "os.system": b"cos\nsystem\n" + text(f"touch '{marker}'") + b"\x85R",
        "open": opened,
        "result of a call is called": opened + path + b"R",
        "name from the stack": text("builtins") + text("exec") + b"\x93" + argument + b"R",
        "nested name": b"\x80\x04" + text("builtins") + text("open.__call__") + b"\x93" + path + b"R",
        "INST": b"(" + text(touch) + b"i__builtin__\nexec\n",
        "OBJ": b"(c__builtin__\nexec\n" + text(touch) + b"o",
        "state": b"ccollections\nOrderedDict\n)R}" + text("x") + executed + b"sb",
        "state of a shell": executed + b"}b",
        "key": b"}" + executed + b"Ns",
        "key of a shell": executed * 3 + b"s",
        "element": b"](" + executed * 2 + b"e",
        "element of a shell": executed * 2 + b"a",
        "member": b"\x8f(" + executed + b"\x90",
        "partial": b"cfunctools\npartial\nc__builtin__\nexec\n" + text(touch) + b"\x86R)R",
        "map": b"c__builtin__\nset\nc__builtin__\nmap\nc__builtin__\nexec\n]" + text(touch) + b"a\x86R\x85R",
        "rebuilder of a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nexec\nc__builtin__\nset\n"
        + (argument + b"NtR"),
        "parameter of a shell": b"ctorch._utils\n_rebuild_parameter\n" + executed + b"\x88" + executed + b"\x87R",
        "codec of an object": b"c_codecs\nencode\n" + executed + text("latin1") + b"\x86R",
        "persistent id": b"(" + text("storage") + executed + text("0") + text("cpu") + b"K\x01tQ",
    }


def other_payloads(marker):
    """More ways to name, make and call what a checkpoint has no need for."""
    argument = text(str(marker)) + b"\x85"
    return {
        "getattr": b"c__builtin__\ngetattr\ncos\npath\n" + text("abspath") + b"\x86R" + argument + b"R",
        "new object": b"c_io\nFileIO\n" + text(str(marker)) + text("w") + b"\x86\x81",
        "new object with keywords": b"c_io\nFileIO\n" + argument + b"}" + text("mode") + text("w") + b"s\x92",
        "default factory": b"ccollections\ndefaultdict\nc__builtin__\nexec\n\x85R" + argument + b"Ns",
        "nested name of a maker": b"ccollections\nOrderedDict.fromkeys\n" + argument + b"R",
        "globals of a maker": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n" + argument + b"R",
        "state of a maker": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__defaults__") + argument + b"sb",
        "state of a dtype": b"ctorch\nfloat32\n}" + text("__defaults__") + argument + b"sb",
        "torch.hub": b"ctorch.hub\nload\n" + argument + b"R",
        "torch.load": b"ctorch\nload\n" + argument + b"R",
        "torch module": b"ctorch.utils.collect_env\nrun\n" + argument + b"R",
        "lazy torch attribute": b"ctorch\n_inductor\n" + argument + b"R",
        "unknown rebuilder": b"ctorch._utils\n_rebuild_wrapper_subclass\n" + argument + b"R",
        "codec": b"c_codecs\nencode\n" + text("x") + text("this_codec_does_not_exist") + b"\x86R",
        "text persistent id": b"Pname\n",
        "extension": b"\x82\x01",
        "missing module": b"cthis_module_does_not_exist\nx\n",
    }


@functools.cache
def audit_log():
    """A list that, while it has a list inside, collects there what Python imports, compiles and runs in this thread."""
    log: list[list[str]] = []
    thread = threading.get_ident()  # others belong to the test runner

    def hook(event, arguments):
        watched = event in ("import", "exec", "compile", "os.system", "subprocess.Popen")
        if log and watched and threading.get_ident() == thread:
            log[0].append(event)

    sys.addaudithook(hook)  # for good, hence once
    return log


@contextlib.contextmanager
def audited():
    events: list[str] = []
    audit_log().append(events)
    try:
        yield events
    finally:
        audit_log().clear()


def test_the_audit_sees():
    with audited() as events:
        eval("1 + 1")
        with contextlib.suppress(ImportError):
            __import__("this_module_does_not_exist")
    assert {"compile", "exec", "import"} <= set(events)


@pytest.mark.parametrize("name", live_payloads("marker"))
def test_python_would_run_the_live_payloads(tmp_path, name):
    with contextlib.suppress(Exception):
        pickle.loads(b"}" + text("x") + live_payloads(tmp_path / "marker")[name] + b"s.")
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [*live_payloads("marker"), *other_payloads("marker")])
def test_nothing_in_a_pickle_runs(tmp_path, name):
    payload = (live_payloads(tmp_path / "marker") | other_payloads(tmp_path / "marker"))[name]
    path = archive(tmp_path / "x.pt", b"}" + text("x") + payload + b"s.")
    modules = set(sys.modules)
    with contextlib.suppress(CheckpointError), audited() as events:
        value = read_checkpoint(path)
        repr(value), to_plain(value)
    assert not (tmp_path / "marker").exists()
    assert not events and set(sys.modules) == modules


def test_a_shell_records_what_the_file_said(tmp_path):
    call = b"cos\nsystem\n" + text("ls") + b"\x85R"
    program = b"}" + text("x") + call + b"}" + text("k") + b"K\x01sb" + text("a") + b"K\x02s" + b"s."
    shell = read_checkpoint(archive(tmp_path / "x.pt", program))["x"]
    assert (shell.module, shell.qualname, shell.args, shell.state) == ("os", "system", ("ls",), {"k": 1})
    assert shell.items == [("a", 2)] and repr(shell) == "<inert os.system with k>"
    with pytest.raises(TypeError, match="not callable"):
        shell()
    program = b"}" + text("x") + call + text("again") + b"\x85Rs."
    shell = read_checkpoint(archive(tmp_path / "x.pt", program))["x"]
    assert (shell.module, shell.qualname, shell.args) == ("os", "system()", ("again",))


def test_a_repr_has_no_control_characters():
    assert "\x1b" not in repr(Shell("a\x1b[2J", "b"))
    looping = Shell("a", "b")
    looping.state = {looping: looping, "k": looping}
    assert repr(looping) == "<inert a.b with k>"


def tensor_program(offset, size, stride, count=4, tail=b"\x89N"):
    def number(value):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t" if isinstance(values, tuple) else values

    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"}" + text("x") + rebuild + reference + number(offset) + numbers(size) + numbers(stride) + tail + b"tRs."


def test_hand_made_tensor_is_read(tmp_path):
    data = torch.arange(4.0).numpy().tobytes()
    mine = read_checkpoint(archive(tmp_path / "x.pt", tensor_program(1, (2,), (2,)), [data]))
    assert mine["x"].tolist() == [1, 3]


@pytest.mark.parametrize(
    "fields",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (4, (1,), (1,)),
        (5, (0,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (3, (2,), (-1,)),
        (0, (2,), (4,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (1, 1)),
        (0, (2, 2), (1,)),
        (2**62, (1,), (1,)),
        (2**64, (1,), (1,)),
        (0, (2**62,), (1,)),
        (0, (2**63,), (0,)),
        (0, (2**62 + 1,), (4,)),
        (0, (2**33, 2**33), (0, 0)),
        (0, (2,), (2**63,)),
        (0, (2**40, 2**40), (2**24, 2**24)),
        (0, b"N", (1,)),
        (0, (1,), text("1")),
        (0, (4,), (1,), 3),
        (0, (5,), (1,), 5),
        (0, (1,), (1,), -4),
        (0, (1,), (1,), 2**62),
        (0, (1,), (1,), 0),
    ],
    ids=str,
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, fields):
    path = archive(tmp_path / "x.pt", tensor_program(*fields), [bytes(16)])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch\nSize\n@\x85R",
        b"ctorch\nSize\n@R",
        b"c__builtin__\nset\n@\x85R",
        b"ccollections\nOrderedDict\n@\x85R",
        b"@Q",
        b"ctorch._utils\n_rebuild_tensor_v2\n(@K\x00@@\x89NtR",
    ],
)
def test_a_huge_expanded_tensor_is_not_iterated(tmp_path, monkeypatch, program):
    """It has 2**40 elements in 4 bytes: what iterates over it does not come back."""

    def iterate(tensor):
        raise AssertionError("it iterates")

    monkeypatch.setattr(torch.Tensor, "__iter__", iterate)
    tensor = tensor_program(0, (2**40,), (0,)).removeprefix(b"}" + text("x")).removesuffix(b"s.")
    path = archive(tmp_path / "x.pt", b"}" + text("x") + program.replace(b"@", tensor) + b"s.", [bytes(16)])
    try:
        assert type(read_checkpoint(path)["x"]) is Shell
    except CheckpointError as error:
        assert "iterates" not in str(error)


NESTED_KEYS = {
    "dict": lambda nested: nested + b"N",
    "set": lambda nested: text("y") + b"\x8f(" + nested + b"\x90",
    "frozenset": lambda nested: text("y") + b"(" + nested + b"\x91",
    "pair in a set": lambda nested: text("y") + b"\x8f(K\x01" + nested + b"u",
    "name": lambda nested: text("y") + text("module") + nested + b"\x93",
    "storage": lambda nested: text("y") + b"(Nca\nFloatStorage\n" + nested + b"NK\x01tQ",
}


@pytest.mark.parametrize("place", NESTED_KEYS)
def test_deeply_nested_keys_are_refused(tmp_path, place):
    program = b"}" + NESTED_KEYS[place](b")" + b"\x85" * 10) + b"s."
    with pytest.raises(CheckpointError):
        read_checkpoint(archive(tmp_path / "x.pt", program))


def test_deeply_nested_keys_do_not_end_the_process(tmp_path):
    program = b"}" + NESTED_KEYS["dict"](b")" + b"\x85" * 300_000) + b"s."  # hash() of this overflows the C stack
    with pytest.raises(CheckpointError, match="too deeply"):
        read_checkpoint(archive(tmp_path / "x.pt", program))


def test_deeply_nested_values_are_harmless(tmp_path):
    shells = b"ca\nb\n" * 50_000 + b")R" + b"\x85R" * 49_999
    lists = b"]" * 100_000 + b"a" * 99_999
    program = b"}" + text("x") + shells + b"s" + text("y") + lists + b"s."
    value = read_checkpoint(archive(tmp_path / "x.pt", program))
    assert set(value) == {"x", "y"}
    with pytest.raises(RecursionError):
        to_plain(value)
    del value
