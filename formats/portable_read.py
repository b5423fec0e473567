"""Manifest and tensors of the container -> Adapter. Nothing in a file is believed before it is checked."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows
from adaptc.coded import Coded, JointCode
from adaptc.delta import Delta
from adaptc.errors import AdaptcError, FormatError
from adaptc.formats.config_json import MAX_DEPTH, parse_config
from adaptc.formats.portable_forms import read_form, read_number, read_shape
from adaptc.formats.portable_manifest import (
    CHECKED_AT_OPEN,
    check_sums,
    checked_names,
    manifest_of,
    read_history,
)
from adaptc.formats.portable_names import Room, unpack_names
from adaptc.registry import CODECS
from adaptc.tensorfile import TensorFile

MAX_ORIGIN = 16 * 2**20
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError, OverflowError)


def read_adapter(file: TensorFile, name: str, files: Mapping[str, int]) -> Adapter:
    """Return the adapter a container holds. Raises FormatError for anything that contradicts itself."""
    try:
        return _Reader(file).adapter(files)
    except AdaptcError as e:
        raise type(e)(f"{name}: {e}", hint=e.hint) from e
    except _MALFORMED as e:
        raise FormatError(f"{name}: manifest is malformed ({type(e).__name__}: {str(e)[:80]})") from e


class _Reader:
    """One container being read: its tensors, those that were named so far, and room for names."""

    def __init__(self, file: TensorFile) -> None:
        self.file, self.room = file, Room()
        self.left = set(file)  # tensors that nothing has named yet

    def adapter(self, files: Mapping[str, int]) -> Adapter:
        """Return the adapter; every tensor of the file must be named exactly once."""
        manifest = manifest_of(self.file)
        check_sums(self.file, manifest, CHECKED_AT_OPEN)
        coded: dict[str, Delta] = {}
        for i, entry in enumerate(manifest.get("codes", ())):
            _add(coded, self.code(i, entry))
        grouped: dict[str, Delta] = {}
        for i, entry in enumerate(manifest.get("groups", ())):
            _add(grouped, self.group(i, entry, coded))
        _add(coded, grouped)
        replaced: dict[str, Replacement] = {}
        for key, value in manifest.get("replaced", {}).items():
            replaced[key] = self.rows(value) if isinstance(value, dict) else self.take(value)
        extra = {key: self.take(value) for key, value in manifest.get("extra", {}).items()}
        checked_names([*replaced, *extra])
        origin = _origin(self.take("origin"), manifest, files, self.file.cut)
        if self.left:
            raise FormatError(f"tensor {min(self.left)!r} is not named in the manifest")
        return Adapter(coded, replaced, origin, read_history(manifest.get("history", [])), extra)

    def take(self, name: Any) -> Tensor:
        """Return a tensor, each only once."""
        if not isinstance(name, str) or name not in self.file:
            raise FormatError(f"manifest names a tensor {str(name)[:60]!r} that the file does not hold")
        if name not in self.left:
            raise FormatError(f"manifest names tensor {name!r} twice")
        self.left.remove(name)
        return self.file[name]

    def code(self, i: int, entry: Mapping[str, Any]) -> dict[str, Delta]:
        """Return the deltas of a joint code; only its index is looked into."""
        shapes: dict[str, tuple[int, ...]] = {}
        for template, shape in entry["modules"]:
            for name in checked_names(unpack_names([template], self.room)):
                if name in shapes:
                    raise FormatError(f"manifest names {name} twice")
                shapes[name] = read_shape(shape)
        codec = CODECS.get(str(entry["codec"])[:60])
        config = entry.get("config", {})
        if not hasattr(codec, "load") or not isinstance(config, dict):
            raise FormatError(f"codec {codec.id} with config {str(config)[:60]} is no code of many modules")
        streams = {s: self.take(f"{s}.{i}") for s in ("index", "payload")}
        if any(t.dtype != torch.uint8 or t.dim() != 1 for t in streams.values()):
            raise FormatError(f"code {i} has streams that are not flat uint8")
        code: JointCode = codec.load({n: (s[0], math.prod(s[1:])) for n, s in shapes.items()}, config, streams)
        return {name: Coded(code, name, shape) for name, shape in shapes.items()}

    def group(self, i: int, entry: Mapping[str, Any], coded: dict[str, Delta]) -> dict[str, Delta]:
        """Return the deltas of a group; those that wrap a coded one take it out of `coded`."""
        names = checked_names(unpack_names(entry["modules"], self.room))
        stacked: list[Tensor] = []
        while f"g{i}.{len(stacked)}" in self.file:
            stacked.append(self.take(f"g{i}.{len(stacked)}"))
        for j, t in enumerate(stacked):
            if t.dim() == 0 or t.shape[0] != len(names):
                raise FormatError(f"tensor g{i}.{j} has shape {tuple(t.shape)} for {len(names)} modules")
        scales = [_column(s, len(names)) for s in entry["scales"]]
        out: dict[str, Delta] = {}
        for k, name in enumerate(names):
            try:
                out[name] = read_form(entry["form"], [t[k] for t in stacked], [s[k] for s in scales], name, coded)
            except AdaptcError as e:
                raise type(e)(f"{name}: {e}", hint=e.hint) from e
        return out

    def rows(self, value: Mapping[str, Any]) -> Rows:
        """Return the rows that take the place of a parameter's."""
        indices, values = value["rows"], self.take(value["values"])
        ok = isinstance(indices, list) and all(type(i) is int and 0 <= i < 2**31 for i in indices)
        if not ok or len(set(indices)) != len(indices):
            raise FormatError(f"row numbers {str(indices)[:60]} are not distinct and whole")
        if values.dim() < 1 or len(indices) != values.shape[0]:
            raise FormatError(f"{len(indices)} row numbers for values of shape {tuple(values.shape)}")
        return Rows(tuple(indices), values)


