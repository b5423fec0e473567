"""Weights that PEFT types store as a few coefficients: rebuilt on demand, never kept dense.

Each class is a codec (see adaptc.factor.Encoded) that only decodes: the coefficients are what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError


class Fourier:
    """Re ifft2(S) of an (out, in) spectrum S, zero but for `values` at the flat `indices`. FourierFT, 2405.03003."""

    id: ClassVar[str] = "fourier"

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        made: Tensor = torch.fft.ifft2(_scattered(streams, shape)).real
        return made.to(dtype)


class Haar:
    """Inverse two-dimensional Haar transform of S, zero but for `values` at the flat `indices`. WaveFT, 2505.12532.

    The quadrants of S are averages and details: [[cA, cH], [cV, cD]]; both sides of the shape are even.
    """

    id: ClassVar[str] = "haar"

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        out, n = shape
        if out % 2 or n % 2:
            raise FormatError(f"haar: {out} x {n} has an odd side")
        q = _scattered(streams, shape).reshape(2, out // 2, 2, n // 2).permute(0, 2, 1, 3)
        (ca, ch), (cv, cd) = q[0], q[1]
        rows = [torch.stack([ca + ch + cv + cd, ca + ch - cv - cd], -1),
                torch.stack([ca - ch + cv - cd, ca - ch - cv + cd], -1)]
        return (torch.stack(rows, 1) / 2).reshape(out, n).to(dtype)


class Circulant:
    """Blocks of b x b circulants: entry (a, d) of block (p, q) is kernel[p, q, (d - a) mod b] / in. C3A, 2407.19342."""

    id: ClassVar[str] = "circulant"

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        kernel = _stream(streams, "kernel", "circulant", 3).double()  # (out/b, in/b, b)
        b = kernel.shape[-1]
        if (kernel.shape[0] * b, kernel.shape[1] * b) != tuple(shape):
            raise FormatError(f"circulant: kernel {tuple(kernel.shape)} does not make {tuple(shape)}")
        turn = (torch.arange(b)[None, :] - torch.arange(b)[:, None]) % b
        return (kernel[..., turn].permute(0, 2, 1, 3).reshape(shape) / shape[1]).to(dtype)


class RandLora:
    """Sum of randomised bases with trained diagonals on both sides. RandLoRA, 2502.00987.

    a: (r, short), b: (long, nb, r), lambda: (r, nb), gamma: (nb, short), short = min(out, in). The left factor runs
    basis by basis, the right one rank by rank: the two orders differ, and that mixture is what was trained.
    """

    id: ClassVar[str] = "randlora"

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        dims = {"a": 2, "b": 3, "lambda": 2, "gamma": 2}
        a, b, lam, gamma = (_stream(streams, k, "randlora", d).double() for k, d in dims.items())
        (r, short), (long, nb, _) = a.shape, b.shape
        if (b.shape[2], *lam.shape, *gamma.shape) != (r, r, nb, nb, short) or {long, short} != set(shape):
            raise FormatError(f"randlora: bases of rank {r} over {long} and {short} do not make {tuple(shape)}")
        right = (lam[:, :, None] * a[:, None, :] * gamma[None]).flatten(0, 1)  # (r nb, short)
        left = b.flatten(1)  # (long, nb r)
        return (left @ right if shape[1] == right.shape[1] else right.mT @ left.mT).to(dtype)


def _scattered(streams: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    indices, values = _stream(streams, "indices", "spectrum", 1), _stream(streams, "values", "spectrum", 1)
    size = torch.Size(shape).numel()
    if indices.shape != values.shape or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size):
        raise FormatError(f"spectrum: {indices.numel()} indices and {values.numel()} values do not fit {tuple(shape)}")
    s = torch.zeros(size, dtype=torch.float64)
    s[indices.long()] = values.double()
    return s.reshape(shape)


def _stream(streams: Mapping[str, Tensor], name: str, codec: str, dims: int) -> Tensor:
    if name not in streams or streams[name].dim() != dims:
        raise FormatError(f"{codec}: stream {name} is missing or has not {dims} dimensions")
    return streams[name]
