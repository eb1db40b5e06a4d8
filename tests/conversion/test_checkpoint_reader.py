import contextlib
import functools
import io
import json
import pickle
import random
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_diffusion.conversion.checkpoint_reader import CheckpointError, Shell, read_checkpoint, to_plain


GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "mdlm"
FOLDERS = ("subs", "subs_tc", "subs_bertmask", "ar")


def golden(folder):
    if not (GOLDEN / folder).is_dir():
        pytest.skip(f"the golden files of mdlm/{folder} are not beside this checkout")
    return GOLDEN / folder


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


# Published formats


@pytest.mark.parametrize("folder", FOLDERS)
def test_ema_weights_are_those_on_the_hub(folder):
    folder = golden(folder)
    if not (folder / "hf").is_dir():
        pytest.skip("nothing is published for it")
    order = json.loads((folder / "golden.json").read_text())["ema_shadow_order"]
    published = load_file(folder / "hf" / "model.safetensors")
    shadow = read_checkpoint(folder / "ref.ckpt")["ema"]["shadow_params"]
    assert len(shadow) == len(order) > 0
    for name, tensor in zip(order, shadow, strict=True):
        torch.testing.assert_close(tensor, published[f"backbone.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_weights_give_what_the_reference_computed_with_them(kind):
    """Both sets of weights, told apart by the last layer of the smallest model."""
    folder = golden("ar")
    info = json.loads((folder / "golden.json").read_text())
    checkpoint = read_checkpoint(folder / "ref.ckpt")
    weights = {key.removeprefix("backbone."): tensor for key, tensor in checkpoint["state_dict"].items()}
    assert {f"backbone.{key}": list(tensor.shape) for key, tensor in weights.items()} == info["state_dict"]
    if kind == "ema":
        weights = dict(zip(info["ema_shadow_order"], checkpoint["ema"]["shadow_params"], strict=True))
    with safe_open(folder / "golden.safetensors", "pt") as file:
        hidden, expected = file.get_tensor(f"{kind}.hidden.1"), file.get_tensor(f"{kind}.log_probs")
    hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], weights["output_layer.norm_final.weight"])
    logits = hidden @ weights["output_layer.linear.weight"].T + weights["output_layer.linear.bias"]
    logits[..., info["mask_index"]] = -1000.0
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_what_torch_reads(folder):
    class Stub(dict):
        def __init__(self, *args):
            super().__init__()

        def __setstate__(self, state):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            known = module.split(".")[0] in ("torch", "collections", "builtins", "__builtin__")
            return super().find_class(module, name) if known else Stub

    path = golden(folder) / "ref.ckpt"
    stubbed = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="stubbed")
    reference = torch.load(path, map_location="cpu", weights_only=False, pickle_module=stubbed)
    mine = read_checkpoint(path)
    assert list(mine) == list(reference)
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "loops", "sampler", "epoch", "global_step"):
        assert_same(mine[key], reference[key])
    assert len(list(tensors_of(mine))) > 50


@pytest.mark.parametrize("folder", FOLDERS)
def test_hyper_parameters_are_plain(folder):
    folder = golden(folder)
    info = json.loads((folder / "golden.json").read_text())
    hyper_parameters = to_plain(read_checkpoint(folder / "ref.ckpt")["hyper_parameters"])
    config = hyper_parameters["config"]
    assert json.loads(json.dumps(config)) == config  # nothing but plain values
    assert {key: config["model"][key] for key in ("hidden_size", "n_heads", "n_blocks", "cond_dim", "length")} == {
        key: info["model"][key] for key in ("hidden_size", "n_heads", "n_blocks", "cond_dim", "length")
    }
    assert config["parameterization"] == info["parameterization"]
    assert config["time_conditioning"] is info["time_conditioning"]
    assert config["wandb"]["tags"] == ["${noise.type}", "${data.train}", "${data.valid}"]
    assert config["trainer"]["accumulate_grad_batches"].startswith("${div_up:")
    tokenizer = hyper_parameters["tokenizer"]
    assert (tokenizer.module, tokenizer.qualname[:4]) == ("transformers.models.gpt2.tokenization_gpt2_fast", "GPT2")
    assert tokenizer.state["vocab_size"] == info["model"]["vocab"]
    assert "GPT2TokenizerFast with vocab_size" in repr(tokenizer)
    assert not {"omegaconf", tokenizer.module} & set(sys.modules)


