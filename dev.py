#!/usr/bin/env python3
"""Everything that is done in a checkout of hf-diffusion, in one command each.

    python3 dev.py demo [ARGS]          run `hf-diffusion demo ARGS` in an empty folder, from a wheel (.venv-demo)
    python3 dev.py test [ARGS]          run `pytest ARGS` on this tree, a process per core (.venv)
    python3 dev.py test-oldest [ARGS]   the same, with the oldest transformers that pyproject.toml allows
    python3 dev.py bench                time small models; fails where a ratio to a baseline has lost a third (.venv)
    python3 dev.py lint                 run ruff and mypy on this tree (.venv)
    python3 dev.py build                build the sdist and the wheel into dist/, and check what is in them (.venv)

It needs Python 3.10 or newer and its standard library. The environments are made at the first call, with the versions
in constraints.txt, and are used again until what they were made from has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path


ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "hf_diffusion"
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = (ROOT / "pyproject.toml", CONSTRAINTS)


def step(message: str, *command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Says what is being done and does it. A failure ends this script with the exit code of the command."""
    print(f"dev.py: {message}", flush=True)
    code = subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=False).returncode
    if code:
        print(f"dev.py: failed with exit code {code}: {message}", file=sys.stderr)
        sys.exit(code)


def pip_install(python: Path, message: str, *args: str | Path) -> None:
    # Most of what is installed is never imported: what is, Python compiles by itself (see `main`).
    options = ("--disable-pip-version-check", "install", "-qq", "--no-compile", "-c", CONSTRAINTS)
    step(message, python, "-m", "pip", *options, *args)


def files_below(folder: Path) -> list[Path]:
    """The files of a source folder, without caches and hidden files."""

    def is_source(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts)

    return sorted(filter(is_source, folder.rglob("*")))


def digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def says(stamp: Path, text: str) -> bool:
    return stamp.is_file() and stamp.read_text() == text


def environment(name: str) -> Path:
    """The interpreter of the virtual environment `name`, which is made anew if it is not of this Python and place."""
    folder = ROOT / name
    made_by, stamp = f"{sys.version} {sys.base_prefix} {folder}", folder / "made-by.stamp"
    if not says(stamp, made_by):
        step(f"making {name}", sys.executable, "-m", "venv", "--clear", folder)
        stamp.write_text(made_by)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def editable_install(extra: str) -> Path:
    """The interpreter of .venv, with this tree and one of its extras installed."""
    python = environment(".venv")
    wanted, stamp = digest(REQUIREMENTS), python.parents[1] / f"{extra}.stamp"
    if not says(stamp, wanted):
        pip_install(python, "installing torch", "torch")
        pip_install(python, f"installing hf-diffusion[{extra}]", "--editable", f".[{extra}]")
        stamp.write_text(wanted)
    return python


def wheel_install() -> Path:
    """The interpreter of .venv-demo, with a wheel built from this tree installed."""
    python = environment(".venv-demo")
    wanted, stamp = digest([*REQUIREMENTS, *files_below(PACKAGE)]), python.parents[1] / "wheel.stamp"
    if not says(stamp, wanted):
        pip_install(python, "installing torch", "torch")
        with tempfile.TemporaryDirectory() as folder:
            step("building a wheel", python, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", folder, ROOT)
            (wheel,) = Path(folder).glob("*.whl")
            pip_install(python, "installing the wheel", "--force-reinstall", "--no-deps", wheel)
            pip_install(python, "installing what the wheel needs", wheel)
        stamp.write_text(wanted)
    return python


def demo(args: list[str]) -> None:
    command = wheel_install().with_name("hf-diffusion.exe" if os.name == "nt" else "hf-diffusion")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as folder:
        step("running hf-diffusion demo", command, "demo", *args, cwd=Path(folder), env=env)


def oldest_transformers(python: Path) -> Path:
    """A folder with the oldest transformers that pyproject.toml allows, to be imported before the one in .venv."""
    found = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    folder = python.parents[1] / f"transformers-{found[1]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            target = Path(temporary) / "packages"
            options = ("install", "-qq", "--no-compile", "--no-deps", "--target", target)
            step(f"installing transformers {found[1]}", python, "-m", "pip", *options, f"transformers=={found[1]}")
            target.rename(folder)
    return folder


def test(args: list[str], oldest: bool = False) -> None:
    python = editable_install("test")
    env = {**os.environ, "PYTHONPATH": str(oldest_transformers(python))} if oldest else None
    step("fetching transformers' own tests", python, "tests/transformers_tests.py", env=env)
    # A process is given whole files, in the order in which they are collected (tests/conftest.py).
    parallel = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
    step("running pytest", python, "-m", "pytest", *parallel, *args, env=env)


def bench() -> None:
    step("timing small models", editable_install("test"), "benchmarks/short.py", "--check")


def lint() -> None:
    python = editable_install("dev")
    step("running ruff check", python, "-m", "ruff", "check")
    step("running ruff format --check", python, "-m", "ruff", "format", "--check")
    step("running mypy", python, "-m", "mypy")


def build() -> None:
    python, dist = editable_install("dev"), ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    step("building the sdist, and the wheel from it", python, "-m", "build", "--outdir", dist)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        pip_install(python, "checking what is in them", "--no-deps", "--target", folder, wheel)
        installed = {path.relative_to(folder) for path in files_below(Path(folder))}
    with tarfile.open(sdist) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    package = {path.relative_to(ROOT) for path in [*files_below(PACKAGE), PACKAGE / "py.typed"]}
    sources = package | {path.relative_to(ROOT) for path in files_below(ROOT / "tests")}
    for name, lost in ((wheel.name, package - installed), (sdist.name, sources - packed)):
        if lost:
            sys.exit(f"dev.py: {name} lacks {', '.join(sorted(map(str, lost)))}")
    print(f"dev.py: {wheel.name} and {sdist.name} hold all they should")


def main() -> None:
    if sys.version_info < (3, 10):
        sys.exit(f"dev.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")
    # Whatever is started would otherwise compile PyTorch and transformers anew, in ten seconds and more.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    name, *args = sys.argv[1:] or ["--help"]
    if name == "demo":
        demo(args)
    elif name in ("test", "test-oldest"):
        test(args, oldest=name == "test-oldest")
    elif name in ("bench", "lint", "build") and not args:
        {"bench": bench, "lint": lint, "build": build}[name]()
    elif name in ("-h", "--help"):
        print(__doc__)
    else:
        sys.exit(f"dev.py: does not know {' '.join(sys.argv[1:])!r}; see python3 dev.py --help")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
