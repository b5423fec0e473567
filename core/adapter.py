"""Adapter: every delta, every carried tensor, where they came from and what was done to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adaptc.delta import Delta, NeedsBase
from adaptc.factor import decoded


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Replacement of some rows of a parameter: parameter[indices] = values. indices: (k,); values: (k, dim)."""

    indices: tuple[int, ...]
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Stored bytes of the values."""
        return self.values.nbytes


Replacement: TypeAlias = Tensor | Rows


@dataclass(frozen=True, slots=True)
class Step:
    """One pass that was applied: its spec, the version that ran it, bytes before and after, total relative error."""

    spec: str
    version: str
    nbytes_before: int
    nbytes_after: int
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter came from and what its dialect said, verbatim.

    `names` maps a parameter name to the module stem the file used, where it cannot be rebuilt from the parameter name
    (kohya's flattened names, prefixes of training wrappers). `layout` marks parameters whose module is no plain
    linear or convolution: "embedding", "experts". `notes` are facts found while reading, shown by `inspect`.
    `container` is the id of the format that wraps the dialect, "" where there is none; `fingerprint` a digest of
    the base weights the adapter was made for (adaptc.fingerprint), where one was taken.
    """

    dialect: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    container: str = ""
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An immutable adapter.

    `deltas`: base *parameter* name ("....q_proj.weight") -> Delta, ordered. `replaced`: parameter name -> tensor (or
    rows) that takes the parameter's place: heads, norms, biases, token rows; carried, never compressed unless asked.
    `extra`: file key -> tensor that changes no weight (sampler state, placeholders), carried verbatim.
    """

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, Replacement]
    origin: Origin
    history: tuple[Step, ...] = ()
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("deltas", "replaced", "extra"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def nbytes(self) -> int:
        """Stored bytes of deltas and carried tensors, without any file header."""
        parts = (*self.deltas.values(), *self.replaced.values(), *self.extra.values())
        return sum(p.nbytes for p in parts)

    def with_deltas(self, deltas: Mapping[str, Delta], *steps: Step) -> Adapter:
        """Return the adapter with other deltas and `steps` appended to its history."""
        return replace(self, deltas=deltas, history=(*self.history, *steps))

    def map(self, fn: Callable[[str, Delta], Delta]) -> Adapter:
        """Return the adapter with fn(key, delta) in place of every delta."""
        return replace(self, deltas={k: fn(k, d) for k, d in self.deltas.items()})

    def __repr__(self) -> str:
        return (f"Adapter({self.origin.dialect}, {len(self.deltas)} deltas, {len(self.replaced)} replaced, "
                f"{self.nbytes} B)")


def tensors(delta: Delta) -> dict[str, Tensor]:
    """Return the plain tensors a delta stores, by field name; codes as `field.stream`, those of indices decoded."""
    out: dict[str, Tensor] = {}
    fields = dict(delta.tensors) if isinstance(delta, NeedsBase) else {}
    fields |= {n: getattr(delta, n) for n in ("a", "b", "core", "weight", "indices", "values") if hasattr(delta, n)}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            out[name] = value
        elif name == "indices":
            out[name] = decoded(value)
        elif value is not None:
            out |= {f"{name}.{stream}": t for stream, t in value.streams.items()}
    inner = [(n, getattr(delta, n, None)) for n in ("left", "right", "inner")]
    inner += [(str(i), t) for i, t in enumerate(getattr(delta, "terms", ()))]
    for name, part in inner:
        if part is not None:
            out |= {f"{name}.{k}": t for k, t in tensors(part).items()}
    return out


def same(x: Adapter, y: Adapter) -> bool:
    """Return whether two adapters hold the same values bit for bit (scales, shapes, dtypes, tensors, carried parts)."""
    if list(x.deltas) != list(y.deltas) or set(x.replaced) != set(y.replaced):
        return False
    for key, dx in x.deltas.items():
        dy = y.deltas[key]
        tx, ty = tensors(dx), tensors(dy)
        if type(dx) is not type(dy) or dx.shape != dy.shape or set(tx) != set(ty):
            return False
        if any(getattr(dx, name, None) != getattr(dy, name, None) for name in ("scale", "transform")):
            return False
        if not all(tx[k].dtype == ty[k].dtype and torch.equal(tx[k], ty[k]) for k in tx):
            return False
    for key, rx in x.replaced.items():
        ry = y.replaced[key]
        vx, vy = (r.values if isinstance(r, Rows) else r for r in (rx, ry))
        if type(rx) is not type(ry) or vx.dtype != vy.dtype or not torch.equal(vx, vy):
            return False
    return True