# What torch.save writes

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype, protocol):
    value = {"dtype": dtype, "x": torch.arange(12).reshape(3, 4).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    path = save(value, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(read_checkpoint(path), torch.load(path, weights_only=False))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_layouts_parameters_and_containers(tmp_path, protocol):
    base = torch.randn(6, 8)
    value = OrderedDict(
        base=base,
        transposed=base.T,
        strided=base[1::2, ::3],
        row=base[2],
        expanded=base[0, 0].expand(3, 5),
        empty=torch.empty(0, 3),
        empty_view=base[3:3],
        grad=torch.zeros(2, requires_grad=True),
        parameter=torch.nn.Parameter(torch.randn(3)),
        frozen=torch.nn.Parameter(torch.arange(3), requires_grad=False),
        channels=torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
        state_dict=torch.nn.BatchNorm1d(3).state_dict(),
        optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        numbers=[0, -1, 255, 256, 2**31, -(2**31), 2**80, -(2**2000), 1.5, float("inf"), True, False, None],
        texts=["", "a", "Ω\x00\n", "x" * 300, b"", b"\x00\xff", b"y" * 300, "\ud800"],
        tuples=((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), [], {})),
        keys={(1, ("a", 2.0)): "nested", None: 0, 1.5: 1, b"k": 2, frozenset([1]): 3},
        sets=[set(), {1, 2}, frozenset(), frozenset([("a", "b")])],
        size=torch.Size([2, 3]),
    )
    path = save(value, tmp_path / "x.pt", pickle_protocol=protocol)
    reference = torch.load(path, weights_only=False)
    mine = read_checkpoint(path)
    assert type(mine) is OrderedDict and type(mine["state_dict"]) is OrderedDict
    assert_same(mine, reference)


def test_shared_objects_stay_shared(tmp_path):
    base, shared_list = torch.randn(4, 4), [1]
    value = {"base": base, "row": base[2], "tied": base, "a": shared_list, "b": shared_list}
    mine = read_checkpoint(save(value, tmp_path / "x.pt"))
    assert mine["tied"] is mine["base"] and mine["a"] is mine["b"]
    assert mine["row"].untyped_storage().data_ptr() == mine["base"].untyped_storage().data_ptr()
    mine["base"][2] = 7.0
    assert mine["row"].tolist() == [7.0] * 4
    assert torch.equal(torch.load(tmp_path / "x.pt")["base"], base)  # the file is as it was


def test_cycles_are_kept(tmp_path):
    value: dict = {"list": []}
    value["list"].append(value)
    mine = read_checkpoint(save(value, tmp_path / "x.pt"))
    assert mine["list"][0] is mine


def test_a_storage_on_its_own_is_its_elements(tmp_path):
    value = {"storage": torch.arange(4, dtype=torch.int16).untyped_storage()}
    assert read_checkpoint(save(value, tmp_path / "x.pt"))["storage"].tolist() == [0, 0, 1, 0, 2, 0, 3, 0]


def test_storages_out_of_alignment_are_read(tmp_path):
    x = torch.arange(5.0)
    path = save({"x": x, "y": torch.arange(3), "part": x[1:3]}, tmp_path / "x.pt")
    assert not read_checkpoint(path)["x"].untyped_storage().resizable()  # mapped from the file, not copied
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for name in file.namelist():
            packed.writestr(name, file.read(name))
    mine = read_checkpoint(tmp_path / "packed.pt")
    assert mine["x"].tolist() == [0, 1, 2, 3, 4] and mine["y"].tolist() == [0, 1, 2]
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in (mine["x"], mine["y"]))
    mine["x"].zero_()
    assert mine["part"].tolist() == [0, 0]


class Custom:
    def __init__(self):
        self.weight = torch.ones(2)


class CustomDict(dict):
    pass


class CustomList(list):
    pass


