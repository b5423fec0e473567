"""Checks of a container beyond those that opening it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.base import Base
from adaptc.coded import Coded
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.factor import decoded
from adaptc.fingerprint import fingerprint
from adaptc.formats.portable_manifest import check_sums, manifest_of
from adaptc.formats.source import Source
from adaptc.tensorfile import TensorFile


@dataclass(frozen=True)
class Verified:
    """What was checked: tensors in the file, checksums compared, and what can be said of the base."""

    tensors: int
    checked: int
    base: str


def verify(source: Source, adapter: Adapter, base: Base | None) -> Verified:
    """Check every checksum, every decoded value, and the base fingerprint where one is stored.

    Raises FormatError for damage, for a file that ends early (which reads as a smaller adapter), or for a base with
    other weights, UnsupportedError for a file that is no container.
    """
    if adapter.origin.container != "adaptc" or not isinstance(source.payload, TensorFile):
        raise UnsupportedError(f"{source.file.name} is no adaptc container", hint="adaptc inspect checks any adapter")
    manifest = manifest_of(source.payload)
    checked = check_sums(source.payload, manifest, None)
    if checked < len(source.payload):
        raise FormatError(f"{source.file.name} ends early, {checked} of {len(source.payload)} tensors are whole",
                          hint="adaptc convert --to adaptc makes a whole file of the smaller adapter that is there")
    for key, delta in adapter.deltas.items():
        for name, t in _values(delta):
            _finite(key, name, t)
    for key, held in adapter.replaced.items():
        _finite(key, "carried tensor", held.values if isinstance(held, Rows) else held)
    return Verified(len(source.payload), checked, _base(adapter.origin.fingerprint, adapter, base))


def _finite(key: str, name: str, t: Tensor) -> None:
    wide = t.float() if t.dtype.is_floating_point and t.dtype.itemsize == 1 else t
    if wide.dtype.is_floating_point and not bool(torch.isfinite(wide).all()):
        raise FormatError(f"{key}: {name} holds values that are not finite")


def _values(delta: Delta) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a delta by field name, codes decoded, one at a time."""
    if isinstance(delta, Coded):
        b, a, _ = delta.factors()
        yield from (("b", b), ("a", a))
        return
    if isinstance(delta, NeedsBase):
        yield from delta.tensors.items()
    for name in ("a", "b", "core", "weight", "indices", "values"):
        if getattr(delta, name, None) is not None:
            yield name, decoded(getattr(delta, name))
    parts = [getattr(delta, name, None) for name in ("left", "right", "inner")]
    for part in (*parts, *getattr(delta, "terms", ())):
        if part is not None:
            yield from _values(part)


def _base(stored: str | None, adapter: Adapter, base: Base | None) -> str:
    if stored is None:
        if base is not None:
            raise NeedsError("no fingerprint of base weights is stored, the base cannot be checked",
                             hint="write the container with --base to store one")
        return "no fingerprint stored"
    if base is None:
        return f"fingerprint {stored}, not compared (give --base)"
    found = fingerprint(base, adapter)
    if found != stored:
        raise FormatError(f"base weights have fingerprint {found}, the adapter was made for {stored}")
    return f"fingerprint {stored} matches"
