"""The examples run, and print what their first lines promise."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    "streams.py": "43 passes, 3.72 tokens per forward",
    "infill.py": "Good morrow, my lord.",
    "train.py": "train_loss",
    "lora.py": "nats per token before",
    "sft.py": "LEAR. The raven croaks, boy.",
    "streams_sft.py": "in 4 streams: The raven croaks, boy.",
}
REQUIRED = {"sft.py": "trl"}


def test_every_example_is_here():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    if name in REQUIRED:
        pytest.importorskip(REQUIRED[name], reason=f"needs the extra `{REQUIRED[name]}`")
    command = [sys.executable, str(ROOT / "examples" / name)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert EXAMPLES[name] in result.stdout
