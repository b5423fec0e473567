"""Weights that PEFT types store as a few coefficients: rebuilt on demand, never kept dense.

Each class is a codec (see adaptc.factor.Encoded) that only decodes: the coefficients are what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.formats.tucker import floats


class Fourier:
    """Re ifft2(S) of an (out, in) spectrum S, zero but for `values` at the flat `indices`. FourierFT, 2405.03003."""

    id: ClassVar[str] = "fourier"

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for coefficients that do not lie in this shape."""
        _check_places(self.id, streams, shape)

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        self.check(streams, shape)
        made: Tensor = torch.fft.ifft2(_scattered(streams, shape)).real
        return made.to(dtype)


class Haar:
    """Inverse two-dimensional Haar transform of S, zero but for `values` at the flat `indices`. WaveFT, 2505.12532.

    The quadrants of S are averages and details: [[cA, cH], [cV, cD]]; both sides of the shape are even.
    """

    id: ClassVar[str] = "haar"

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for coefficients that do not lie in this shape, or a shape of odd sides."""
        _check_places(self.id, streams, shape)
        if shape[0] % 2 or shape[1] % 2:
            raise FormatError(f"{self.id}: shape {tuple(shape)} has odd sides")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        self.check(streams, shape)
        out, n = shape
        q = _scattered(streams, shape).reshape(2, out // 2, 2, n // 2).permute(0, 2, 1, 3)
        (ca, ch), (cv, cd) = q[0], q[1]
        rows = [torch.stack([ca + ch + cv + cd, ca + ch - cv - cd], -1),
                torch.stack([ca - ch + cv - cd, ca - ch - cv + cd], -1)]
        return (torch.stack(rows, 1) / 2).reshape(out, n).to(dtype)


class Circulant:
    """Blocks of b x b circulants: entry (a, d) of block (p, q) is kernel[p, q, (d - a) mod b] / in. C3A, 2407.19342."""

    id: ClassVar[str] = "circulant"

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for kernels that do not make this shape."""
        (kernel,) = floats(self.id, streams, "kernel")
        k = tuple(kernel.shape)
        if len(k) != 3 or tuple(shape) != (k[0] * k[2], k[1] * k[2]):
            raise FormatError(f"{self.id}: kernel {k} makes no {tuple(shape)}")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        self.check(streams, shape)
        kernel = streams["kernel"].double()  # (out/b, in/b, b)
        b = kernel.shape[-1]
        turn = (torch.arange(b)[None, :] - torch.arange(b)[:, None]) % b
        return (kernel[..., turn].permute(0, 2, 1, 3).reshape(shape) / shape[1]).to(dtype)


class RandLora:
    """Sum of randomised bases with trained diagonals on both sides. RandLoRA, 2502.00987.

    a: (r, short), b: (long, nb, r), lambda: (r, nb), gamma: (nb, short), short = min(out, in). The left factor runs
    basis by basis, the right one rank by rank: the two orders differ, and that mixture is what was trained.
    """

    id: ClassVar[str] = "randlora"

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for bases and diagonals that do not fit each other or this shape."""
        a, b, lam, gamma = (tuple(t.shape) for t in floats(self.id, streams, "a", "b", "lambda", "gamma"))
        fits = len(a) == 2 and len(b) == 3 and sorted(shape) == [a[1], b[0]]
        if not fits or lam != (a[0], b[1]) or gamma != (b[1], a[1]) or b[2] != a[0]:
            raise FormatError(f"{self.id}: a {a}, b {b}, lambda {lam} and gamma {gamma} make no {tuple(shape)}")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        self.check(streams, shape)
        a, b, lam, gamma = (streams[k].double() for k in ("a", "b", "lambda", "gamma"))
        right = (lam[:, :, None] * a[:, None, :] * gamma[None]).flatten(0, 1)  # (r nb, short)
        left = b.flatten(1)  # (long, nb r)
        return (left @ right if shape[1] == right.shape[1] else right.mT @ left.mT).to(dtype)


def _check_places(codec: str, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
    if set(streams) != {"indices", "values"} or len(shape) != 2:
        raise FormatError(f"{codec}: streams are {', '.join(sorted(streams))[:80]} for shape {tuple(shape)}")
    floats(codec, {"values": streams["values"]}, "values")
    check_places(streams["indices"], streams["values"], shape)


def check_places(indices: Tensor, values: Tensor, shape: Sequence[int]) -> None:
    """Raise FormatError unless `indices` are int64, distinct, within `shape` as flat positions, one for each value."""
    size = math.prod(shape)
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != values.shape:
        raise FormatError(f"indices are {str(indices.dtype)[6:]} {tuple(indices.shape)}, expected int64 like the "
                          f"values, {tuple(values.shape)}")
    if not indices.numel():
        return
    ordered = indices if bool((indices[1:] > indices[:-1]).all()) else indices.sort().values
    if int(ordered[0]) < 0 or int(ordered[-1]) >= size:
        raise FormatError(f"indices run from {int(ordered[0])} to {int(ordered[-1])}, outside of shape {tuple(shape)}")
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise FormatError("an index is there twice")


def _scattered(streams: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    s = torch.zeros(math.prod(shape), dtype=torch.float64)
    s[streams["indices"]] = streams["values"].double()
    return s.reshape(shape)
