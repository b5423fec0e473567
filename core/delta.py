"""Deltas: what an adapter adds to one base parameter, in the shape it was trained in.

Every delta is immutable and knows its logical `shape` (out, in, ...). All arithmetic here is float64; `dense` is for
tests, small layers and row blocks, never for a pass over a whole adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adaptc.coded import Coded
from adaptc.errors import NeedsError
from adaptc.factor import Factor, decoded, describe
from adaptc.spectral import Spectral


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """dW = scale * b @ core @ a on the (out, prod(rest)) view of `shape`.

    a: (r_a, in) or (experts, r_a, in); b: (out, r_b) or (experts, out, r_b); core: (r_b, r_a) or None for identity.
    `scale` is the multiplier itself; alpha never appears here. With experts, `shape` is (experts, out, in).
    """

    a: Factor
    b: Factor
    core: Factor | None
    scale: float
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Inner dimension of the stored factors (an upper bound of the matrix rank)."""
        return int(min(self.a.shape[-2], self.b.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Stored bytes of the factors."""
        return self.a.nbytes + self.b.nbytes + (self.core.nbytes if self.core is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored factors (of `b`)."""
        return self.b.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return float64 (b', a) with dW = b' @ a: core and scale folded into b."""
        a, b = decoded(self.a).double(), decoded(self.b).double()
        if self.core is not None:
            b = b @ decoded(self.core).double()
        return b * self.scale, a

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        b, a = self.factors()
        return (b @ a).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in), in the dtype of x, through the rank: (x a^T) core^T b^T."""
        h = x @ decoded(self.a).to(x.dtype).mT
        if self.core is not None:
            h = h @ decoded(self.core).to(x.dtype).mT
        return h @ decoded(self.b).to(x.dtype).mT * self.scale

    def __repr__(self) -> str:
        core = f", core={describe(self.core)}" if self.core is not None else ""
        return f"LowRank({self.shape}, a={describe(self.a)}, b={describe(self.b)}{core}, scale={self.scale:g})"


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """dW = scale * weight, reshaped to `shape`. The weight may be codes (Fourier, block-circulant, ...)."""

    weight: Factor
    scale: float
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.weight.nbytes

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        return (decoded(self.weight).double() * self.scale).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in), in the dtype of x."""
        return x @ decoded(self.weight).reshape(self.shape[0], -1).to(x.dtype).mT * self.scale

    def __repr__(self) -> str:
        return f"Dense({self.shape}, {describe(self.weight)}, scale={self.scale:g})"


@dataclass(frozen=True, slots=True, eq=False)
class Kron:
    """dW = scale * kron(left, right) on the (out, prod(rest)) view: left (f, g), right (out/f, in/g)."""

    left: LowRank | Dense
    right: LowRank | Dense
    scale: float
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of both sides."""
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        return (torch.kron(self.left.dense(), self.right.dense().flatten(1)) * self.scale).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in): kron(L, R) x is R X L^T on the (g, in/g) view of x."""
        left, right = self.left.dense().to(x.dtype), self.right.dense().flatten(1).to(x.dtype)
        y: Tensor = left @ x.reshape(*x.shape[:-1], left.shape[1], right.shape[1]) @ right.mT
        return y.flatten(-2) * self.scale

    def __repr__(self) -> str:
        return f"Kron({self.shape}, {self.left!r} x {self.right!r}, scale={self.scale:g})"


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """dW = scale * left o right, element by element (LoHa); both are low-rank with the same `shape`."""

    left: LowRank
    right: LowRank
    scale: float
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of both sides."""
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        return self.left.dense() * self.right.dense() * self.scale

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in); forms dW, there is no cheaper exact way below rank r1*r2."""
        return x @ self.dense().reshape(self.shape[0], -1).to(x.dtype).mT

    def __repr__(self) -> str:
        return f"Hadamard({self.shape}, ranks {self.left.rank} and {self.right.rank}, scale={self.scale:g})"


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """dW.flatten()[indices] = scale * values, zero elsewhere. indices: (k,) int64, sorted, unique; values: (k,).

    The indices may be codes of rising positions (adaptc.quant.golomb); `places` decodes them.
    """

    indices: Factor
    values: Tensor
    scale: float
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of indices and values."""
        return self.indices.nbytes + self.values.nbytes

    def places(self) -> Tensor:
        """Return the flat indices (k,) int64. Raises FormatError for codes that make no rising positions."""
        return decoded(self.indices)

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        out = torch.zeros(math.prod(self.shape), dtype=torch.float64)
        out[self.places()] = self.values.double() * self.scale
        return out.reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in): gather inputs, multiply, scatter-add to outputs."""
        n, places = math.prod(self.shape[1:]), self.places()
        rows, cols = places // n, places % n
        y = x.new_zeros(*x.shape[:-1], self.shape[0])
        return y.index_add_(-1, rows, x[..., cols] * self.values.to(x.dtype)) * self.scale

    def __repr__(self) -> str:
        return f"Sparse({self.shape}, {self.values.numel()} of {math.prod(self.shape)}, scale={self.scale:g})"


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """dW = the sum of `terms`, all with the same `shape`."""

    terms: tuple[BaseFree, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all terms."""
        return sum(t.nbytes for t in self.terms)

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        out = torch.zeros(self.shape, dtype=torch.float64)
        for term in self.terms:
            out += term.dense()
        return out

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in)."""
        out = self.terms[0].apply(x)
        for term in self.terms[1:]:
            out = out + term.apply(x)
        return out

    def __repr__(self) -> str:
        return f"Sum({self.shape}, {', '.join(map(repr, self.terms))})"


@dataclass(frozen=True, slots=True, eq=False)
class NeedsBase:
    """A change that is only defined on given base weights: W' = f_kind(W0; inner, tensors, config).

    `inner` is the part that is an ordinary delta (the direction of DoRA), None where there is none. `resolve` is the
    only place that touches base weights.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    inner: BaseFree | None = field(default=None)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the tensors and of `inner`."""
        return sum(t.nbytes for t in self.tensors.values()) + (self.inner.nbytes if self.inner is not None else 0)

    def resolve(self, w0: Tensor) -> BaseFree:
        """Return the delta W' - W0 for base weight w0 in logical orientation (out, in, ...)."""
        from adaptc.resolve import RESOLVERS

        return RESOLVERS[self.kind](self, w0)

    def dense(self) -> Tensor:
        """Refuse: the change has no value without W0."""
        raise NeedsError(f"{self.kind} changes the base weight itself and has no delta without it",
                         hint="pass --base with the folder of the base model")

    def apply(self, x: Tensor) -> Tensor:
        """Refuse: the change has no value without W0."""
        raise NeedsError(f"{self.kind} cannot run as a side branch without the base weight")

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={describe(v)}" for k, v in self.tensors.items())
        return f"NeedsBase({self.kind}, {self.shape}, {parts}, inner={self.inner!r})"


BaseFree: TypeAlias = LowRank | Dense | Kron | Hadamard | Sparse | Spectral | Sum | Coded
Delta: TypeAlias = BaseFree | NeedsBase
KINDS: tuple[type, ...] = (LowRank, Dense, Kron, Hadamard, Sparse, Spectral, Sum, Coded, NeedsBase)


def kind(delta: Delta) -> str:
    """Return the name reports use for a delta: its class, or the base-dependent kind."""
    return delta.kind if isinstance(delta, NeedsBase) else type(delta).__name__.lower()
