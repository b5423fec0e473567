"""Row: what happened to one module, measured; and the totals over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt

from adaptc.coded import Coded
from adaptc.delta import Delta, LowRank, NeedsBase, kind
from adaptc.errors import FormatError
from adaptc.measure import norm2, relative_error


@dataclass(frozen=True, slots=True)
class Row:
    """One module in a report: rank and bytes before and after, measured relative error, ||dW||^2 before."""

    key: str
    kind: str
    rank_before: int | None
    rank_after: int | None
    nbytes_before: int
    nbytes_after: int
    error: float
    energy: float
    note: str = ""


def total_error(rows: Sequence[Row]) -> float:
    """Return sqrt(sum (error^2 * energy) / sum energy), 0 for no energy."""
    energy = fsum(r.energy for r in rows)
    lost = fsum(r.error**2 * r.energy for r in rows if r.energy)
    return sqrt(lost / energy) if energy else 0.0


def rank_of(delta: Delta) -> int | None:
    """Return the stored rank of a delta, looking inside base-dependent ones; None where there is no rank."""
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    return inner.rank if isinstance(inner, (LowRank, Coded)) else None


def energy_of(delta: Delta) -> float:
    """Return ||dW||^2. Raises FormatError when it is not finite, because no error could be measured against it."""
    energy = norm2(delta)
    if not isfinite(energy):
        raise FormatError("values are not finite")
    return energy


def untouched(key: str, delta: Delta, why: str) -> Row:
    """Return the row of a delta that was left alone, and why. Raises FormatError for values that are not finite."""
    return Row(key, kind(delta), rank_of(delta), rank_of(delta), delta.nbytes, delta.nbytes, 0.0, energy_of(delta),
               f"left alone: {why}")


def compare(key: str, before: Delta, after: Delta | None) -> Row:
    """Return the row that compares a delta with what became of it (None: removed), error measured from factors."""
    energy = energy_of(before)
    if after is None:
        return Row(key, kind(before), rank_of(before), 0, before.nbytes, 0, 1.0 if energy else 0.0, energy, "removed")
    return Row(key, kind(before), rank_of(before), rank_of(after), before.nbytes, after.nbytes,
               relative_error(before, after), energy)
