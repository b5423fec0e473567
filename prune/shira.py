"""Sparsify: keep few entries of every delta, as a SHiRA adapter holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Step
from adaptc.calibration import Calibration
from adaptc.coded import Coded
from adaptc.delta import Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import AdaptcError, FormatError, NeedsError, UsageError
from adaptc.passes import Change, Context, Outcome, Pass, one_blas_thread, run
from adaptc.prune import mask
from adaptc.prune.kept import Kept, measured
from adaptc.prune.mask import Ints
from adaptc.prune.refine import refined
from adaptc.prune.view import View, view
from adaptc.quant.golomb import FILL, OWN_GROUP, shorter
from adaptc.report import total_error

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_EXACT = 1e-13  # share of the energy below which what a mask leaves out is rounding


@dataclass(frozen=True)
class Sparsified(Outcome):
    """What `Sparsify` made: besides rows, what every mask kept, and errors at the outputs where inputs are known."""

    masks: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Setting:
    """How many entries a module keeps, and what surrounds the run."""

    k: int
    ctx: Context


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Keep the entries of dW with the highest scores: a `density`, as many as factors of `rank` have, or a `size`.

    `mask` scores |dW| ("magnitude", least error in dW), |dW| ||x|| ("activation", least error at the outputs for
    uncorrelated inputs; needs calibration), |dW o W0| ("snip", needs the base), or draws positions ("random", by
    `seed`; "struct", diagonal, rows and columns). dW is made a row block at a time, never whole. `density` is the share
    of every module, or with `across` of all of them together, spent where scores are highest; `rank` gives each module
    r (m + n) entries, which PEFT's SHIRA needs; `size` is that of the whole file. `refine` fits the values kept to the
    inputs seen (C_SS v = (dW C)_S).

    A sparse change or adapter comes through exactly as long as its entries fit. A trained LoRA does not: 1 to 2 % of
    its entries hold a fifth to a third of its energy, so the result is another adapter. Where less than `min_energy` is
    kept the pass refuses unless `accept_loss`. To make a LoRA smaller use truncate or quantize. arXiv 2406.13175.
    """

    name: ClassVar[str] = "sparsify"
    density: float | None = None
    rank: int | None = None
    size: int | None = field(default=None, metadata={"unit": "bytes"})
    mask: str = "magnitude"
    across: bool = False
    refine: bool = False
    dtype: str | None = None
    seed: int = 0
    min_energy: float = 0.5
    accept_loss: bool = False

    def __post_init__(self) -> None:
        goals = [g for g in ("density", "rank", "size") if getattr(self, g) is not None]
        if len(goals) != 1:
            raise UsageError(f"sparsify wants one of density, rank and size, got {' and '.join(goals) or 'none'}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density:g}, must be above 0 and at most 1")
        for name in ("rank", "size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be positive")
        if self.mask not in mask.MASKS:
            raise UsageError(f"mask {self.mask} is not one of {', '.join(mask.MASKS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if self.across and (self.density is None or self.mask in mask.DRAWN):
            raise UsageError("across spends one density over all modules by their scores, which a drawn mask has not"
                             if self.mask in mask.DRAWN else "across goes with density: size is always spent so")
        if not 0 <= self.min_energy <= 1:
            raise UsageError(f"min_energy is {self.min_energy:g}, must be between 0 and 1")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` is a matrix or kernel known without the base; a stack of experts is not."""
        if isinstance(delta, NeedsBase) or len(delta.shape) < 2:
            return False
        if isinstance(delta, LowRank):
            return len(delta.b.shape) == 2 and delta.rank > 0
        if isinstance(delta, Sum):
            return all(map(self.handles, delta.terms))
        return isinstance(delta, (Sparse, Dense, Kron, Hadamard, Coded))

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Sparsified:
        """Run, then measure what is stored. Raises AdaptcError where less than `min_energy` is kept."""
        ctx = ctx or Context()
        done = super().__call__(adapter, ctx)
        keys = [k for k, d in adapter.deltas.items() if d is not done.adapter.deltas[k]]
        if not keys:
            raise FormatError(f"{self.name} finds no delta that it handles among {len(adapter.deltas)}")
        with one_blas_thread():
            masks = run(lambda k: measured(k, adapter.deltas[k], done.adapter.deltas[k], ctx), keys, ctx, "measure")
        kept = math.fsum(m.kept * m.energy for m in masks) / (math.fsum(m.energy for m in masks) or 1.0)
        entries, of = sum(m.entries for m in masks), sum(m.of for m in masks)
        said = f"{100 * entries / of:.3g} % of the entries keep {100 * kept:.3g} % of ||dW||^2"
        if kept < self.min_energy and not self.accept_loss and any(m.energy for m in masks):
            error = total_error(done.rows)
            raise AdaptcError(f"{said} (relative error {error:.3g}), below {100 * self.min_energy:g} %",
                              hint="this would be another adapter; --accept-loss writes it, compress and quantize keep "
                              "more in as many bytes")
        return Sparsified(done.adapter, done.rows, (said, *done.notes), tuple(masks))

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Any]:
        """Return how many entries every module keeps, or for a size what is made of every module."""
        keys = self.selected(adapter)
        self._check_given(ctx)
        if self.size is not None:
            return self._fit_size(adapter, keys, ctx) if keys else {}
        sizes = {k: _sides(adapter.deltas[k]) for k in keys}
        if self.across:
            total = max(1, round((self.density or 0.0) * sum(m * n for m, n in sizes.values())))
            counts = mask.shares(self._classes(adapter, keys, ctx), total)
            return {k: Setting(c, ctx) for k, c in zip(keys, counts, strict=True)}
        return {k: Setting(self._count(k, m, n), ctx) for k, (m, n) in sizes.items()}

    def _check_given(self, ctx: Context) -> None:
        if self.mask == "snip" and ctx.base is None:
            raise NeedsError("mask snip weighs dW by the base weights", hint="pass --base with the folder of the model")
        if (self.mask == "activation" or self.refine) and not isinstance(ctx.calibration, Calibration):
            raise NeedsError(f"{'refine' if self.refine else 'mask activation'} needs statistics of the inputs",
                             hint="adaptc calibrate makes them; pass --calibration")

    def _count(self, key: str, m: int, n: int) -> int:
        if self.rank is None:
            return max(1, round((self.density or 0.0) * m * n))
        if self.rank * (m + n) > m * n:
            raise UsageError(f"{key}: {self.rank} ({m} + {n}) entries are more than its {m * n}")
        return self.rank * (m + n)

    def _scores(self, key: str, seen: View, ctx: Context) -> Any:
        norms, w0 = None, None
        if self.mask == "activation" and isinstance(ctx.calibration, Calibration):
            gram = ctx.calibration.gram(key, seen.n)
            norms = (gram if gram.dim() == 1 else gram.diagonal()).sqrt().float()
        if self.mask == "snip" and ctx.base is not None:
            w0 = ctx.base.weight(key, (seen.m, seen.n)).reshape(seen.m, seen.n)
        return mask.scores(seen, norms, w0)

    def _classes(self, adapter: Adapter, keys: Sequence[str], ctx: Context) -> list[Ints]:
        return [mask.classes(self._scores(k, view(_free(adapter.deltas[k])), ctx)) for k in keys]

    def _fit_size(self, adapter: Adapter, keys: Sequence[str], ctx: Context) -> dict[str, Change]:
        """Return what is made of every module in a file of at most `size` bytes: the estimate first, then the truth."""
        if ctx.size_of is None or self.size is None:
            raise UsageError("size needs a target format to count its headers")
        shapes = {k: _sides(adapter.deltas[k]) for k in keys}
        counts = None if self.mask in mask.DRAWN else self._classes(adapter, keys, ctx)
        whole = sum(m * n for m, n in shapes.values())
        most = whole if counts is None else sum(int(c.sum()) for c in counts)

        def split(total: int) -> dict[str, int]:
            even = [total * m * n // whole for m, n in shapes.values()]
            return dict(zip(keys, even if counts is None else mask.shares(counts, total), strict=True))

        def made(total: int) -> dict[str, Change]:
            return {k: self.delta(k, adapter.deltas[k], Setting(c, ctx)) for k, c in split(total).items()}

        def file_size(changes: Mapping[str, Change]) -> int:
            step = Step(str(self), _version(), adapter.nbytes, adapter.nbytes, 1.23457e-05)
            deltas = {k: changes[k].delta if k in changes else d for k, d in adapter.deltas.items()}
            assert ctx.size_of is not None
            return ctx.size_of(self.finish(adapter, adapter.with_deltas(deltas, step)))

        fixed = file_size(made(0))
        if fixed >= self.size:
            raise UsageError(f"size {self.size} bytes is below the smallest possible file, {fixed} bytes",
                             hint="headers and carried tensors (heads, norms) count")
        item = {k: self._dtype(adapter.deltas[k]).itemsize for k in keys}
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            cost = sum(_bytes(c, *shapes[k], item[k]) for k, c in split(middle).items())
            low, high = (middle, high) if fixed + cost <= self.size else (low, middle - 1)
        best, fits, over, total = made(0), 0, most + 1, low
        for _ in range(8):  # the estimate is within a percent but for the smallest files
            changes = made(total)
            real = file_size(changes)
            if real <= self.size:
                best, fits = changes, total
            else:
                over = total
            if 0.99 * self.size < real <= self.size or fits + 1 >= over:
                break
            total = round(total * (self.size - fixed) / max(real - fixed, 1))
            total = min(max(total, fits + 1), over - 1)
        return best

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return the entries kept, with the error of what is stored (casts included)."""
        if isinstance(setting, Change):
            return setting
        free, k, ctx = _free(delta), setting.k, setting.ctx
        seen = view(free)
        energy = seen.energy()
        if isinstance(free, Sparse) and self.mask not in mask.DRAWN and free.values.numel() <= k:
            places = free.places()
        elif self.mask == "random":
            places = mask.drawn(key, seen.m, seen.n, k, self.seed)
        elif self.mask == "struct":
            places = mask.struct(seen.m, seen.n, k)
        else:
            places = mask.largest(self._scores(key, seen, ctx), k)
        if self.rank is not None:
            places = _filled(seen, places, k)
        true = seen.at(places)
        values = true
        if self.refine and isinstance(ctx.calibration, Calibration):
            values = refined(seen, places, true, ctx.calibration.gram(key, seen.n))
        stored = values.to(self._dtype(delta))
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(f"entries do not fit {str(stored.dtype)[6:]}", hint="--dtype bf16 or fp32")
        left = energy - float(true.square().sum())
        lost = max(left if left > _EXACT * energy else 0.0, 0.0) + float((true - stored.double()).square().sum())
        indices = places if self.rank is not None else shorter(places, seen.m * seen.n, seen.n)
        return Change(Sparse(indices, stored, 1.0, delta.shape), math.sqrt(lost / energy) if energy else 0.0,
                      energy=energy)

    def _dtype(self, delta: Delta) -> torch.dtype:
        if self.dtype is not None:
            return DTYPES[self.dtype]
        own: Any = getattr(delta, "values", getattr(delta, "weight", getattr(delta, "b", None)))
        return own.dtype if own is not None and own.dtype.itemsize in (2, 4) else torch.float32

    def finish(self, before: Adapter, after: Adapter) -> Adapter:
        """Return the adapter marked for the container, unless its counts are those of PEFT's SHIRA."""
        container = "" if self.rank is not None else "adaptc"
        return replace(after, origin=replace(after.origin, container=container))


def _free(delta: Delta) -> Any:
    assert not isinstance(delta, NeedsBase)
    return delta


def _sides(delta: Delta) -> tuple[int, int]:
    return delta.shape[0], math.prod(delta.shape[1:])


def _filled(seen: View, places: Tensor, k: int) -> Tensor:
    """Return k positions: `places`, the last one of all, by which a PEFT file tells its shape, and the lowest others.

    Where `places` are k already the last position takes the place of the smallest entry, unless that is all there is.
    """
    size = seen.m * seen.n
    if not len(places) or int(places[-1]) != size - 1:
        if len(places) == k:
            values = seen.at(places)
            if math.isclose(float(values.square().sum()), seen.energy(), rel_tol=1e-9):
                return places
            places = torch.cat([places[:(least := int(values.abs().argmin()))], places[least + 1 :]])
        places = torch.cat([places, torch.tensor([size - 1])])
    free = np.setdiff1d(np.arange(min(size, k + len(places))), places.numpy(), assume_unique=True)[: k - len(places)]
    return torch.cat([places, torch.from_numpy(free)]).sort().values


def _bytes(k: int, m: int, n: int, item: int) -> float:
    """Estimate the bytes of k entries in a container: values, gaps near their entropy, tables, a group of their own."""
    p = k / (m * n)
    if not 0 < p < 1:
        return k * (item + 0.125) + OWN_GROUP
    bits = -k * math.log2(p) - (m * n - k) * math.log2(1 - p) + 0.034 * k
    return min(k * item + bits / 8 + 12 * (1 + k / FILL) + OWN_GROUP, k * (item + 8.0))


def _version() -> str:
    from adaptc import __version__

    return __version__
