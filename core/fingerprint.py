"""A digest of the base weights an adapter changes, the same for every float dtype they are stored in."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.errors import FormatError

SAMPLES = 64


class Weights(Protocol):
    """Base weights by parameter name: `Base`, or a model in memory."""

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return parameter `key` in logical orientation (out, in, ...)."""


def fingerprint(base: Weights, adapter: Adapter) -> str:
    """Return 16 hex digits of SHA-256 over 64 values of every adapted parameter of the base.

    For each parameter in sorted order: its name, a zero byte, its shape as int64, and the values at the flat positions
    floor(t (n - 1) / 63), t = 0..63, of the weight in logical orientation, rounded to bfloat16. Reads only those
    pages of the base. Raises NeedsError or FormatError when the base lacks a parameter or has another shape.
    """
    return fingerprint_of({k: samples(base.weight(k, d.shape)) for k, d in adapter.deltas.items()})


def samples(w: Tensor) -> bytes:
    """Return what a fingerprint reads of one weight: its shape and 64 of its values."""
    at = [t * (w.numel() - 1) // (SAMPLES - 1) for t in range(SAMPLES)]
    index = torch.unravel_index(torch.tensor(at), w.shape)
    return struct.pack(f"<{w.dim()}q", *w.shape) + w[index].to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def fingerprint_of(sampled: Mapping[str, bytes]) -> str:
    """Return the fingerprint of weights by parameter name that `samples` has read."""
    digest = hashlib.sha256()
    for key in sorted(sampled):
        digest.update(key.encode() + b"\0" + sampled[key])
    return digest.hexdigest()[:16]


def stamped(adapter: Adapter, base: Base | None) -> Adapter:
    """Return `adapter` with the fingerprint of `base`, unchanged where no base is given.

    Raises FormatError if the adapter already carries the fingerprint of other weights.
    """
    if base is None:
        return adapter
    found, stored = fingerprint(base, adapter), adapter.origin.fingerprint
    if stored not in (None, found):
        raise FormatError(f"base weights have fingerprint {found}, the adapter was made for {stored}")
    return replace(adapter, origin=replace(adapter.origin, fingerprint=found))
