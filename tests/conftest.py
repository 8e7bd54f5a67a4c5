"""Fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with the reason, where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN (floating) or the largest value (integer): an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
