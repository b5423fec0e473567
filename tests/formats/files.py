"""Small adapter files of many dialects, from plain tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.tensorfile import write_tensors


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def put(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors or torch file, by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        with path.open("wb") as f:
            write_tensors(f, tensors, metadata or {})
    else:
        torch.save(dict(tensors), path)
    return path


def put_config(folder: Path, config: Any, name: str = "adapter_config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def stored(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file as adaptc's own writers are not trusted with: by the libraries they belong to."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  not a mapping
    held = torch.load(path, weights_only=True)
    return dict(held.get("model", held))


def equal(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
    """Return whether two files hold the same tensors bit for bit."""
    return set(x) == set(y) and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
