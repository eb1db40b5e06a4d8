"""A folder that is either written in full or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` once the block has ended without an error, and vanishes otherwise.

    Raises:
        FileExistsError: before anything is written, if `output` exists and is not an empty folder.
    """
    check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
    try:
        yield partial
        # As a folder made by anybody would have; `mkdtemp` makes private ones.
        partial.chmod(output.parent.stat().st_mode & 0o777)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(output: Path) -> None:
    """Raise FileExistsError if `output` exists and is not an empty folder."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists already. Name another folder, or remove it.")
