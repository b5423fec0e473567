"""Spectral: a delta that is sparse in an orthonormal Walsh-Hadamard basis of the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptc.factor import Factor, decoded

if TYPE_CHECKING:
    from adaptc.quant.walsh import Transform


@dataclass(frozen=True, slots=True, eq=False)
class Spectral:
    """dW = scale * F U on the (out, prod(rest)) view of `shape`; F.flatten()[indices] = values, zero elsewhere.

    indices: (k,) int64, sorted, unique, or codes of them (adaptc.quant.golomb); values: (k,). `transform` names U
    (adaptc.quant.walsh), whose rows are the basis: dW x = scale * F (U x). U is orthonormal, so
    ||dW||_F = |scale| ||values||. QWHA, arXiv 2509.17428.
    """

    indices: Factor
    values: Tensor
    transform: str
    scale: float
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the (out, prod(rest)) view."""
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Stored bytes of indices and values."""
        return self.indices.nbytes + self.values.nbytes

    def places(self) -> Tensor:
        """Return the flat indices (k,) int64. Raises FormatError for codes that make no rising positions."""
        return decoded(self.indices)

    def basis(self) -> Transform:
        """Return U. Raises FormatError if there is no transform of that name at this width."""
        from adaptc.quant.walsh import transform

        return transform(self.transform, self.width)

    def coefficients(self) -> Tensor:
        """Return scale * F (out, prod(rest)) dense, float64."""
        out = torch.zeros(self.shape[0] * self.width, dtype=torch.float64)
        out[self.places()] = self.values.double() * self.scale
        return out.reshape(self.shape[0], self.width)

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        return self.basis().inverse(self.coefficients()).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in): one fast transform of x, then gather, multiply, scatter-add to outputs."""
        places = self.places()
        rows, cols = places // self.width, places % self.width
        y = x.new_zeros(*x.shape[:-1], self.shape[0])
        return y.index_add_(-1, rows, self.basis().forward(x)[..., cols] * self.values.to(x.dtype)) * self.scale

    def __repr__(self) -> str:
        of = math.prod(self.shape)
        return f"Spectral({self.shape}, {self.values.numel()} of {of} in {self.transform}, scale={self.scale:g})"