def _add(deltas: dict[str, Delta], more: Mapping[str, Delta]) -> None:
    for name in more:
        if name in deltas:
            raise FormatError(f"manifest names {name} twice")
    deltas.update(more)


def _column(value: Any, count: int) -> Sequence[float]:
    """Return one multiplier for each of `count` modules."""
    if not isinstance(value, list):
        return [read_number(value, "multiplier")] * count
    if len(value) != count:
        raise FormatError(f"{len(value)} multipliers for {count} modules")
    return [read_number(v, "multiplier") for v in value]


def _origin(blob: Tensor, manifest: Mapping[str, Any], files: Mapping[str, int], cut: str | None) -> Origin:
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(blob.numpy().tobytes(), MAX_ORIGIN)
    except zlib.error as e:
        raise FormatError("origin is no deflated text") from e
    if unpack.unconsumed_tail or unpack.unused_data or not unpack.eof:
        raise FormatError(f"origin inflates to more than {MAX_ORIGIN} bytes, or does not end where it should")
    said = dict(parse_config(text.decode(), "origin", MAX_DEPTH + 2))
    if cut is not None:
        note = f"the file ends inside {cut}: a smaller adapter was read from what is there"
        said["notes"] = [*_texts("notes", said.get("notes", [])), note]
    stored = manifest.get("fingerprint")
    if stored is not None and not re.fullmatch(r"[0-9a-f]{16}", stored):
        raise FormatError(f"fingerprint is {stored[:40]!r}, not 16 hex digits")
    maps = {k: said.get(k, {}) for k in ("metadata", "names", "layout")}
    sizes = said.get("files", dict(files))
    for name, value in maps.items():
        _texts(name, [*value, *value.values()])
    if not all(type(v) is int for v in sizes.values()):
        raise FormatError("origin has sizes of files that are no numbers")
    dialect, config = said["dialect"], said.get("config", {})
    _texts("dialect", [dialect])
    if not isinstance(config, dict):
        raise FormatError("origin has a config that is no object")
    return Origin(dialect, config, maps["metadata"], manifest.get("base"), sizes, maps["names"], maps["layout"],
                  tuple(_texts("notes", said.get("notes", []))), "adaptc", stored)


def _texts(name: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise FormatError(f"origin has {name} that are no text")
    return values
