"""Hadamard matrices of orders that are no powers of two: Paley's two constructions over the field of q elements.

Field elements are the numbers 0 .. q - 1, digits to base p being coefficients (lowest first) modulo the monic
irreducible polynomial of degree k whose lower coefficients, read as such a number, are smallest. That fixes the matrix,
so its order names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

# Above this order the matrix is not formed: products go through a Fourier transform over the field's additive group.
DENSE = 512


@dataclass(frozen=True, slots=True)
class Paley:
    """A Hadamard matrix H of entries +-1, H H^T = order * I, from the quadratic character chi of GF(q).

    Kind 1, q = 3 mod 4, order q + 1: [[1, 1^T], [-1, Q + I]] with Q[i, j] = chi(i - j).
    Kind 2, q = 1 mod 4, order 2 (q + 1): S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], S = [[0, 1^T], [1, Q]].
    """

    kind: Literal[1, 2]
    q: int

    @property
    def order(self) -> int:
        """Rows of the matrix."""
        return self.q + 1 if self.kind == 1 else 2 * (self.q + 1)

    def matrix(self) -> Tensor:
        """Return H (order, order), float64; shared, not to be written to."""
        return _matrix(self.kind, self.q)

    def times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Return H x (or H^T x) for x (rows, order, columns), in its dtype."""
        if self.order <= DENSE:
            h = self.matrix().to(x)
            out: Tensor = (h.mT if transposed else h) @ x
            return out
        if self.kind == 2:  # H is symmetric
            pair = x.reshape(x.shape[0], self.q + 1, 2, x.shape[2])
            plus, minus = pair[:, :, 0] + pair[:, :, 1], pair[:, :, 0] - pair[:, :, 1]
            return torch.stack([self._bordered(plus) + minus, self._bordered(minus) - plus], 2).flatten(1, 2)
        head, tail = x[:, :1], x[:, 1:]
        total = tail.sum(1, keepdim=True)
        turned = _circulate(tail, self.q, transposed) + tail
        return torch.cat([head - total, turned + head] if transposed else [head + total, turned - head], 1)

    def _bordered(self, x: Tensor) -> Tensor:
        """Return S x for S = [[0, 1^T], [1, Q]]."""
        head, tail = x[:, :1], x[:, 1:]
        return torch.cat([tail.sum(1, keepdim=True), _circulate(tail, self.q, False) + head], 1)


def paley(order: int) -> Paley | None:
    """Return Paley's matrix of this order, of the first kind where both exist, None where there is none."""
    if order >= 4 and order % 4 == 0:
        if _prime_power(order - 1) is not None:
            return Paley(1, order - 1)
        if order % 8 == 4 and _prime_power(order // 2 - 1) is not None:
            return Paley(2, order // 2 - 1)
    return None


@cache
def character(q: int) -> Tensor:
    """Return chi (q,) int8: 0 at 0, 1 at nonzero squares of GF(q), -1 elsewhere; q an odd prime power."""
    field = _prime_power(q)
    if field is None or q % 2 == 0:
        raise ValueError(f"{q} is no odd prime power")
    p, k = field
    chi = torch.full((q,), -1, dtype=torch.int8)
    if k == 1:
        chi[[i * i % p for i in range(p)]] = 1
    else:
        modulus = _irreducible(p, k)
        chi[[_square(i, p, k, modulus) for i in range(q)]] = 1
    chi[0] = 0
    return chi


@cache
def _matrix(kind: int, q: int) -> Tensor:
    chi, (p, k) = character(q), _prime_power(q) or (q, 1)
    digits = [torch.arange(q) // p**d % p for d in range(k)]
    apart = sum((row[:, None] - row[None, :]) % p * p**d for d, row in enumerate(digits))
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[1:, 1:] = chi[apart].double()
    s[0, 1:], s[1:, 0] = 1, -1 if kind == 1 else 1
    eye = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        return s + eye
    plus, minus = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(s, plus.double()) + torch.kron(eye, minus.double())


def _circulate(x: Tensor, q: int, transposed: bool) -> Tensor:
    """Return Q x (or Q^T x) for x (rows, q, columns): a circular convolution over the k digits, by FFT."""
    p, k = _prime_power(q) or (q, 1)
    sides, axes = (p,) * k, tuple(range(1, k + 1))
    kernel = torch.fft.fftn(character(q).to(x.real.dtype).reshape(sides)).reshape(1, *sides, 1)
    spectrum = torch.fft.fftn(x.reshape(x.shape[0], *sides, x.shape[-1]), dim=axes)
    made: Tensor = torch.fft.ifftn(spectrum * (kernel.conj() if transposed else kernel), dim=axes).real
    return made.reshape(x.shape)


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k, p prime, None for other numbers."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 else None


def _digits(number: int, p: int, count: int) -> list[int]:
    return [number // p**d % p for d in range(count)]


@cache
def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Return the lower coefficients (k,) of the first monic irreducible polynomial of degree k over GF(p)."""
    for number in range(p**k):
        lower = _digits(number, p, k)
        factors = ([*_digits(f, p, d), 1] for d in range(1, k // 2 + 1) for f in range(p**d))
        if all(any(_remainder([*lower, 1], f, p)) for f in factors):
            return tuple(lower)
    raise AssertionError("there is an irreducible polynomial of every degree")


def _remainder(poly: list[int], by: list[int], p: int) -> list[int]:
    """Return poly mod the monic polynomial `by`, coefficients lowest first."""
    rest, degree = list(poly), len(by) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for i, c in enumerate(by):
            rest[top - degree + i] = (rest[top - degree + i] - lead * c) % p
    return rest[:degree]


def _square(number: int, p: int, k: int, modulus: tuple[int, ...]) -> int:
    """Return the square of a field element, as a number."""
    x = _digits(number, p, k)
    product = [0] * (2 * k - 1)
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            product[i + j] = (product[i + j] + a * b) % p
    return sum(c * p**d for d, c in enumerate(_remainder(product, [*modulus, 1], p)))
