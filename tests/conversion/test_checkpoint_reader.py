"""The reader of pickled checkpoints gives what torch gives, and says what every other file is."""

import json
import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
from pickled_files import Custom, archive, assert_same, save, tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_diffusion.conversion.checkpoint_reader import CheckpointError, Shell, read_checkpoint, to_plain


PUBLISHED = ("subs", "subs_tc", "subs_bertmask")
FOLDERS = (*PUBLISHED, "ar")


@pytest.fixture
def golden(shared):
    return shared / "golden/mdlm"


# Published formats


@pytest.mark.parametrize("folder", PUBLISHED)
def test_ema_weights_are_those_on_the_hub(golden, folder):
    folder = golden / folder
    order = json.loads((folder / "golden.json").read_text())["ema_shadow_order"]
    published = load_file(folder / "hf" / "model.safetensors")
    shadow = read_checkpoint(folder / "ref.ckpt")["ema"]["shadow_params"]
    assert len(shadow) == len(order) > 0
    for name, tensor in zip(order, shadow, strict=True):
        torch.testing.assert_close(tensor, published[f"backbone.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_weights_give_what_the_reference_computed_with_them(golden, kind):
    """Both sets of weights, told apart by the last layer of the smallest model."""
    folder = golden / "ar"
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
def test_every_tensor_is_what_torch_reads(golden, folder):
    class Stub(dict):
        def __init__(self, *args):
            super().__init__()

        def __setstate__(self, state):
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            known = module.split(".")[0] in ("torch", "collections", "builtins", "__builtin__")
            return super().find_class(module, name) if known else Stub

    path = golden / folder / "ref.ckpt"
    stubbed = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="stubbed")
    reference = torch.load(path, map_location="cpu", weights_only=False, pickle_module=stubbed)
    mine = read_checkpoint(path)
    assert list(mine) == list(reference)
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "loops", "sampler", "epoch", "global_step"):
        assert_same(mine[key], reference[key])
    assert len(list(tensors_of(mine))) > 50


@pytest.mark.parametrize("folder", FOLDERS)
def test_hyper_parameters_are_plain(golden, folder):
    folder = golden / folder
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
    "pickled_files.Custom with weight": lambda path: save(Custom(), path),
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
