"""Shared fixtures: where the reference data lies, and small random adapters."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports triton: its own library functions are made for the interpreter, or not, when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from reference_data import shared_root

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data; tests that ask for it are skipped where it is absent."""
    root = shared_root()
    if root is None:
        pytest.skip("reference data is absent: set ADAPTC_SHARED or put shared/ beside the repository")
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that asks for the reference data, so that `-m shared` and `-m "not shared"` part the suite."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
