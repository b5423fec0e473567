"""Left singular vectors of base weights, computed once a weight and kept on disk by its content."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adaptc.errors import AdaptcError, FormatError
from adaptc.formats.atomic import staged
from adaptc.tensorfile import TensorFile, write_tensors

_VERSION = "left-1"  # part of every key: another computation is another name


@dataclass(frozen=True, eq=False)
class Left:
    """W0's side of its outputs: u (m, min(m, n)) with orthonormal columns, s descending, both float32."""

    u: Tensor
    s: Tensor


class Spectra:
    """Left singular vectors by the bytes of a weight, in a folder: m min(m, n) float32 a weight."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else default_folder()
        self.read = self.computed = 0

    def left(self, w0: Tensor) -> Left:
        """Return the left singular vectors of w0 (m, ...), flattened to two dimensions. Raises FormatError for NaN."""
        w = w0.flatten(1).contiguous()
        name = hashlib.sha256(f"{_VERSION}\0{w.dtype}\0{tuple(w.shape)}\0".encode())
        name.update(w.cpu().view(torch.uint8).numpy().data)
        path = self.folder / f"{name.hexdigest()}.safetensors"
        size = min(w.shape)
        try:
            held = TensorFile(path)
            found = Left(held["u"], held["s"])
            if found.u.shape == (w.shape[0], size) and found.s.shape == (size,):
                self.read += 1
                return found
        except (OSError, KeyError, AdaptcError):
            pass  # absent, or damaged: computed again and replaced
        self.computed += 1
        made = left(w)
        with staged(path, force=True) as temp, temp.open("wb") as f:
            write_tensors(f, {"u": made.u, "s": made.s}, {})
        return made


def left(w: Tensor) -> Left:
    """Return u, s of w (m, n) = u diag(s) v^T from the eigenvectors of the smaller Gram, in float64, cast once.

    m <= n: w w^T = u s^2 u^T. m > n: w = q r, then r r^T, u = q u_r. u is orthonormal to rounding; singular values
    below 1e-8 of the largest, which float32 weights do not hold either, are not told apart.
    """
    w = w.double()
    q = None
    if w.shape[0] > w.shape[1]:
        q, w = torch.linalg.qr(w)
    gram = w @ w.mT
    if not bool(torch.isfinite(gram).all()):
        raise FormatError("base weight is not finite")
    values, u = torch.linalg.eigh(gram)
    u, s = u.flip(-1), values.flip(-1).clamp(min=0.0).sqrt()
    return Left((u if q is None else q @ u).float().contiguous(), s.float().contiguous())


def default_folder() -> Path:
    """Return where spectra of bases are kept: $ADAPTC_CACHE, else adaptc in the user's cache folder."""
    root = os.environ.get("ADAPTC_CACHE")
    if root is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(home if os.path.isabs(home) else tempfile.gettempdir(), "adaptc")
    return Path(root) / "spectra"
