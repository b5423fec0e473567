"""Adapter -> manifest and tensors of the container."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.coded import Coded, JointCode
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import UnsupportedError
from adaptc.factor import Encoded
from adaptc.formats.format import history_steps
from adaptc.formats.portable_names import pack_names, unpack_names
from adaptc.quant.directions import MAX_MODULES, PLAIN, Directions
from adaptc.quant.golomb import shorter
from adaptc.tensorfile import NAMES

VERSION = 1
# Fields of each delta kind that hold a tensor or codes, and those that hold another delta.
FACTORS = {"lowrank": ("a", "b", "core"), "dense": ("weight",), "sparse": ("indices", "values"),
           "spectral": ("indices", "values")}
PARTS = {"kron": ("left", "right"), "hadamard": ("left", "right"), "sum": ("terms",), "needsbase": ("inner",)}


def manifest_and_tensors(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest (JSON values) and the tensors by stored name. Works on meta tensors, for sizes."""
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {"format": VERSION}
    if adapter.origin.base_model is not None:
        manifest["base"] = adapter.origin.base_model
    if adapter.origin.fingerprint is not None:
        manifest["fingerprint"] = adapter.origin.fingerprint
    codes = _codes(adapter)
    taken = {name for _, names in codes for name in names if not isinstance(adapter.deltas[name], NeedsBase)}
    manifest["codes"] = [_code(i, code, names, adapter, tensors) for i, (code, names) in enumerate(codes)]
    rest = {k: d for k, d in adapter.deltas.items() if k not in taken}
    manifest["groups"] = [_group(i, members, tensors) for i, members in enumerate(_alike(rest))]
    manifest |= _carried(adapter, tensors)
    tensors["origin"] = _origin(adapter)
    if adapter.history:
        manifest["history"] = history_steps(adapter)
    manifest["sums"] = {name: digest(t) for name, t in sorted(tensors.items())}
    return {k: v for k, v in manifest.items() if v not in ([], {})}, tensors


def digest(t: Tensor) -> str:
    """Return the first 16 hex digits of the SHA-256 of a tensor's bytes (zeros on the meta device)."""
    if t.is_meta:
        return "0" * 16
    flat = t.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data if flat.numel() else b"").hexdigest()[:16]


def _codes(adapter: Adapter) -> list[tuple[JointCode, list[str]]]:
    """Return the joint codes to store: those the adapter holds, cut to its modules, and plain factors by dtype."""
    held: dict[int, tuple[JointCode, dict[str, str]]] = {}
    plain: dict[torch.dtype, dict[str, tuple[Tensor, Tensor, float]]] = {}
    for key, d in adapter.deltas.items():
        inner = d.inner if isinstance(d, NeedsBase) else d
        if isinstance(inner, Coded):
            held.setdefault(id(inner.code), (inner.code, {}))[1][key] = inner.name
        elif (isinstance(d, LowRank) and isinstance(d.a, Tensor) and isinstance(d.b, Tensor) and d.core is None
              and d.a.dim() == 2 and d.a.dtype == d.b.dtype and NAMES[d.a.dtype] in PLAIN and math.isfinite(d.scale)):
            plain.setdefault(d.a.dtype, {})[key] = (d.b, d.a, d.scale)
    out: list[tuple[JointCode, list[str]]] = []
    for factors in plain.values():
        names = _ordered(adapter, factors)
        for part in (names[i : i + MAX_MODULES] for i in range(0, len(names), MAX_MODULES)):
            out.append((Directions.encode({k: factors[k] for k in part}), part))
    for code, keys in held.values():
        names = _ordered(adapter, keys)
        out.append((code.select([keys[k] for k in names]), names))
    return out


def _ordered(adapter: Adapter, names: Iterable[str]) -> list[str]:
    """Return `names` in the order in which their templates expand."""
    return unpack_names([t for t, _ in _templates({k: adapter.deltas[k].shape for k in names})])


