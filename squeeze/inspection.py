"""What an adapter holds: spectra, effective ranks, and what looks wrong, module by module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.adapter import Adapter, tensors
from adaptc.coded import Coded
from adaptc.delta import Delta, NeedsBase, kind
from adaptc.lowrank import low_rank, plain
from adaptc.passes import Context, one_blas_thread, run
from adaptc.report import rank_of
from adaptc.squeeze.factored import core_svd


@dataclass(frozen=True, slots=True)
class Module:
    """One delta: what is stored, the singular values of dW (None where it has no factors), what looks wrong.

    `scale` is the multiplier itself; the alpha that PEFT would call it by is scale * rank.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    dtype: str
    nbytes: int
    spectrum: tuple[float, ...] | None
    flags: tuple[str, ...] = ()

    @property
    def energy(self) -> float | None:
        """||dW||_F^2, None where there is no spectrum."""
        return None if self.spectrum is None else math.fsum(s * s for s in self.spectrum)

    @property
    def effective_rank(self) -> float | None:
        """exp(-sum p_i log p_i) with p_i = s_i^2 / sum s^2: 1 for one direction, r for a flat spectrum, 0 for none."""
        if self.spectrum is None:
            return None
        total = self.energy or 0.0
        shares = [s * s / total for s in self.spectrum if s > 0.0 and total]
        return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0.0)) if shares else 0.0

    def kept(self, rank: int) -> float:
        """Return the energy in the first `rank` singular directions."""
        return math.fsum(s * s for s in (self.spectrum or ())[:rank])

    def rank_for(self, share: float) -> int | None:
        """Return the smallest rank that keeps `share` of the energy; None without a spectrum, 0 for dW = 0."""
        if self.spectrum is None:
            return None
        total, kept = self.energy or 0.0, 0.0
        for rank, s in enumerate(self.spectrum, 1):
            if not total:
                return 0
            kept += s * s
            if kept >= share * total * (1 - 1e-12):
                return rank
        return len(self.spectrum)


def inspect(adapter: Adapter, *, jobs: int = 0, ctx: Context | None = None) -> tuple[Module, ...]:
    """Return what every delta of `adapter` is, spectra from the factors; damaged values are flagged, not refused."""
    with one_blas_thread():
        return tuple(run(lambda k: _module(k, adapter.deltas[k], adapter), list(adapter.deltas),
                         ctx or Context(jobs=jobs), "spectra"))


def energy_kept(modules: Sequence[Module], rank: int) -> float:
    """Return the share of all energy that truncating every module to `rank` keeps; 0 for an adapter of zeros."""
    total = math.fsum(m.energy or 0.0 for m in modules)
    return math.fsum(m.kept(rank) for m in modules) / total if total else 0.0


def _module(key: str, delta: Delta, adapter: Adapter) -> Module:
    opened = plain(delta)  # what a code stands for is looked at, what it takes is reported
    held = tensors(opened)
    inner = opened.inner if isinstance(opened, NeedsBase) else opened
    bad = sum(int((~torch.isfinite(t)).sum()) for t in held.values() if t.is_floating_point() and t.dtype.itemsize > 1)
    spectrum = None
    if not bad and inner is not None and delta.nbytes:
        factors = low_rank(inner)
        if factors is not None:
            b, a = factors.factors()
            spectrum = _combined(core_svd(b, a).s)
    coded = delta.inner if isinstance(delta, NeedsBase) else delta
    dtypes = [coded.code.id] if isinstance(coded, Coded) else sorted({str(t.dtype)[6:] for t in held.values()})
    found = _flags(held, rank_of(delta), spectrum, adapter)
    flags = (f"{bad} values are not finite", *found) if bad else found
    scale = getattr(inner, "scale", None)
    return Module(key, kind(delta), tuple(delta.shape), rank_of(delta), scale, "+".join(dtypes), delta.nbytes,
                  None if spectrum is None else tuple(spectrum.tolist()), flags)


def _flags(held: dict[str, Tensor], rank: int | None, spectrum: Tensor | None, adapter: Adapter) -> tuple[str, ...]:
    flags = [f"{name} is all zero, the module changes nothing" for name in ("a", "b", "inner.a", "inner.b")
             if name in held and held[name].numel() and not bool(held[name].any())]
    if spectrum is not None and rank and not flags:
        dtype = next(t.dtype for t in held.values() if t.is_floating_point())
        seen = int((spectrum > spectrum[0] * torch.finfo(dtype).eps).sum())
        if seen < rank:
            flags.append(f"rank {rank} is stored, numerically it is {seen}")
    promised = _promised(adapter)
    if rank and promised and rank != promised:
        flags.append(f"rank {rank} is not the {promised} of the file's config")
    return tuple(flags)


def _promised(adapter: Adapter) -> int | None:
    """Return the one rank the file's config or metadata names for all modules, None where it names none or several."""
    origin = adapter.origin
    if adapter.history or origin.config.get("rank_pattern"):
        return None
    said = origin.config.get("r", origin.metadata.get("ss_network_dim"))
    return int(said) if isinstance(said, int) or (isinstance(said, str) and said.isdigit()) else None


def _combined(s: Tensor) -> Tensor:
    """Return one descending spectrum for a batch of experts: the root of the summed squares, index by index."""
    return s if s.dim() == 1 else s.flatten(0, -2).square().sum(0).sqrt()
