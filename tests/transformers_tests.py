"""transformers' own tests of models and configurations, which its source distribution holds and its wheel does not.

    python tests/transformers_tests.py    fetch those of the transformers that this interpreter has

pip finds the distribution wherever it is set up to look. Two files of it are kept in the environment that they belong
to, and imported from there; none of their code is in this repository.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType


FILES = ("test_modeling_common.py", "test_configuration_common.py")
PACKAGE = "tests_of_transformers"

CONFIG_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["OneModel", "AnotherModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
"""Values other than the defaults for what every configuration has."""

HELPERS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_SETTINGS},
}
"""Modules that the two files import and the distribution leaves out, with what they need of them."""


def folder() -> Path:
    return Path(sys.prefix) / "tests-of-transformers" / version("transformers")


def fetch() -> None:
    """Fetch the two files, unless they are there."""
    if folder().is_dir():
        return
    folder().parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder().parent) as temporary:
        wanted = f"transformers=={version('transformers')}"
        options = ("-qq", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "-d", temporary)
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        unpacked = Path(temporary) / "unpacked" / PACKAGE
        unpacked.mkdir(parents=True)
        (unpacked / "__init__.py").touch()
        with tarfile.open(archive) as distribution:
            for name in FILES:
                source = distribution.extractfile(f"{archive.name.removesuffix('.tar.gz')}/tests/{name}")
                assert source is not None
                (unpacked / name).write_bytes(source.read())
        unpacked.parent.rename(folder())


def load() -> tuple[type, type]:
    """`ModelTesterMixin` and `ConfigTester` of what was fetched."""
    sys.path.append(str(folder()))
    for name, contents in HELPERS.items():
        helper = sys.modules.setdefault(f"{PACKAGE}.{name}", ModuleType(name))
        vars(helper).update(contents)
    models, configurations = (importlib.import_module(f"{PACKAGE}.{Path(name).stem}") for name in FILES)
    return models.ModelTesterMixin, configurations.ConfigTester


if __name__ == "__main__":
    fetch()
