"""Results kept by the content they were made from: a folder of small JSON files, one a key, each whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from adaptc.adapter import Replacement, Rows
from adaptc.formats.atomic import staged

_BLOCK, _SAMPLES = 4096, 256
_SMALL = 2**22  # files up to here are hashed whole


def digest(value: Any) -> str:
    """Return the SHA-256 of JSON values, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of whole files with their names, in the order of the names."""
    out = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        out.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return out.hexdigest()


def digest_model(path: Path) -> str:
    """Return a digest of a model: a file, or the JSON, text, GGUF and safetensors files of a folder.

    Small files count whole; of weights the size and 256 blocks of 4 KiB spread evenly from first to last, because a
    base of many gigabytes is not read for this. An edit of weights that misses every block goes unnoticed.
    """
    kinds = (".json", ".txt", ".model", ".safetensors", ".gguf")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in kinds and p.is_file())
    out = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        out.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as f:
            if size <= _SMALL:
                out.update(f.read())
                continue
            for i in range(_SAMPLES):
                f.seek(i * (size - _BLOCK) // (_SAMPLES - 1))
                out.update(f.read(_BLOCK))
    return out.hexdigest()


def digest_tensors(tensors: Mapping[str, Replacement]) -> str:
    """Return the SHA-256 of tensors: names, dtypes, shapes and values."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        indices, values = (value.indices, value.values) if isinstance(value, Rows) else ((), value)
        out.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0{indices}\0".encode())
        out.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


class Cache:
    """JSON objects by key. A damaged or foreign file counts as absent; writing replaces it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Return what was put under `key`, None where there is nothing whole."""
        try:
            value = json.loads((self.folder / f"{key}.json").read_text(encoding="utf8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and value.get("key") == key else None

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep `value` under `key`, whole or not at all."""
        text = json.dumps({"key": key, **value}, indent=1)
        with staged(self.folder / f"{key}.json", force=True) as temp:
            temp.write_text(text, encoding="utf8")
