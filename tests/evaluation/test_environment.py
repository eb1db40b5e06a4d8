"""What is written beside every number: the state of the checkout, versions and hardware, against other sources."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hf_diffusion.evaluation import environment
from hf_diffusion.evaluation.environment import checkout


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_with_changes_is_not_reported_as_the_clean_commit(tmp_path):
    nothing = {"commit": None, "uncommitted_changes": None}
    code, other = tmp_path / "code.py", tmp_path / "other.py"
    code.write_text("1\n")
    other.write_text("1\n")
    assert checkout(code) == nothing
    git(tmp_path, "init")
    git(tmp_path, "add", "code.py", "other.py")
    git(tmp_path, "commit", "-m", "first")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "uncommitted_changes": False}
    assert checkout(code) == clean
    other.write_text("2\n")
    assert checkout(code) == {**clean, "uncommitted_changes": True}
    git(tmp_path, "commit", "-am", "second")
    assert checkout(code) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "uncommitted_changes": False}
    (tmp_path / "installed.py").write_text("1\n")
    assert checkout(tmp_path / "installed.py") == nothing


def test_versions_are_those_that_are_imported():
    import tokenizers
    import transformers

    found = environment()
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)
    assert found["tokenizers"] == tokenizers.__version__
    assert {"lm_eval", "mauve-text"} <= found.keys()
    assert json.loads(json.dumps(found)) == found


@pytest.mark.skipif(sys.platform != "linux", reason="compares with files of Linux")
def test_hardware_is_what_the_system_says():
    found, cpus = environment(), Path("/proc/cpuinfo").read_text()
    assert found["memory_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert found["cores"] == psutil.cpu_count()
    if "model name" in cpus:
        assert re.search(rf"model name\s*: {re.escape(found['cpu'])}\n", cpus)
    assert (found["accelerator"] is None) == (not torch.accelerator.is_available())
