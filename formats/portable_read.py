"""Manifest and tensors of the container -> Adapter. Nothing in a file is believed before it is checked."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows, Step
from adaptc.coded import Coded, JointCode
from adaptc.delta import Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import AdaptcError, FormatError
from adaptc.factor import Encoded, Factor
from adaptc.formats.portable_names import unpack_names
from adaptc.formats.portable_write import VERSION, digest
from adaptc.registry import CODECS
from adaptc.tensorfile import DTYPES, TensorFile

MANIFEST = "adaptc"
# Checksums of tensors up to this size are checked whenever a file is opened; `adaptc verify` checks them all.
CHECKED_AT_OPEN = 16 * 2**20
MAX_ORIGIN = 64 * 2**20
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, RecursionError, OverflowError)


def read_adapter(file: TensorFile, name: str, files: Mapping[str, int]) -> Adapter:
    """Return the adapter a container holds. Raises FormatError for anything that contradicts itself."""
    try:
        return _read(file, files)
    except AdaptcError as e:
        raise type(e)(f"{name}: {e}", hint=e.hint) from e
    except _MALFORMED as e:
        raise FormatError(f"{name}: manifest is malformed ({type(e).__name__}: {e})") from e


def manifest_of(file: TensorFile) -> dict[str, Any]:
    """Return the manifest. Raises FormatError unless it is a JSON object of a version this code reads."""
    try:
        manifest = json.loads(file.metadata[MANIFEST])
    except (ValueError, RecursionError) as e:
        raise FormatError("manifest is not JSON") from e
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise FormatError("manifest has no format version")
    if manifest["format"] > VERSION:
        raise FormatError(f"container format {manifest['format']} is newer than {VERSION}, the newest read here",
                          hint="upgrade adaptc")
    return manifest


def check_sums(file: TensorFile, manifest: Mapping[str, Any], limit: int | None) -> int:
    """Check tensors of up to `limit` bytes (None: all) against their checksums; return how many were checked.

    A payload that the file holds only in part has no checksum that fits and is skipped.
    """
    sums = manifest["sums"]
    if set(sums) != set(file):
        odd = sorted(set(sums) ^ set(file))[0]
        raise FormatError(f"manifest and file disagree about tensor {odd!r}")
    checked = 0
    for name in file:
        if name == file.cut or (limit is not None and file.nbytes(name) > limit):
            continue
        if digest(file[name]) != sums[name]:
            raise FormatError(f"tensor {name!r} does not match its checksum, the file is damaged")
        checked += 1
    return checked


def _read(file: TensorFile, files: Mapping[str, int]) -> Adapter:
    manifest = manifest_of(file)
    check_sums(file, manifest, CHECKED_AT_OPEN)
    used: set[str] = {"origin"}
    deltas: dict[str, Delta] = {}
    for i, entry in enumerate(manifest.get("codes", [])):
        _add(deltas, _read_code(i, entry, file, used))
    for i, entry in enumerate(manifest.get("groups", [])):
        _add(deltas, _read_group(i, entry, file, used))
    replaced: dict[str, Replacement] = {}
    for key, value in manifest.get("replaced", {}).items():
        replaced[key] = _rows(value, file, used) if isinstance(value, dict) else _take(file, value, used)
    extra = {key: _take(file, value, used) for key, value in manifest.get("extra", {}).items()}
    unused = set(file) - used
    if unused:
        raise FormatError(f"tensor {sorted(unused)[0]!r} is not named in the manifest")
    origin = _origin(file["origin"], manifest, files, file.cut)
    history = tuple(Step(**{k: v for k, v in s.items()}) for s in manifest.get("history", []))
    return Adapter(deltas, replaced, origin, history, extra)


def _add(deltas: dict[str, Delta], more: Mapping[str, Delta]) -> None:
    for name in more:
        if name in deltas:
            raise FormatError(f"manifest names {name} twice")
    deltas.update(more)


def _take(file: TensorFile, name: Any, used: set[str]) -> Tensor:
    if not isinstance(name, str) or name not in file:
        raise FormatError(f"manifest names a tensor {name!r} that the file does not hold")
    used.add(name)
    return file[name]


def _shape(value: Any) -> tuple[int, ...]:
    ok = isinstance(value, list) and value and all(type(v) is int and 0 < v < 2**31 for v in value)
    if not ok or math.prod(value) >= 2**48:
        raise FormatError(f"manifest has shape {str(value)[:60]}")
    return tuple(value)


def _read_code(i: int, entry: Mapping[str, Any], file: TensorFile, used: set[str]) -> dict[str, Delta]:
    shapes: dict[str, tuple[int, ...]] = {}
    for template, shape in entry["modules"]:
        for name in unpack_names([template]):
            if name in shapes:
                raise FormatError(f"manifest names {name} twice")
            shapes[name] = _shape(shape)
    codec = CODECS.get(str(entry["codec"]))
    names = [n for n in file if n.rpartition(".")[2] == str(i) and not n.startswith(("g", "carried."))]
    streams = {n.rpartition(".")[0]: _take(file, n, used) for n in names}
    if "payload" not in streams or any(t.dtype != torch.uint8 or t.dim() != 1 for t in streams.values()):
        raise FormatError(f"code {i} has no flat uint8 payload")
    flat = {n: (s[0], math.prod(s[1:])) for n, s in shapes.items()}
    code: JointCode = codec.load(flat, entry.get("config", {}), streams)
    return {name: Coded(code, name, shape) for name, shape in shapes.items()}


def _read_group(i: int, entry: Mapping[str, Any], file: TensorFile, used: set[str]) -> dict[str, Delta]:
    names = unpack_names(entry["modules"])
    stacked: list[Tensor] = []
    while f"g{i}.{len(stacked)}" in file:
        stacked.append(_take(file, f"g{i}.{len(stacked)}", used))
    for j, t in enumerate(stacked):
        if t.dim() == 0 or t.shape[0] != len(names):
            raise FormatError(f"tensor g{i}.{j} has shape {tuple(t.shape)} for {len(names)} modules")
    scales = entry.get("scales", [])
    out: dict[str, Delta] = {}
    for k, name in enumerate(names):
        values = [float(s[k] if isinstance(s, list) else s) for s in scales]
        out[name] = _delta(entry["form"], [t[k] for t in stacked], values)
    return out


def _delta(form: Mapping[str, Any], held: list[Tensor], scales: list[float]) -> Any:
    """Return the delta of a form. Shapes are checked against the tensors."""
    kind, shape = form["kind"], _shape(form["shape"])
    scale = scales[form["scale"]] if "scale" in form else 1.0

    def part(name: str) -> Any:
        return _delta(form[name], held, scales)

    match kind:
        case "lowrank":
            a, b = _factor(form["a"], held), _factor(form["b"], held)
            core = _factor(form["core"], held) if "core" in form else None
            made = LowRank(a, b, core, scale, shape)
            _check_low_rank(made)
            return made
        case "dense":
            weight = _factor(form["weight"], held)
            if math.prod(weight.shape) != math.prod(shape):
                raise FormatError(f"dense delta of shape {shape} has a weight of shape {tuple(weight.shape)}")
            return Dense(weight, scale, shape)
        case "sparse":
            indices, values = held[form["indices"]], held[form["values"]]
            if indices.shape != values.shape or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max())
                                                 < math.prod(shape)):
                raise FormatError(f"sparse delta of shape {shape} has indices outside of it")
            return Sparse(indices, values, scale, shape)
        case "kron":
            return Kron(part("left"), part("right"), scale, shape)
        case "hadamard":
            return Hadamard(part("left"), part("right"), scale, shape)
        case "sum":
            return Sum(tuple(_delta(f, held, scales) for f in form["terms"]), shape)
        case "needsbase":
            tensors = {k: held[v] for k, v in form["tensors"].items()}
            inner = part("inner") if "inner" in form else None
            return NeedsBase(str(form["name"]), tensors, form["config"], shape, inner)
    raise FormatError(f"manifest has a delta of kind {kind!r}, which this version does not know")


def _factor(value: Any, held: list[Tensor]) -> Factor:
    if isinstance(value, int):
        return held[value]
    streams = {k: held[v] for k, v in value["streams"].items()}
    codec, shape = str(value["codec"]), torch.Size(_shape(value["shape"]))
    CODECS.get(codec)
    return Encoded(codec, value["config"], streams, shape, DTYPES[value["dtype"]])


def _check_low_rank(d: LowRank) -> None:
    out_in = (d.shape[-2], d.shape[-1]) if len(d.a.shape) == 3 else (d.shape[0], math.prod(d.shape[1:]))  # type: ignore[union-attr]
    if (d.b.shape[-2], d.a.shape[-1]) != out_in:
        raise FormatError(f"factors of {tuple(d.b.shape)} and {tuple(d.a.shape)} do not make shape {d.shape}")
    inner = tuple(d.core.shape[-2:]) if d.core is not None else (d.a.shape[-2], d.a.shape[-2])
    if inner != (d.b.shape[-1], d.a.shape[-2]):
        raise FormatError(f"factors of {tuple(d.b.shape)} and {tuple(d.a.shape)} do not share a rank")


def _rows(value: Mapping[str, Any], file: TensorFile, used: set[str]) -> Rows:
    rows = Rows(tuple(int(i) for i in value["rows"]), _take(file, value["values"], used))
    if len(rows.indices) != rows.values.shape[0]:
        raise FormatError(f"{len(rows.indices)} row numbers for {rows.values.shape[0]} rows")
    return rows


def _origin(blob: Tensor, manifest: Mapping[str, Any], files: Mapping[str, int], cut: str | None) -> Origin:
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(blob.numpy().tobytes(), MAX_ORIGIN)
    except zlib.error as e:
        raise FormatError("origin is no deflated text") from e
    if unpack.unconsumed_tail or not unpack.eof:
        raise FormatError(f"origin inflates to more than {MAX_ORIGIN} bytes or is cut short")
    said = json.loads(text)
    notes = tuple(said.get("notes", ()))
    if cut is not None:
        notes = (*notes, f"the file ends inside {cut}: a smaller adapter was read from what is there")
    return Origin(str(said["dialect"]), said.get("config", {}), said.get("metadata", {}), manifest.get("base"),
                  said.get("files", files), said.get("names", {}), said.get("layout", {}), notes, "adaptc",
                  manifest.get("fingerprint"))
