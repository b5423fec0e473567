"""A spectral delta beside a base layer: one transform of the activations, then a sparse product, dW never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptc.kernels import sparse, walsh
from adaptc.kernels.device import backend
from adaptc.kernels.runtime_branch import Beside, free
from adaptc.quant.walsh import Transform

# Beyond these the transform's tile outgrows a GPU's registers: torch transforms, the kernel multiplies.
MAX_ORDER = 64


class SpectralBeside:
    """y + scale * F (U x), F sparse by rows, U an orthonormal Walsh-Hadamard transform of any width."""

    def __init__(self, rows: sparse.Rows, basis: Transform, scale: float) -> None:
        self.beside, self.basis, self.scale = Beside(rows, scale), basis, scale
        self.had: Tensor | None = None
        if basis.order <= MAX_ORDER and basis.length <= walsh.MAX_LENGTH:
            self.had = basis.paley.matrix().float() if basis.paley is not None else rows.values.new_ones(1, 1).float()

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values; the transform's small matrix is shared by all layers of a width."""
        return self.beside.nbytes

    def move(self, device: torch.device) -> None:
        """Move positions, values and the transform's small matrix."""
        self.beside.move(device)
        self.had = None if self.had is None else self.had.to(device)

    def add(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """One launch on a GPU where nothing needs a gradient; else the spectrum first."""
        m, n = self.beside.rows.shape
        if self.had is not None and x.is_cuda and free(x, y) and backend(x) == "triton":
            flat = y.reshape(-1, m)
            return walsh.spectral(x.reshape(-1, n), self.had, self.basis.length, self.beside.rows, flat,
                                  self.scale * scale).view(y.shape)
        return self.beside.add(self.basis.forward(x.float()), y, scale)
