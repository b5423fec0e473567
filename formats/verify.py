"""Checks of a container beyond those that opening it makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptc.adapter import Adapter, tensors
from adaptc.base import Base
from adaptc.coded import Coded
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.fingerprint import fingerprint
from adaptc.formats.portable_read import check_sums, manifest_of
from adaptc.formats.source import Source
from adaptc.lowrank import plain
from adaptc.tensorfile import TensorFile


@dataclass(frozen=True)
class Verified:
    """What was checked: tensors in the file, checksums compared, and what can be said of the base."""

    tensors: int
    checked: int
    base: str


def verify(source: Source, adapter: Adapter, base: Base | None) -> Verified:
    """Check every checksum, every decoded value, and the base fingerprint where one is stored.

    Raises FormatError for damage or for a base with other weights, UnsupportedError for a file that is no container.
    """
    if adapter.origin.container != "adaptc" or not isinstance(source.payload, TensorFile):
        raise UnsupportedError(f"{source.file.name} is no adaptc container", hint="adaptc inspect checks any adapter")
    manifest = manifest_of(source.payload)
    checked = check_sums(source.payload, manifest, None)
    for key, delta in adapter.deltas.items():
        for name, t in tensors(_decoded(delta)).items():
            if t.dtype.is_floating_point and not bool(torch.isfinite(t).all()):
                raise FormatError(f"{key}: {name} holds values that are not finite")
    return Verified(len(source.payload), checked, _base(adapter.origin.fingerprint, adapter, base))


def _decoded(delta: Delta) -> Delta:
    return plain(delta) if isinstance(delta, (Coded, NeedsBase)) or delta.nbytes else delta


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
