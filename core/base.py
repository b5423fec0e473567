"""Base: the weights of a base model by parameter name, opened one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.base_bnb import Dequantised
from adaptc.base_files import Shards, read_object, weight_files
from adaptc.errors import FormatError, NeedsError
from adaptc.hub import fetch, is_hub_id

# Model families whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_FAMILIES = frozenset({"gpt2", "imagegpt", "decision_transformer", "clvp", "openai-gpt"})
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
_WANTED = "--base wants a model folder, a safetensors or GGUF file, or a Hub id"


class Base(Mapping[str, Tensor]):
    """Weights of a base model: an HF folder (one file or shards), a safetensors file, a GGUF file, or a Hub id.

    Nothing is read until a parameter is asked for; what GGUF or bitsandbytes quantised is decoded then. Names are
    looked up as given, then with a leading component added or removed ("model.", "transformer.", "bert.", ...),
    because checkpoints of a bare encoder lack the task prefix. `config` is config.json, {} where there is none.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists() and is_hub_id(str(path), (".safetensors", ".gguf")):
            path = fetch(str(path), ("*.json", "*.safetensors"))
        self.path = path
        self._weights, self.config = _opened(path)
        self._names = frozenset(self._weights)
        self._by_tail: dict[str, list[str]] = {}
        for name in self._weights:
            self._by_tail.setdefault(name.split(".", 1)[-1], []).append(name)

    def name_of(self, key: str) -> str | None:
        """Return the checkpoint's name for parameter `key`, None if it has none or several."""
        if key in self._names:
            return key
        near = [key.split(".", 1)[-1]] if "." in key else []
        hits = [n for n in near if n in self._names] + self._by_tail.get(key, [])
        return hits[0] if len(set(hits)) == 1 else None

    def __getitem__(self, key: str) -> Tensor:
        name = self.name_of(key)
        if name is None:
            raise NeedsError(f"base has no parameter {key}", hint=f"{self.path} holds {len(self)} others")
        return self._weights[name]

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return parameter `key` in logical orientation (out, in, ...). Raises FormatError if `shape` cannot fit."""
        w = self[key]
        stored = tuple(w.shape)
        conv1d = self.config.get("model_type") in _CONV1D_FAMILIES and key.split(".")[-2] in _CONV1D_MODULES
        if len(stored) == 2 and (conv1d or (not _fits(stored, shape) and _fits(stored[::-1], shape))):
            w, stored = w.T, stored[::-1]
        if not _fits(stored, shape):
            raise FormatError(f"{key}: base weight has shape {stored}, the adapter was made for {shape}")
        return w

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _opened(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the weights at `path` by name, and the model's config."""
    if path.is_dir():
        config, files = read_object(path / "config.json"), weight_files(path)
        if files:
            return Dequantised(Shards(files)), config
        path = _only_gguf(path)
    elif not path.is_file():
        raise NeedsError(f"{path} does not exist", hint=_WANTED)
    with path.open("rb") as f:
        magic = f.read(4)
    if magic == b"GGUF":
        from adaptc.base_gguf import GgufWeights

        model = GgufWeights(path)
        return model, model.config
    return Dequantised(Shards([path])), {}


def _only_gguf(folder: Path) -> Path:
    """Return the GGUF file in a folder without safetensors. Raises NeedsError where there is none or a choice."""
    found = sorted(p for p in folder.glob("*.gguf") if "-of-" not in p.name or "-00001-of-" in p.name)
    if len(found) == 1:
        return found[0]
    if found:
        raise NeedsError(f"{folder} holds {len(found)} GGUF models, as {found[0].name}", hint="name the file")
    raise NeedsError(f"{folder} holds no safetensors weights", hint=_WANTED)


def _fits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(shape) == 2 < len(stored):
        stored = (stored[0], math.prod(stored[1:]))
    return len(stored) == len(shape) and all(want in (0, have) for have, want in zip(stored, shape, strict=True))
