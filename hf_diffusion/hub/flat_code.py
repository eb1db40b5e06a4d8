"""The code of a model as files beside each other that need nothing of the package they come from.

transformers runs code that comes with a model if it is written so: no folders, `from .name import ...` and no other
relative imports, everything else installed. The modules here are those that the classes of a model reach by relative
imports; each becomes one file, in which those imports alone are different.

This module is among them: a model that was loaded with its code is saved with its code.
"""

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers.models.auto.auto_factory import _BaseAutoModelClass


AUTO_MODULE = "auto_map"
"""The module that `auto_map` in config.json leads to."""

HEADER = """\
# Written by hf_diffusion {version} with transformers {transformers} from {module}.
# Copyright The hf_diffusion authors. Licensed under the Apache License, Version 2.0:
# https://www.apache.org/licenses/LICENSE-2.0
"""

AUTO_MODULE_DOCSTRING = '''\
"""The classes that `auto_map` in config.json leads to.

All from one module: of a folder, transformers copies every module that `auto_map` names to a place of its own, with
what it imports, and the configuration that it reads would then not be of the class that the model knows.
"""
'''


class ModelCode(NamedTuple):
    """
    Attributes:
        files: text of every file, by name.
        auto_classes: names of Auto classes, and the class that each leads to.
    """

    files: dict[str, str]
    auto_classes: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, and what leads to them into its `config.json`."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["auto_map"] = {name: f"{AUTO_MODULE}.{cls.__name__}" for name, cls in self.auto_classes.items()}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_code(config_class: type) -> ModelCode:
    """The code of the models that the Auto classes lead to for `config_class`.

    Raises:
        ValueError: if no Auto class knows `config_class`, or knows it with a class of another package.
    """
    if _is_flat(config_class):
        home = _package_of(config_class)
        classes = importlib.import_module(f"{home}.{AUTO_MODULE}").AUTO_MAP
        folder = Path(str(importlib.util.find_spec(f"{home}.{AUTO_MODULE}").origin)).parent  # type: ignore[union-attr]
        files = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.py")}
        files.pop("__init__.py", None)  # transformers puts it there
    else:
        classes = {"AutoConfig": config_class, **dict(sorted(_registered_models(config_class)))}
        _check_own(classes.values())
        home = _package_of(config_class)
        files = {
            f"{AUTO_MODULE}.py": _auto_module(classes, home),
            **flatten((cls.__module__ for cls in classes.values()), home),
        }
    return ModelCode(files, classes)


def came_with_code(config: Any) -> bool:
    """Whether `config` was read from a folder that `ModelCode.write` has made, whichever classes read it."""
    entries = (getattr(config, "auto_map", None) or {}).values()
    return _is_flat(type(config)) or any(AUTO_MODULE in entry for entry in entries)


def _is_flat(config_class: type) -> bool:
    """Whether the code of `config_class` lies in such a folder."""
    return "." in config_class.__module__ and _is_module(f"{_package_of(config_class)}.{AUTO_MODULE}")


def flatten(modules: Iterable[str], home: str) -> dict[str, str]:
    """`modules` and all that they reach by relative imports, as texts of flat files by name.

    Args:
        modules: full names.
        home: the package whose modules keep their names; those of others get the names of their packages in front.

    Raises:
        ValueError: for an import that flat files have no way to write, or two modules that would have one name.
    """
    files: dict[str, str] = {}
    module_of: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        name = _flat_name(module, home)
        if module_of.setdefault(name, module) != module:
            raise ValueError(f"{module_of[name]} and {module} would both be {name}.py. Rename one of them.")
        if f"{name}.py" not in files:
            text, imported = _flat_text(module, home)
            files[f"{name}.py"] = _header(module) + text
            waiting += imported
    return dict(sorted(files.items()))


def _flat_text(module: str, home: str) -> tuple[str, list[str]]:
    """The text of a module with its relative imports rewritten, and the modules that it imports by them."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    source: str = spec.loader.get_source(module)  # type: ignore[attr-defined]
    # Positions in a syntax tree count bytes.
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]
    imported = []
    for node in sorted(imports, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
        if node.module is None or any(_is_module(f"{target}.{alias.name}") for alias in node.names):
            raise ValueError(
                f"{module}, line {node.lineno}, imports a module from a package, which flat files cannot. Import what "
                "is in the module."
            )
        line = lines[node.lineno - 1]
        before, statement = line[: node.col_offset], line[node.col_offset :]
        rewritten = re.sub(rb"from\s+\.[.\w]*", f"from .{_flat_name(target, home)}".encode(), statement, count=1)
        lines[node.lineno - 1] = before + rewritten
        imported.append(target)
    return b"".join(lines).decode(), imported


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def _flat_name(module: str, home: str) -> str:
    while not module.startswith(home + "."):
        home = home.rpartition(".")[0]
    return module.removeprefix(home + ".").replace(".", "_")


def _auto_module(classes: dict[str, type], home: str) -> str:
    imports = sorted({f"from .{_flat_name(cls.__module__, home)} import {cls.__name__}" for cls in classes.values()})
    entries = [f'    "{name}": {cls.__name__},' for name, cls in classes.items()]
    lines = ["", *imports, "", "", "AUTO_MAP = {", *entries, "}", ""]
    return _header(__name__) + AUTO_MODULE_DOCSTRING + "\n".join(lines)


def _header(module: str) -> str:
    version = importlib.import_module(module.partition(".")[0]).__version__
    return HEADER.format(version=version, transformers=transformers.__version__, module=module)


def _registered_models(config_class: type) -> Iterator[tuple[str, type]]:
    """Names of Auto classes, and the model class that each leads to for `config_class`."""
    waiting = _BaseAutoModelClass.__subclasses__()
    while waiting:
        auto_class = waiting.pop()
        waiting += auto_class.__subclasses__()
        if auto_class._model_mapping is not None and config_class in auto_class._model_mapping:
            yield auto_class.__name__, auto_class._model_mapping[config_class]


def _check_own(classes: Iterable[type]) -> None:
    own, found = __name__.partition(".")[0], list(classes)
    if len(found) == 1:
        raise ValueError(
            f"No Auto class knows {found[0].__name__}, so nothing would lead to code saved with it. Save without "
            "`include_code`, or register the class."
        )
    for cls in found:
        if cls.__module__.partition(".")[0] != own:
            raise ValueError(
                f"`include_code` writes the code of {own}, and {cls.__name__} is of {cls.__module__}. Save without it."
            )


def _package_of(cls: type) -> str:
    return cls.__module__.rpartition(".")[0]


__all__ = ["AUTO_MODULE", "ModelCode", "came_with_code", "flatten", "model_code"]
