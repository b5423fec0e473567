"""Base: the weights of a base model by parameter name, opened one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.errors import FormatError, NeedsError
from adaptc.tensorfile import TensorFile

# Model families whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_FAMILIES = frozenset({"gpt2", "imagegpt", "decision_transformer", "clvp", "openai-gpt"})
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


class Base(Mapping[str, Tensor]):
    """Weights of a base model from an HF folder (single or sharded safetensors) or one safetensors file.

    Nothing is read until a parameter is asked for. Names are looked up as given, then with a leading component added
    or removed ("model.", "transformer.", "bert.", ...), because checkpoints of a bare encoder lack the task prefix.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = {}
        files = [path]
        if path.is_dir():
            config = path / "config.json"
            self.config = json.loads(config.read_text()) if config.is_file() else {}
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise NeedsError(f"{path} holds no safetensors weights",
                                 hint="--base wants a model folder with *.safetensors, or one safetensors file")
        elif not path.is_file():
            raise NeedsError(f"{path} does not exist", hint="--base wants a model folder or a safetensors file")
        self._where: dict[str, TensorFile] = {}
        for file in files:
            opened = TensorFile(file)
            self._where |= dict.fromkeys(opened, opened)
        self._by_tail: dict[str, list[str]] = {}
        for name in self._where:
            self._by_tail.setdefault(name.split(".", 1)[-1], []).append(name)

    def name_of(self, key: str) -> str | None:
        """Return the checkpoint's name for parameter `key`, None if it has none or several."""
        if key in self._where:
            return key
        near = [key.split(".", 1)[-1]] if "." in key else []
        hits = [n for n in near if n in self._where] + self._by_tail.get(key, [])
        return hits[0] if len(set(hits)) == 1 else None

    def __getitem__(self, key: str) -> Tensor:
        name = self.name_of(key)
        if name is None:
            raise NeedsError(f"base has no parameter {key}", hint=f"{self.path} holds {len(self)} others")
        return self._where[name][name]

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
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _fits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(shape) == 2 < len(stored):
        stored = (stored[0], math.prod(stored[1:]))
    return len(stored) == len(shape) and all(want in (0, have) for have, want in zip(stored, shape, strict=True))
