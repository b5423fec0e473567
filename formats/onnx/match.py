"""Which nodes of an ONNX graph run the modules that an adapter changes, and how that is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptc.base import Base
from adaptc.errors import FormatError, NeedsError
from adaptc.formats.onnx.linear import FLOAT, Linear, linear_nodes
from adaptc.formats.onnx.model import Array, Model
from adaptc.formats.onnx.names import FUSED, canonical, distance

_NO_MATCH = "pass --weights with the folder of the base's safetensors, to find modules by their values"


@dataclass(frozen=True, eq=False)
class Site:
    """The node or nodes that run one adapted module. `rows`: its outputs among those of a fused node, None for all."""

    key: str  # base parameter, "...q_proj.weight"
    linears: tuple[Linear, ...]
    how: str
    rows: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """The module's path, as the adapter calls it."""
        return self.key.removesuffix(".weight")

    @property
    def genai(self) -> bool:
        """Whether the graph is one of ORT GenAI's builder, which has its own names of adapter inputs."""
        return self.how.startswith("ORT GenAI") or any("ORT GenAI name" in x.names.values() for x in self.linears)


def match(model: Model, shapes: Mapping[str, tuple[int, ...]], weights: Base | None = None) -> dict[str, Site]:
    """Return the site of every parameter in `shapes` (name -> (out, in)).

    In turn: names of nodes and initializers, fused projections, and the values of `weights`. Raises NeedsError naming
    the first parameter without a node, FormatError for shapes of another base or a name that fits several modules.
    """
    sites = match_some(model, shapes, weights)
    _check_all(model, shapes, sites, linear_nodes(model), weights is not None)
    return {key: sites[key] for key in shapes}


def match_some(model: Model, shapes: Mapping[str, tuple[int, ...]], weights: Base | None = None) -> dict[str, Site]:
    """Return the site of every parameter in `shapes` that a linear node runs; the rest is left out."""
    linears = linear_nodes(model)
    sites: dict[str, Site] = {}
    missing: list[str] = []
    for key in shapes:
        site = _by_name(key, linears) or _fused(key, linears, shapes)
        if site is None:
            missing.append(key)
        else:
            sites[key] = site
    if missing and weights is not None:
        sites |= _by_value(model, missing, shapes, linears, weights)
    for key, site in sites.items():
        _check_shape(site, shapes[key])
    return sites


def _by_name(key: str, linears: Sequence[Linear]) -> Site | None:
    module = key.removesuffix(".weight")
    best: int | None = None
    hits: dict[str, list[tuple[Linear, str]]] = {}
    for linear in linears:
        for path, how in linear.names.items():
            apart = distance(path, module)
            if apart is None or (best is not None and apart > best):
                continue
            if best is None or apart < best:
                best, hits = apart, {}
            hits.setdefault(canonical(path), []).append((linear, how))
    if len(hits) > 1:
        a, b = sorted(hits)[:2]
        raise FormatError(f"{key}: both {a} and {b} of the model could be meant")
    for found in hits.values():
        unique = tuple({id(x): x for x, _ in found}.values())
        return Site(key, unique, found[0][1])
    return None


def _fused(key: str, linears: Sequence[Linear], shapes: Mapping[str, tuple[int, ...]]) -> Site | None:
    """Return the rows of a fused projection, its parts' sizes told by the adapter: q, then k and v of equal size."""
    head, _, leaf = key.removesuffix(".weight").rpartition(".")
    for fused, parts in FUSED.items():
        if leaf not in parts:
            continue
        whole = _by_name(f"{head}.{fused}.weight", linears)
        if whole is None:
            continue
        total = whole.linears[0].shape[0]
        sizes = _part_sizes({p: shapes[k][0] for p in parts if (k := f"{head}.{p}.weight") in shapes}, parts, total)
        start = sum(sizes[: parts.index(leaf)])
        return Site(key, whole.linears, f"fused {fused}, {whole.how}", (start, start + sizes[parts.index(leaf)]))
    return None


