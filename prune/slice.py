"""A pruned model on disk: the folder of the original with every cut applied, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Replacement
from adaptc.base import Base
from adaptc.base_files import read_object, weight_files
from adaptc.errors import FormatError, NeedsError
from adaptc.prune.cuts import Cut, slice_delta, spread_delta
from adaptc.tensorfile import NAMES, TensorFile, header_of

Edit = Callable[[], Tensor]
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_OWN = ("config.json", "adapter_config.json")


def shard_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights. Raises NeedsError where there are none."""
    found = [p for p in weight_files(folder) if not p.name.startswith("pruned_index")]
    if not found:
        raise NeedsError(f"{folder} holds no safetensors weights",
                         hint="--base wants a model folder with config.json and *.safetensors")
    return found


def write_model(base: Base, out: Path, cuts: Mapping[str, Cut], config: Mapping[str, Any], *, transposed: bool,
                masked: bool = False, edits: Mapping[str, Edit] | None = None) -> None:
    """Write the model folder `out` (which exists, empty) with every parameter of `base` cut, or masked.

    `config` takes the place of config.json where anything is cut; files that hold no cut parameter, the tokenizer and
    generation settings are copied byte for byte. `edits` give the values (logical, already cut) of parameters that are
    more than a slice.
    """
    changed = any(not c.whole for c in cuts.values())
    for file in shard_files(base.path):
        opened = TensorFile(file)
        if any(n in cuts and not cuts[n].whole for n in opened):
            _write_shard(base, opened, out / file.name, cuts, transposed, masked, edits or {})
        else:
            shutil.copyfile(file, out / file.name)
    for file in sorted(base.path.iterdir()):
        beside = file.suffix in _BESIDE and not file.name.endswith(".index.json")
        if file.is_file() and (beside or file.name.startswith("LICENSE")) and file.name not in _OWN:
            shutil.copyfile(file, out / file.name)
    if changed:
        (out / "config.json").write_text(json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")
    else:
        shutil.copyfile(base.path / "config.json", out / "config.json")
    _write_index(base.path, out)


def _write_shard(base: Base, source: TensorFile, out: Path, cuts: Mapping[str, Cut], transposed: bool, masked: bool,
                 edits: Mapping[str, Edit]) -> None:
    plan: dict[str, Tensor] = {}
    for name in source:
        w, cut = source[name], cuts.get(name)
        if cut is not None and not masked:
            shape = cut.kept[::-1] if transposed else cut.kept
            plan[name] = torch.empty(shape, dtype=w.dtype, device="meta")
        else:
            plan[name] = torch.empty(w.shape, dtype=w.dtype, device="meta")
        if w.dtype not in NAMES:
            raise FormatError(f"{name}: dtype {w.dtype} cannot be written")
    header, order = header_of(plan, source.metadata)
    with out.open("wb") as f:
        f.write(header)
        for name in order:
            made = _made(base, name, source[name], cuts.get(name), transposed, masked, edits.get(name)).contiguous()
            if made.numel():
                f.write(made.reshape(-1).view(torch.uint8).numpy().data)


def _made(base: Base, name: str, w: Tensor, cut: Cut | None, transposed: bool, masked: bool, edit: Edit | None
          ) -> Tensor:
    if cut is None:
        return w
    turned = transposed and w.dim() == 2
    logical = w.T if turned else w
    part = edit().to(w.dtype) if edit is not None else cut.slice(logical)
    part = cut.spread(part) if masked else part
    return part.T if turned else part


def _write_index(source: Path, out: Path) -> None:
    """Write the index of a sharded model with the new total size."""
    for index in source.glob("*.safetensors.index.json"):
        told = read_object(index)
        written = [TensorFile(out / p.name) for p in shard_files(source)]
        about = {**told.get("metadata", {}), "total_size": sum(t.nbytes(n) for t in written for n in t)}
        if "total_parameters" in about:
            about["total_parameters"] = sum(math.prod(t.info[n][1]) for t in written for n in t)
        (out / index.name).write_text(json.dumps({**told, "metadata": about}, indent=2) + "\n")


def slice_adapter(adapter: Adapter, base: Base, cuts: Mapping[str, Cut], *, masked: bool = False) -> Adapter:
    """Return the adapter for the pruned base: rows of B, columns of A and carried tensors cut (or masked)."""
    deltas, replaced = dict(adapter.deltas), dict(adapter.replaced)
    for key, delta in adapter.deltas.items():
        cut = cuts.get(base.name_of(key) or key)
        if cut is not None and not cut.whole:
            part = slice_delta(key, delta, cut)
            deltas[key] = spread_delta(key, part, cut) if masked else part
    for key, value in adapter.replaced.items():
        cut = cuts.get(base.name_of(key) or key)
        if cut is not None and not cut.whole:
            replaced[key] = _cut_tensor(key, value, cut, cut.mask if masked else cut.slice)
    return replace(adapter, deltas=deltas, replaced=replaced)


def _cut_tensor(key: str, value: Replacement, cut: Cut, how: Callable[[Tensor], Tensor]) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != cut.shape:
        raise FormatError(f"{key}: carried tensor does not have the shape {cut.shape} of the base")
    return how(value)


def rebased(adapter: Adapter, name: str | None) -> Adapter:
    """Return the adapter with another base model's name, and without the fingerprint of the old one."""
    config = dict(adapter.origin.config)
    if "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = name
    return replace(adapter, origin=replace(adapter.origin, config=config, base_model=name, fingerprint=None))