class WithNewArgs(tuple):
    def __new__(cls, *, a):
        return super().__new__(cls, (a,))

    def __getnewargs_ex__(self):
        return (), {"a": self[0]}


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_objects_become_shells(tmp_path, protocol):
    value = {
        "object": Custom(),
        "dict": CustomDict(a=1, b=2),
        "list": CustomList([1, 2, 3]),
        "named": Custom,
        "path": Path("a/b"),
        "default": defaultdict(list, a=[1]),
        "quantized dtype": torch.qint8,
    }
    mine = read_checkpoint(save(value, tmp_path / "x.pt", pickle_protocol=protocol))
    assert mine.pop("default") == {"a": [1]}
    assert all(type(shell) is Shell for shell in mine.values())
    assert mine["object"].qualname == "Custom" and mine["object"].module == Custom.__module__
    assert mine["object"].args == () and mine["object"].state["weight"].tolist() == [1, 1]
    assert mine["dict"].items == [("a", 1), ("b", 2)]
    assert mine["list"].items == [1, 2, 3]
    assert mine["named"].args is None
    assert mine["path"].args == ("a", "b")


def test_keyword_arguments_are_recorded(tmp_path):
    mine = read_checkpoint(save({"x": WithNewArgs(a=3)}, tmp_path / "x.pt", pickle_protocol=4))
    assert mine["x"].kwargs == {"a": 3}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.empty(2, device="meta"),
        lambda: torch.tensor([1j]).conj(),
    ],
    ids=["quantized", "sparse", "csr", "meta", "conjugated"],
)
def test_other_tensors_are_refused(tmp_path, make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save({"x": make()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: it holds a .*Save "):
        read_checkpoint(path)


# Files that are something else


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")


def write_legacy(path):
    save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def write_plain_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "nothing")


WRITERS = {
    "Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "safetensors.torch.load_file": lambda path: save_file({"x": torch.ones(2)}, path),
    "before 1.6": write_legacy,
    "not one of torch.save": write_plain_zip,
    "not a zip file": lambda path: path.write_bytes(pickle.dumps({"x": 1}, protocol=2)),
    "not a dict": lambda path: save([1], path),
    "test_checkpoint_reader.Custom with weight": lambda path: save(Custom(), path),
    "-endian": lambda path: archive(path, b"}.", byteorder=b"big" if sys.byteorder == "little" else b"little"),
    "compressed": lambda path: archive(path, b"}.", compression=zipfile.ZIP_DEFLATED),
    "truncated": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("what", WRITERS)
def test_other_files_are_refused_with_the_reason(tmp_path, what):
    WRITERS[what](tmp_path / "file.ckpt")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "file.ckpt")
    assert what in str(error.value) and str(tmp_path / "file.ckpt") in str(error.value)


def test_checkpoint_error_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="truncated"):
        read_checkpoint(archive(tmp_path / "x.pt", b"}"))


# Files that are meant to do harm


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


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
    """A list that, while it has a list inside, collects there what Python imports, compiles and runs."""
    log: list[list[str]] = []

    def hook(event, arguments):
        if log and event in ("import", "exec", "compile", "os.system", "subprocess.Popen"):
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


# Damaged files


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


# Plain values


def test_to_plain():
    def node(value):
        shell = Shell("omegaconf.nodes", "AnyNode", ())
        shell.state = {"_metadata": Shell("omegaconf.base", "Metadata", ()), "_parent": config, "_val": value}
        return shell

    config = Shell("omegaconf.dictconfig", "DictConfig", ())
    names = Shell("omegaconf.listconfig", "ListConfig", ())
    missing = Shell("omegaconf.dictconfig", "DictConfig", ())
    names.state = {"_metadata": None, "_parent": config, "_content": [node("x"), node("${a}")]}
    missing.state = {"_content": "???"}
    config.state = {"_metadata": None, "_parent": None, "_content": {"a": node(1), "names": names, "m": missing}}
    tensor, other = torch.ones(2), Shell("torch", "device", ("cuda",))
    plain = to_plain(OrderedDict(config=(config, [config]), tensor=tensor, other=other))
    assert type(plain) is dict
    expected = {"a": 1, "names": ["x", "${a}"], "m": "???"}
    assert plain["config"] == (expected, [expected])
    assert plain["tensor"] is tensor and plain["other"] is other


def test_to_plain_copies():
    value = {"a": [1]}
    plain = to_plain(value)
    plain["a"].append(2)
    assert value == {"a": [1]}