def _part_sizes(known: Mapping[str, int], parts: tuple[str, ...], total: int) -> list[int]:
    if len(parts) == 2:
        return [total // 2, total - total // 2]
    other = known.get("k_proj", known.get("v_proj"))
    q = known.get("q_proj", total - 2 * (other or 0))
    kv = other if other is not None else (total - q) // 2
    if q + 2 * kv != total or min(q, kv) <= 0:
        sizes = ", ".join(f"{k} {n}" for k, n in known.items())
        raise FormatError(f"{sizes} do not make up a fused product of {total}")
    return [q, kv, kv]


def _by_value(model: Model, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], linears: Sequence[Linear],
              weights: Base) -> dict[str, Site]:
    """Return sites whose initializer holds exactly the values of the parameter, plain or transposed."""
    hashes: dict[str, tuple[str, str]] = {}
    out: dict[str, Site] = {}
    for key in keys:
        w = weights.weight(key, shapes[key])
        if w.dim() != 2:
            continue
        hits: list[tuple[Linear, str]] = []
        for linear in linears:
            if not linear.direct or linear.shape != tuple(w.shape):
                continue
            if linear.weight not in hashes:
                array = model.values(linear.weight)
                hashes[linear.weight] = (digest(array), str(array.dtype))
            found, dtype = hashes[linear.weight]
            if found == digest(as_dtype(w if linear.turned else w.T, dtype)):
                hits.append((linear, "transposed " if not linear.turned else ""))
        if len({x.weight for x, _ in hits}) == 1:
            out[key] = Site(key, tuple(x for x, _ in hits), f"{hits[0][1]}weight values")
        elif hits:
            raise FormatError(f"{key}: nodes {hits[0][0].label} and {hits[1][0].label} hold the same values")
    return out


def digest(array: Array) -> str:
    """Return SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def as_dtype(w: Tensor, dtype: str) -> Array:
    """Return a weight as the array an exporter would store in `dtype`."""
    wide: Array = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32).contiguous().numpy()
    return wide.astype(dtype) if dtype != "bfloat16" else _bfloat16(w)


def _bfloat16(w: Tensor) -> Array:
    found: Array = w.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return found


def _check_all(model: Model, shapes: Mapping[str, tuple[int, ...]], sites: Mapping[str, Site],
               linears: Sequence[Linear], by_value: bool) -> None:
    missing = [k for k in shapes if k not in sites]
    if not missing:
        return
    first = missing[0]
    more = f", nor have {len(missing) - 1} others of {len(shapes)}" if len(missing) > 1 else ""
    user = next((n for n in model.graph.node if n.op_type != "Constant" and any(
        distance(i.removesuffix(".weight"), first.removesuffix(".weight")) is not None
        for i in n.input if i in model.initializers)), None)
    if user is not None:
        raise NeedsError(f"{first} is used by node {user.name or user.op_type} ({user.op_type}), which is no linear "
                         "layer and takes no slot", hint="--merge disk changes its weight")
    free = [x for x in linears if all(x not in s.linears for s in sites.values())]
    node = free[0].label if free else model.graph.node[0].name or model.graph.node[0].op_type
    hint = "is this the base the adapter was made for?" if by_value else _NO_MATCH
    what = "name or values" if by_value else "name"
    raise NeedsError(f"{first}: no linear node of {model.path.name} has its {what}{more}; "
                     f"the first node without a module is {node}", hint=hint)


def _check_shape(site: Site, shape: tuple[int, ...]) -> None:
    linear = site.linears[0]
    have = linear.shape if site.rows is None else (site.rows[1] - site.rows[0], linear.shape[1])
    if tuple(shape) != have:
        raise FormatError(f"{site.key}: adapter is for shape {tuple(shape)}, node {linear.label} has {have}",
                          hint="the model is not the base the adapter was made for")


def float_weight(model: Model, linear: Linear) -> Array:
    """Return the node's weight (out, in). Raises NeedsError for one stored in codes."""
    if not linear.direct:
        raise NeedsError(f"node {linear.label} holds its weight in codes, which nothing can be folded into",
                         hint="--slots runs the adapter beside it; or pass a float base")
    w = model.values(linear.weight)
    w = w.astype(np.float32) if linear.dtype != FLOAT and w.dtype != np.float64 else w
    return w if linear.turned else w.T
