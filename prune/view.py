"""A delta looked at in row blocks and entry by entry, so that a pass never holds it dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, Sparse, Sum
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import Encoded, decoded
from adaptc.lowrank import low_rank

BLOCK = 1 << 21  # entries of a row block
_GATHER = 1 << 16  # entries that are summed over the rank at a time


class View(Protocol):
    """dW on its (m, n) view."""

    m: int
    n: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop - 1 as float32 (rows, n)."""

    def at(self, places: Tensor) -> Tensor:
        """Return the entries at flat positions (k,), float64."""

    def energy(self) -> float:
        """Return ||dW||_F^2. Raises FormatError for values that are not finite."""


class Sliced(Protocol):
    """A weight that is made some rows at a time: what `Dense.weight` may hold besides tensors and codes."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start..stop - 1 (rows, n) in float32."""


def view(delta: BaseFree) -> View:
    """Return a view of `delta`. Raises UnsupportedError for one that is neither sparse, dense nor a product."""
    shape = delta.shape[0], math.prod(delta.shape[1:])
    if isinstance(delta, Sparse):
        return _Entries(delta, *shape)
    if isinstance(delta, Dense):
        return _Matrix(delta, *shape)
    factors = low_rank(delta)
    if factors is not None and len(factors.b.shape) == 2:
        return _Product(*factors.factors(), *shape)
    if isinstance(delta, Sum):
        return _Total([view(t) for t in delta.terms], *shape)
    raise UnsupportedError(f"{delta!r} has no rows to look at")


def blocks(seen: View) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of row blocks of about `BLOCK` entries."""
    step = max(1, BLOCK // max(seen.n, 1))
    for start in range(0, seen.m, step):
        yield start, min(start + step, seen.m)


class _Product:
    """b @ a."""

    def __init__(self, b: Tensor, a: Tensor, m: int, n: int) -> None:
        self.m, self.n, self.b, self.a = m, n, b, a
        self._b, self._a = b.float(), a.float()

    def rows(self, start: int, stop: int) -> Tensor:
        return self._b[start:stop] @ self._a

    def at(self, places: Tensor) -> Tensor:
        columns = self.a.mT.contiguous()
        parts = [(self.b[p // self.n] * columns[p % self.n]).sum(1) for p in torch.split(places, _GATHER)]
        return torch.cat(parts) if parts else self.b.new_zeros(0)

    def energy(self) -> float:
        return _finite(float(((self.b.mT @ self.b) * (self.a @ self.a.mT)).sum()))


class _Matrix:
    """scale * weight; a weight that offers its rows is never whole."""

    def __init__(self, delta: Dense, m: int, n: int) -> None:
        self.m, self.n, self.scale = m, n, delta.scale
        sliced = isinstance(delta.weight, Encoded) and hasattr(delta.weight, "rows")
        self._some: Sliced | None = delta.weight if sliced else None  # type: ignore[assignment]
        self._whole = None if sliced else decoded(delta.weight).reshape(m, n)

    def _raw(self, start: int, stop: int) -> Tensor:
        if self._some is not None:
            return self._some.rows(start, stop)
        assert self._whole is not None
        return self._whole[start:stop]

    def rows(self, start: int, stop: int) -> Tensor:
        return self._raw(start, stop).float() * self.scale

    def at(self, places: Tensor) -> Tensor:
        parts = []
        for start, stop in blocks(self):
            low, high = torch.searchsorted(places, torch.tensor([start * self.n, stop * self.n])).tolist()
            if high > low:
                parts.append(self._raw(start, stop).reshape(-1)[places[low:high] - start * self.n].double())
        return torch.cat(parts) * self.scale if parts else torch.zeros(0, dtype=torch.float64)

    def energy(self) -> float:
        squares = (self._raw(*block).double().square().sum() for block in blocks(self))
        return _finite(math.fsum(map(float, squares)) * self.scale**2)


class _Entries:
    """A delta that is sparse already."""

    def __init__(self, delta: Sparse, m: int, n: int) -> None:
        self.m, self.n, self.places = m, n, delta.places()
        self.values = delta.values.double() * delta.scale

    def rows(self, start: int, stop: int) -> Tensor:
        low, high = torch.searchsorted(self.places, torch.tensor([start * self.n, stop * self.n])).tolist()
        out = torch.zeros((stop - start) * self.n)
        out[self.places[low:high] - start * self.n] = self.values[low:high].float()
        return out.reshape(stop - start, self.n)

    def at(self, places: Tensor) -> Tensor:
        if not self.places.numel():
            return torch.zeros(len(places), dtype=torch.float64)
        where = torch.searchsorted(self.places, places).clamp(max=len(self.places) - 1)
        return torch.where(self.places[where] == places, self.values[where], 0.0)

    def energy(self) -> float:
        return _finite(float(self.values.square().sum()))


class _Total:
    """The sum of several."""

    def __init__(self, terms: list[View], m: int, n: int) -> None:
        self.m, self.n, self.terms = m, n, terms

    def rows(self, start: int, stop: int) -> Tensor:
        out = self.terms[0].rows(start, stop)
        for term in self.terms[1:]:
            out = out + term.rows(start, stop)
        return out

    def at(self, places: Tensor) -> Tensor:
        return torch.stack([t.at(places) for t in self.terms]).sum(0)

    def energy(self) -> float:
        return _finite(math.fsum(float(self.rows(*block).double().square().sum()) for block in blocks(self)))


def _finite(energy: float) -> float:
    if not math.isfinite(energy):
        raise FormatError("values are not finite")
    return max(energy, 0.0)
