"""Where the reference data (corpus, oracles, arena) lies."""

from __future__ import annotations

import os
from pathlib import Path


def shared_root() -> Path | None:
    """Return the folder with corpus, oracles and arena, None where it is absent."""
    root = Path(os.environ.get("ADAPTC_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    return root if (root / "corpus").is_dir() else None
