"""The index map of a pruned model: which rows and columns of the original every parameter kept, as one small file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError
from adaptc.prune.cuts import Cut
from adaptc.tensorfile import TensorFile, write_tensors

NAME = "pruned_index.safetensors"
_META = "adaptc.pruned"
_AXES = ("rows", "cols")


def write_map(path: Path, cuts: Mapping[str, Cut], about: Mapping[str, Any]) -> None:
    """Write `P.rows` and `P.cols` (sorted int32 indices) of every cut; shapes and `about` go to the metadata."""
    tensors = {f"{key}.{axis}": index.to(torch.int32) for key, cut in cuts.items()
               for axis, index in zip(_AXES, (cut.rows, cut.cols), strict=True) if index is not None}
    shapes = {key: list(cut.shape) for key, cut in cuts.items()}
    with path.open("wb") as f:
        write_tensors(f, tensors, {_META: json.dumps({**about, "shapes": shapes}, sort_keys=True)})


def read_map(path: Path) -> tuple[dict[str, Cut], dict[str, Any]]:
    """Return the cuts of a map and what else it says. Raises FormatError for one that contradicts itself."""
    if not path.is_file():
        raise NeedsError(f"{path} does not exist", hint=f"adaptc prune writes {NAME} into the pruned model's folder")
    file = TensorFile(path)
    try:
        about = json.loads(file.metadata.get(_META, ""))
        shapes = {str(k): tuple(int(n) for n in v) for k, v in about.pop("shapes").items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise FormatError(f"{path.name}: metadata has no {_META} that says what was pruned") from e
    cuts = {key: Cut(shape, *(_index(path.name, file, key, axis, shape) for axis in range(2)))
            for key, shape in shapes.items()}
    odd = [n for n in file if n.rpartition(".")[0] not in shapes or n.rpartition(".")[2] not in _AXES]
    if odd:
        raise FormatError(f"{path.name}: {odd[0]} belongs to no pruned parameter")
    return cuts, about


def _index(name: str, file: TensorFile, key: str, axis: int, shape: tuple[int, ...]) -> Tensor | None:
    stored = file.get(f"{key}.{_AXES[axis]}")
    if stored is None:
        return None
    index = stored.long()
    sorted_ = index.dim() == 1 and axis < len(shape) and bool((index[1:] > index[:-1]).all())
    if not sorted_ or (len(index) and not 0 <= int(index[0]) <= int(index[-1]) < shape[axis]):
        raise FormatError(f"{name}: {key}.{_AXES[axis]} is no sorted list of places in shape {shape}")
    return index
