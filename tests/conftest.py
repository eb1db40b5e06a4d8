"""Shared set-up: the same seed for every test, no network, and one thread: models are so small that more only wait."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for what tests start

import pytest
import torch


SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: at the end one would keep one process busy and leave the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler():
    """torch.compile gives a function up that it has compiled too often, whichever file asked for it."""
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)  # all is on the CPU; torch.manual_seed asks every accelerator, in 2 ms


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lie beside the checkout, where there are any."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data beside the checkout, which a fresh clone does not have")
    return SHARED
