"""Cutting an adapter to a size: the most important directions of its joint codes, without decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from adaptc.adapter import Adapter
from adaptc.coded import Coded, JointCode
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import UsageError


def cut(adapter: Adapter, nbytes: int, size_of: Callable[[Adapter], int]) -> Adapter:
    """Return `adapter` with the largest prefixes of its codes for which size_of(adapter) <= nbytes.

    Several codes are cut in proportion to their size. Raises UsageError where there is nothing to cut, or where what
    is no payload (header, carried tensors) is already larger.
    """
    codes = {id(d.code): d.code for d in map(_inner, adapter.deltas.values()) if isinstance(d, Coded)}
    if not any(s.numel() for c in codes.values() for s in c.streams.values()):
        raise UsageError("the adapter holds no payload that can be cut", hint="adaptc convert --to adaptc makes one")
    stored = {i: sum(s.numel() for s in c.streams.values()) for i, c in codes.items()}
    room = sum(stored.values()) + nbytes - size_of(adapter)
    while True:
        if room < 0:
            least = size_of(_with(adapter, {i: c.prefix(0) for i, c in codes.items()}))
            raise UsageError(f"prefix of {nbytes} bytes is below the smallest possible file, {least} bytes",
                             hint="headers and carried tensors (heads, norms) count")
        shares = {i: c.prefix(room * stored[i] // sum(stored.values())) for i, c in codes.items()}
        made = _with(adapter, shares)
        over = size_of(made) - nbytes
        if over <= 0:
            return made
        room -= over


def _inner(delta: object) -> object:
    return delta.inner if isinstance(delta, NeedsBase) else delta


def _with(adapter: Adapter, codes: dict[int, JointCode]) -> Adapter:
    """Return the adapter with other codes in place; modules of one code share its replacement."""
    by_old = {k: codes[id(d.code)] for k, d in ((k, _inner(d)) for k, d in adapter.deltas.items())
              if isinstance(d, Coded)}
    deltas: dict[str, Delta] = {}
    for key, delta in adapter.deltas.items():
        inner = _inner(delta)
        if isinstance(inner, Coded):
            fresh = Coded(by_old[key], inner.name, inner.shape)
            deltas[key] = replace(delta, inner=fresh) if isinstance(delta, NeedsBase) else fresh
        else:
            deltas[key] = delta
    return adapter.with_deltas(deltas)
