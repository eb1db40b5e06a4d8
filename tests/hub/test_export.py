"""Exported folders, loaded by others: in new processes, with the package and without it."""

import json
import re
import shutil
import sys
from pathlib import Path

import hub_visitor
import pytest
import torch
from elsewhere import run_elsewhere
from families import FAMILIES
from transformers import AutoModel, LlamaConfig
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_diffusion import ARMDConfig, MDLMARConfig, MDLMARForCausalLM
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.hub.export import export_model
from hf_diffusion.hub.flat_code import flatten, model_code


ROOT = Path(__file__).resolve().parents[2]


def mdlm_ar():
    torch.manual_seed(1)
    config = MDLMARConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        residual_dropout=0.0,
    )
    model = MDLMARForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight)
    return model.eval()


NAMES = [*FAMILIES, "mdlm_ar"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("exported")
    for name in NAMES:
        model = FAMILIES[name].model() if name in FAMILIES else mdlm_ar()
        model.save_pretrained(base / name, include_code=True)
        strategies = FAMILIES[name].strategies if name in FAMILIES else ()
        (base / name / "strategies.json").write_text(json.dumps([*strategies[:1], *strategies[-1:]]))
    return base


def visit(folders, package, home):
    paths = [str(folders / name) for name in NAMES]
    run_elsewhere(hub_visitor, str(home / "answers"), "with" if package else "without", *paths, home=home)
    return torch.load(home / "answers")


@pytest.fixture(scope="module")
def without_package(folders, tmp_path_factory):
    home = tmp_path_factory.mktemp("without")
    source = shutil.copytree(ARMD_SHAKESPEARE, home / "source", ignore=shutil.ignore_patterns("README.md"))
    export_model(source, home / "shipped")
    return visit(folders, False, home)


@pytest.fixture(scope="module")
def with_package(folders, tmp_path_factory):
    return visit(folders, True, tmp_path_factory.mktemp("with"))


@pytest.mark.parametrize("name", NAMES)
class TestOtherProcesses:
    def check(self, folder, found, package):
        auto_names = hub_visitor.auto_names(folder)
        head = "AutoModelForCausalLM" if folder.name == "mdlm_ar" else "AutoModelForMaskedLM"
        assert {"AutoModel", head} <= {*auto_names}
        for auto_name in auto_names:
            here, there = hub_visitor.answers(folder, auto_name), found[str(folder), auto_name]
            assert there["module"].partition(".")[0] == package
            assert there["config_is_of_the_model"]
            torch.testing.assert_close(there["logits"], here["logits"], rtol=1e-5, atol=1e-5)
            assert [text.tolist() for text in there["texts"]] == [text.tolist() for text in here["texts"]]

    def test_models_answer_without_the_package_as_they_do_here(self, name, folders, without_package):
        self.check(folders / name, without_package, "transformers_modules")

    def test_where_the_package_is_its_classes_are_used(self, name, folders, with_package):
        self.check(folders / name, with_package, "hf_diffusion")

    @pytest.mark.parametrize("how", ["again", "as-asked"])
    def test_a_model_that_came_with_its_code_is_saved_with_it(self, name, how, folders, without_package):
        first, again = folders / name, folders / f"{name}-{how}"
        assert {file.name for file in again.glob("*.py")} == {file.name for file in first.glob("*.py")}
        for file in (*first.glob("*.py"), first / "config.json", first / "model.safetensors"):
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name
        assert (again / "README.md").exists() == (how == "as-asked")


def test_the_example_in_a_card_runs_as_it_stands(without_package):
    assert without_package["card"].startswith("Once upon a time")
    assert len(without_package["card"]) > 60


def test_code_runs_only_if_it_is_allowed_to(without_package):
    assert "trust_remote_code=True" in without_package["untrusted"]


class TestFiles:
    @pytest.mark.parametrize("name", NAMES)
    def test_transformers_finds_every_file_and_no_other_package(self, name, folders):
        for file in (folders / name).glob("*.py"):
            for imported in get_relative_imports(file):
                assert (folders / name / f"{imported}.py").is_file(), (file.name, imported)
            others = set(get_imports(file)) - set(sys.stdlib_module_names)
            assert others <= {"torch", "transformers", "huggingface_hub", "safetensors"}, file.name

    def test_nothing_but_imports_is_changed(self, folders):
        original = (ROOT / "hf_diffusion" / "modeling" / "modeling_lomdm.py").read_text().splitlines()
        flat = [line for line in (folders / "lomdm" / "modeling_lomdm.py").read_text().splitlines() if line[:1] != "#"]
        changed = [(old, new) for old, new in zip(original, flat, strict=True) if old != new]
        assert (
            "from ..diffusion.canvas import read_text_and_labels",
            "from .diffusion_canvas import read_text_and_labels",
        ) in changed
        assert all(re.match(r"from \.\.\w", old) and re.match(r"from \.\w+ import", new) for old, new in changed)

    @pytest.mark.parametrize("name", NAMES)
    def test_files_say_where_they_are_from_and_their_licence(self, name, folders):
        for file in (folders / name).glob("*.py"):
            head = "".join(file.read_text().splitlines()[:3])
            assert re.search(r"hf_diffusion \d.* transformers \d.*Apache License, Version 2.0", head), file.name

    def test_a_model_that_came_with_code_is_saved_with_that_of_the_package(self, folders, tmp_path):
        AutoModel.from_pretrained(folders / "armd").save_pretrained(tmp_path)
        for file in (*(folders / "armd").glob("*.py"), folders / "armd" / "config.json"):
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()

    def test_without_being_asked_nothing_is_written(self, tmp_path):
        FAMILIES["armd"].model().save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


class TestFlatten:
    """On a small package, every form that an import takes."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """Writes a package from the texts of its files and makes it importable, until the test has ended."""
        name = f"flat_{tmp_path.name}"

        def write(**files):
            for file, text in {"__init__": '__version__ = "7"\n', "home/__init__": "", **files}.items():
                path = tmp_path / name / f"{file}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            monkeypatch.syspath_prepend(tmp_path)
            return flatten([f"{name}.home.model"], f"{name}.home")

        yield write
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]

    def test_imports_are_rewritten_wherever_they_are(self, package):
        files = package(
            **{
                "home/model": """\
from ..tools.deep.far import (
    a,  # é
)
b = "é"; from .near import c; from .near import d
def f():
    r\"\"\"`from ..tools import nothing`\"\"\"
    from ..tools import e
    return e
""",
                "home/near": "c = d = 1\n",
                "tools/__init__": "from .plain import e\n",
                "tools/plain": "e = 2\n",
                "tools/deep/__init__": "not_needed = 1\n",
                "tools/deep/far": "import os\nfrom ..plain import e as a\n",
            }
        )
        texts = {name: text[len(text) - len(text.split("LICENSE-2.0\n")[1]) :] for name, text in files.items()}
        assert texts == {
            "model.py": """\
from .tools_deep_far import (
    a,  # é
)
b = "é"; from .near import c; from .near import d
def f():
    r\"\"\"`from ..tools import nothing`\"\"\"
    from .tools import e
    return e
""",
            "near.py": "c = d = 1\n",
            "tools.py": "from .tools_plain import e\n",
            "tools_plain.py": "e = 2\n",
            "tools_deep_far.py": "import os\nfrom .tools_plain import e as a\n",
        }

    @pytest.mark.parametrize("statement", ["from . import near", "from ..home import near"])
    def test_importing_a_module_is_refused(self, statement, package):
        with pytest.raises(ValueError, match="home.model, line 2, imports a module from a package"):
            package(**{"home/model": f"import os\n{statement}\n", "home/near": ""})

    def test_two_modules_of_one_name_are_refused(self, package):
        with pytest.raises(ValueError, match="would both be a_b.py"):
            package(**{"home/model": "from ..a.b import x\nfrom ..a_b import x\n", "a/b": "x = 1\n", "a_b": "x = 1\n"})


def test_only_models_of_this_package_are_saved_with_code():
    with pytest.raises(ValueError, match="LlamaConfig is of transformers"):
        model_code(LlamaConfig)

    class Unknown(ARMDConfig):
        pass

    with pytest.raises(ValueError, match="No Auto class knows Unknown"):
        model_code(Unknown)
