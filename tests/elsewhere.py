"""New Python processes that know nothing of this one: no settings, no caches, no network unless they are given one."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def run_elsewhere(script, *arguments, home, **settings):
    """Run the file of the module `script` in the empty folder `home`, with `settings` in its environment.

    The package can be imported; a script that must do without it has to see to that itself, since it may be installed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **settings}
    subprocess.run([sys.executable, script.__file__, *arguments], env=environment, cwd=home, check=True, timeout=300)
