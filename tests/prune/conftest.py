"""A tiny model and its adapter, written once a session, and how both run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny_models import write_base, write_lora


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """written(kind): the folders of a random model and of a LoRA on all its projections."""
    @cache
    def make(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        base = write_base(folder / "base", kind)
        return base, write_lora(folder / "lora", base, kind)

    return make
