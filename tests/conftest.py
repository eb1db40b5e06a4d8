"""Shared set-up: the same threads and seed for every test, and no network."""

import os
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lie beside the checkout, where there are any."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data beside the checkout, which a fresh clone does not have")
    return SHARED
