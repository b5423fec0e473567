"""Weights that PEFT types store as a few coefficients: rebuilt on demand, never kept dense.

Each class is a codec (see adaptc.factor.Encoded) that only decodes: the coefficients were trained as such, and a weight
in general has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor


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

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in)."""
        a, b, lam, gamma = (streams[k].double() for k in ("a", "b", "lambda", "gamma"))
        right = (lam[:, :, None] * a[:, None, :] * gamma[None]).flatten(0, 1)  # (r nb, short)
        left = b.flatten(1)  # (long, nb r)
        return (left @ right if shape[1] == right.shape[1] else right.mT @ left.mT).to(dtype)


def _scattered(streams: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    s = torch.zeros(torch.Size(shape).numel(), dtype=torch.float64)
    s[streams["indices"]] = streams["values"].double()
    return s.reshape(shape)