def _templates(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, list[int]]]:
    """Return (template, shape) pairs, modules of one shape together."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        by_shape.setdefault(shape, []).append(name)
    return [(t, list(shape)) for shape, names in by_shape.items() for t in pack_names(names)]


def _code(i: int, code: JointCode, names: Sequence[str], adapter: Adapter, tensors: dict[str, Tensor]
          ) -> dict[str, Any]:
    for stream, t in code.streams.items():
        tensors[f"{stream}.{i}"] = t
    entry: dict[str, Any] = {"codec": code.id, "modules": _templates({k: adapter.deltas[k].shape for k in names})}
    return entry | ({"config": dict(code.config)} if code.config else {})


def _alike(deltas: Mapping[str, Delta]) -> list[dict[str, tuple[Any, list[Tensor], list[float]]]]:
    """Return deltas grouped by form: name -> (form, tensors, scales), where forms and tensor shapes are equal."""
    groups: dict[str, dict[str, tuple[Any, list[Tensor], list[float]]]] = {}
    for key, d in deltas.items():
        held: list[Tensor] = []
        scales: list[float] = []
        form = describe(d, held, scales)
        mark = json.dumps([form, list(d.shape), [[NAMES[t.dtype], list(t.shape)] for t in held]])
        groups.setdefault(mark, {})[key] = (form | {"shape": list(d.shape)}, held, scales)
    return list(groups.values())


def describe(d: Delta, held: list[Tensor], scales: list[float]) -> dict[str, Any]:
    """Return the form of a delta: its kind and structure, tensors as numbers into `held`, scales into `scales`."""
    kind = type(d).__name__.lower()
    if kind not in FACTORS and kind not in PARTS and kind != "coded":
        raise UnsupportedError(f"{d!r} has no form in the container")
    form: dict[str, Any] = {"kind": kind}
    if kind == "needsbase":
        form |= {"name": d.kind, "config": dict(d.config),  # type: ignore[union-attr]
                 "tensors": {k: _hold(t, held) for k, t in d.tensors.items()}}  # type: ignore[union-attr]
    if hasattr(d, "scale"):
        if not math.isfinite(d.scale):
            raise UnsupportedError(f"{d!r} has no finite scale")
        form["scale"] = len(scales)
        scales.append(float(d.scale))
    if kind == "spectral":
        form["transform"] = d.transform  # type: ignore[union-attr]
    for name in FACTORS.get(kind, ()):
        value = getattr(d, name)
        if name == "indices":
            value = shorter(value, math.prod(d.shape), math.prod(d.shape[1:]))
        if isinstance(value, Tensor):
            form[name] = _hold(value, held)
        elif isinstance(value, Encoded):
            form[name] = {"codec": value.codec, "config": dict(value.config), "shape": list(value.shape),
                          "dtype": NAMES[value.dtype], "streams": {k: _hold(t, held) for k, t in value.streams.items()}}
    for name in PARTS.get(kind, ()):
        part = getattr(d, name)
        if isinstance(part, tuple):
            form[name] = [describe(p, held, scales) | {"shape": list(p.shape)} for p in part]
        elif part is not None:
            form[name] = describe(part, held, scales) | {"shape": list(part.shape)}
    return form


def _hold(t: Tensor, held: list[Tensor]) -> int:
    held.append(t)
    return len(held) - 1


def _group(i: int, members: Mapping[str, tuple[Any, list[Tensor], list[float]]], tensors: dict[str, Tensor]
           ) -> dict[str, Any]:
    templates = pack_names(list(members))
    names = unpack_names(templates)
    form, held, scales = members[names[0]]
    for j in range(len(held)):
        tensors[f"g{i}.{j}"] = torch.stack([members[n][1][j] for n in names])
    columns: list[Any] = []
    for j in range(len(scales)):
        values = [members[n][2][j] for n in names]
        columns.append(values[0] if len(set(values)) == 1 else values)
    return {"modules": templates, "form": form, "scales": columns}


def _carried(adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Any]:
    numbers = itertools.count()

    def put(t: Tensor) -> str:
        name = f"carried.{next(numbers)}"
        tensors[name] = t
        return name

    replaced: dict[str, Any] = {}
    for key, value in adapter.replaced.items():
        if isinstance(value, Rows):
            replaced[key] = {"rows": list(value.indices), "values": put(value.values)}
        else:
            replaced[key] = put(value)
    return {"replaced": replaced, "extra": {key: put(t) for key, t in adapter.extra.items()}}


def _origin(adapter: Adapter) -> Tensor:
    """Return what the original dialect said, verbatim: deflated JSON as bytes. Identity fields are left out."""
    said = {f.name: getattr(adapter.origin, f.name) for f in fields(Origin)}
    said = {k: v for k, v in said.items() if k not in ("base_model", "container", "fingerprint") and v}
    text = json.dumps(said, separators=(",", ":"), default=list).encode()
    return torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)

