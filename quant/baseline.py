"""What the obvious schemes make of the same adapter at the same bytes, so that a result never stands alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.quant.nf4 import NF4
from adaptc.squeeze.budget import allocate
from adaptc.squeeze.factored import Core, core_svd, truncate

Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # name -> b (m, r), a (r, n), scale
NF4_BITS = 4.0 + 8 / 64 + 32 / (64 * 256)  # codes, 8-bit absmax a block of 64, fp32 a block of 256 of those


@dataclass(frozen=True)
class Baseline:
    """Total relative error of a scheme and the bytes of its payload."""

    error: float
    nbytes: int


def truncation_nf4(factors: Factors, nbytes: int) -> Baseline:
    """Optimal truncation, then NF4 with double quantization, in at most `nbytes` of payload (no headers).

    Directions of all modules by error removed a byte at the price of NF4, sqrt(sigma) on both sides, each factor coded
    along its long axis. This is the strong trivial baseline: most of what any scheme gains, truncation gains already.
    """
    cores = {k: core_svd(b, a, None, s) for k, (b, a, s) in factors.items()}
    cost = {k: max(round((b.shape[0] + a.shape[1]) * NF4_BITS / 8), 1) for k, (b, a, _) in factors.items()}
    ranks = allocate({k: c.s for k, c in cores.items()}, cost, dict.fromkeys(factors, 0),
                     lambda r: sum(r[k] * cost[k] for k in r), nbytes)
    total = lost = 0.0
    for k, (b, a, s) in factors.items():
        energy = float(cores[k].s.square().sum())
        total += energy
        lost += energy * (_nf4_error(b, a, s, ranks[k], cores[k]) ** 2 if ranks[k] else 1.0)
    return Baseline((lost / total) ** 0.5 if total else 0.0, sum(ranks[k] * cost[k] for k in ranks))


def _nf4_error(b: Tensor, a: Tensor, s: float, rank: int, core: Core) -> float:
    cut = truncate(b, a, rank, scale=s, dtype=torch.float32, core=core)
    coded = [NF4.encode(t).decode().double() for t in (cut.b, cut.a)]
    return _error(b, a, s, coded[0], coded[1], float(core.s.square().sum()))


def sign_mean(factors: Factors) -> Baseline:
    """Sign times mean |.| of every factor as it is stored: what "1 bit" usually means; one float32 a factor."""
    total = lost = 0.0
    nbytes = 0
    for b, a, s in factors.values():
        energy = float(((b.double().mT @ b.double()) * (a.double() @ a.double().mT)).sum()) * s * s
        coded = [t.double().sign() * t.double().abs().mean() for t in (b, a)]
        total += energy
        lost += energy * _error(b, a, s, coded[0] * s, coded[1], energy) ** 2
        nbytes += (b.numel() + a.numel()) // 8 + 8
    return Baseline((lost / total) ** 0.5 if total else 0.0, nbytes)


def _error(b: Tensor, a: Tensor, s: float, b2: Tensor, a2: Tensor, energy: float) -> float:
    """Return ||s b a - b2 a2|| / ||s b a|| from Grams; exact to about 1e-8, enough for schemes that lose percents."""
    if energy <= 0:
        return 0.0
    b, a = b.double() * s, a.double()
    left = energy - 2 * float(((b.mT @ b2) * (a @ a2.mT)).sum()) + float(((b2.mT @ b2) * (a2 @ a2.mT)).sum())
    return math.sqrt(max(left, 0.0) / energy)
