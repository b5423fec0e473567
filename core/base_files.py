"""The safetensors files that together are one model: a file, a folder of shards, a folder with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc.errors import FormatError, NeedsError
from adaptc.tensorfile import TensorFile

_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


class Shards(Mapping[str, Tensor]):
    """Tensors of several safetensors files by name; headers are read at once, tensors when they are asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, TensorFile] = {}
        for file in files:
            opened = TensorFile(file)
            self._where |= dict.fromkeys(opened, opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model in `folder`: those of its index, the whole one, or all.

    Adapters that lie beside the model are not part of it. Raises FormatError for a damaged index, NeedsError for a
    shard that the index names and the folder has not.
    """
    found = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        weight_map = read_object(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise FormatError(f"{indices[0].name}: weight_map is no map of file names")
        names = sorted(set(weight_map.values()))
        lost = [n for n in names if "/" in n or "\\" in n or not (folder / n).is_file()]
        if lost:
            raise NeedsError(f"{folder} lacks {len(lost)} of {len(names)} shards of its index, as {lost[0]}")
        return [folder / n for n in names]
    whole = [p for p in found if p.name in _WHOLE]
    return whole if len(whole) == 1 else found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is no such file. Raises FormatError for anything else in it."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path.name}: not JSON") from e
    if not isinstance(value, dict):
        raise FormatError(f"{path.name}: not a JSON object")
    return value
