"""Base-dependent deltas that only need to know the shape of W0: their file does not tell it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import Encoded
from adaptc.spectral import Spectral


def vera(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]; A, B are shared and as wide as the widest module.

    VeRA, arXiv 2310.11454. Raises FormatError when the shared projections are too small for w0.
    """
    (out, n), t = _matrix(w0), delta.tensors
    a, b = t["a"], t["b"]  # (r, max_in), (max_out, r)
    if a.shape[1] < n or b.shape[0] < out:
        raise FormatError(f"shared projections span {a.shape[1]} inputs and {b.shape[0]} outputs, W0 is {out} x {n}")
    scaled = t["lambda_b"].double()[:, None] * b[:out].double()
    return LowRank(a[:, :n], scaled, torch.diag(t["lambda_d"].double()), 1.0, tuple(w0.shape))


def randlora(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = scale * sum of nb randomised bases, scaled on both sides (codec "randlora"). RandLoRA, arXiv 2502.00987."""
    (out, n), t = _matrix(w0), delta.tensors
    short, long, nb = min(out, n), max(out, n), t["lambda"].shape[1]
    if t["gamma"].shape[1] != short or t["a"].shape[2] < short or t["b"].shape[0] < long or t["b"].shape[1] < nb:
        raise FormatError(f"bases {tuple(t['a'].shape)}, {tuple(t['b'].shape)} and gamma {tuple(t['gamma'].shape)} "
                          f"do not belong to a {out} x {n} weight")
    streams = {"a": t["a"][:, 0, :short], "b": t["b"][:long, :nb], "lambda": t["lambda"], "gamma": t["gamma"]}
    weight = Encoded("randlora", {}, streams, torch.Size((out, n)), t["lambda"].dtype)
    return Dense(weight, float(delta.config["scale"]), tuple(w0.shape))


def fourierft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = scaling * Re ifft2(S), S zero but for the trained coefficients (codec "fourier"). arXiv 2405.03003."""
    shape = _matrix(w0)
    values = delta.tensors["spectrum"]
    streams = {"indices": _places(delta, shape, values.numel()), "values": values}
    return Dense(Encoded("fourier", {}, streams, torch.Size(shape), values.dtype), float(delta.config["scaling"]),
                 tuple(w0.shape))


def waveft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = scaling * inverse Haar transform of S (codec "haar"), or scaling * S. WaveFT, arXiv 2505.12532."""
    shape, values = _matrix(w0), delta.tensors["spectrum"]
    places, scaling = _places(delta, shape, values.numel()), float(delta.config["scaling"])
    if not delta.config["transform"]:
        order = torch.argsort(places)
        return Sparse(places[order], values[order], scaling, tuple(w0.shape))
    if shape[0] % 2 or shape[1] % 2:
        raise UnsupportedError(f"waveft pads a {shape[0]} x {shape[1]} weight to even sides, which is not read")
    streams = {"indices": places, "values": values}
    return Dense(Encoded("haar", {}, streams, torch.Size(shape), values.dtype), scaling, tuple(w0.shape))


def sparse(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW[rows, cols] = values (SHiRA, indices (2, k)), or dW.flatten()[indices] = values (SuperTuning).

    Raises FormatError when an index lies outside W0 or is there twice.
    """
    (out, n), t = _matrix(w0), delta.tensors
    flat = t["indices"].long()
    if flat.dim() == 2:
        if int(flat[0].max()) >= out or int(flat[1].max()) >= n:
            raise FormatError(f"indices reach {int(flat[0].max())}, {int(flat[1].max())}, W0 is {out} x {n}")
        flat = flat[0] * n + flat[1]
    return sorted_sparse(flat, t["values"], tuple(w0.shape))


def paca(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW[:, indices] = scaling * w - W0[:, indices], zero elsewhere: w holds whole columns. PaCA, arXiv 2503.01905."""
    (out, n), t = _matrix(w0), delta.tensors
    at = t["indices"].long()
    if at.numel() and (int(at.min()) < 0 or int(at.max()) >= n):
        raise FormatError(f"indices run from {int(at.min())} to {int(at.max())}, W0 has {n} columns")
    columns = float(delta.config["scaling"]) * t["w"].double() - w0.double().flatten(1)[:, at]
    flat = torch.arange(out)[:, None] * n + at
    return sorted_sparse(flat.flatten(), columns.flatten().float(), tuple(w0.shape))


def qhft(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW = scaling / sqrt(out in) F U, F[indices] = spectrum, U Sylvester's orthonormal matrix. QWHA, 2509.17428.

    Raises UnsupportedError at widths that are no power of two, where the official code has a matrix of its own.
    """
    (out, n), t = _matrix(w0), delta.tensors
    if n & (n - 1):
        raise UnsupportedError(f"qhft at width {n} uses a Hadamard matrix that the file does not tell, only powers of "
                               "two are read")
    at = t["indices"].long()
    if at.dim() != 2 or at.shape[0] != 2 or t["spectrum"].shape != at.shape[1:]:
        raise FormatError(f"indices {tuple(at.shape)} and spectrum {tuple(t['spectrum'].shape)} are no (2, p) and (p,)")
    if at.numel() and (int(at.min()) < 0 or int(at[0].max()) >= out or int(at[1].max()) >= n):
        raise FormatError(f"indices reach {int(at[0].max())}, {int(at[1].max())}, W0 is {out} x {n}")
    found = sorted_sparse(at[0] * n + at[1], t["spectrum"], (out, n))
    scale = float(delta.config["scaling"]) / math.sqrt(out * n)
    return Spectral(found.indices, found.values, "sylvester", scale, (out, n))


def sorted_sparse(flat: Tensor, values: Tensor, shape: tuple[int, ...]) -> Sparse:
    """Return the Sparse delta of unsorted flat indices. Raises FormatError for doubled or foreign indices."""
    flat, order = flat.long().sort()
    if flat.numel() and (int(flat[0]) < 0 or int(flat[-1]) >= torch.Size(shape).numel()):
        raise FormatError(f"indices run from {int(flat[0])} to {int(flat[-1])}, the weight is {shape}")
    if bool((flat[1:] == flat[:-1]).any()):
        raise FormatError("an index is there twice")
    return Sparse(flat, values[order], 1.0, shape)


def miss(delta: NeedsBase, w0: Tensor) -> BaseFree:
    """dW[o, i] = block[i mod r, o]; the "mini" form repeats its block along the outputs. MiSS, arXiv 2409.15371."""
    (out, n), block = _matrix(w0), delta.tensors["block"]  # (r, out) or (r, mini)
    r, width = block.shape
    if out % width:
        raise FormatError(f"miss_block has width {width}, which does not divide {out} outputs")
    tile = torch.eye(r, dtype=block.dtype).repeat(1, -(-n // r))[:, :n]
    return LowRank(tile, block.repeat(1, out // width).mT, None, 1.0, tuple(w0.shape))


def _matrix(w0: Tensor) -> tuple[int, int]:
    return int(w0.shape[0]), int(w0[0].numel())


def _places(delta: NeedsBase, shape: tuple[int, int], count: int) -> Tensor:
    """Return the flat positions of the coefficients: a prefix of torch's CPU permutation under the recorded seed."""
    out, n = shape
    if count > out * n:
        raise FormatError(f"{count} coefficients do not fit a {out} x {n} weight")
    generator = torch.Generator().manual_seed(int(delta.config["seed"]))
    return torch.randperm(out * n, generator=generator)[:count].clone()
