"""How far apart two adapters are: module by module from their factors, and in what they carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Replacement, Rows, tensors
from adaptc.base import Base
from adaptc.delta import Delta, NeedsBase, kind
from adaptc.errors import FormatError
from adaptc.measure import distance2, norm2
from adaptc.passes import Context, one_blas_thread, run


@dataclass(frozen=True, slots=True)
class Gap:
    """||dW_a - dW_b||^2 and ||dW_a||^2 of one module (or carried tensor), and what else differs."""

    key: str
    distance2: float
    energy: float
    note: str = ""

    @property
    def error(self) -> float:
        """||dW_a - dW_b|| / ||dW_a||: 0 when both are zero, inf when only the first is."""
        return _ratio(self.distance2, self.energy)


@dataclass(frozen=True, slots=True)
class Difference:
    """Every module of two adapters compared. A module that one of them lacks counts as zero there."""

    modules: tuple[Gap, ...]
    carried: tuple[Gap, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def error(self) -> float:
        """sqrt(sum ||dW_a - dW_b||^2 / sum ||dW_a||^2) over all modules."""
        return _ratio(math.fsum(g.distance2 for g in self.modules), math.fsum(g.energy for g in self.modules))

    @property
    def worst(self) -> float:
        """The larger of the total error and the error of any carried tensor: what an acceptance test should look at."""
        return max([self.error, *(g.error for g in self.carried)])


def diff(a: Adapter, b: Adapter, *, base: Base | None = None, jobs: int = 0, ctx: Context | None = None) -> Difference:
    """Return how far b is from a, exact in float64 and never forming dW where both sides have factors.

    Base-dependent deltas (DoRA) are resolved on `base` where it is given; without it their inner parts are compared,
    and their other tensors like carried ones. Raises FormatError when shapes differ or no module is in both.
    """
    a, b = _by_parameter(a, b)
    keys = list(dict.fromkeys([*a.deltas, *b.deltas]))
    if a.deltas and b.deltas and not set(a.deltas) & set(b.deltas):
        raise FormatError(f"no module is in both, one has {next(iter(a.deltas))}, the other {next(iter(b.deltas))}",
                          hint="the adapters are for different models, or one dialect flattened the module names")
    with one_blas_thread():
        modules = run(lambda k: _gap(k, a.deltas.get(k), b.deltas.get(k), base), keys, ctx or Context(jobs=jobs),
                      "diff")
    carried = [_carried_gap(k, a.replaced.get(k), b.replaced.get(k)) for k in dict.fromkeys([*a.replaced, *b.replaced])]
    if base is None:
        for key in keys:
            carried += _side_gaps(key, a.deltas.get(key), b.deltas.get(key))
    return Difference(tuple(modules), tuple(carried), tuple(k for k in a.deltas if k not in b.deltas),
                      tuple(k for k in b.deltas if k not in a.deltas))


def _by_parameter(a: Adapter, b: Adapter) -> tuple[Adapter, Adapter]:
    """Return both with the parts of fused parameters joined where only one of them stores such parts."""
    from adaptc.formats.parts import joined, split_part

    wholes = [{split_part(k)[0] for k in x.deltas} & set(y.deltas) - set(x.deltas) for x, y in ((a, b), (b, a))]
    return joined(a) if wholes[0] else a, joined(b) if wholes[1] else b


def _gap(key: str, x: Delta | None, y: Delta | None, base: Base | None) -> Gap:
    if base is not None:
        x, y = (d.resolve(base.weight(key, d.shape)) if isinstance(d, NeedsBase) else d for d in (x, y))
    if x is not None and y is not None and _identical(x, y):
        return Gap(key, 0.0, _finite(norm2(x)))
    note = f"only in {'b' if x is None else 'a'}" if x is None or y is None else ""
    if x is not None and y is not None and kind(x) != kind(y) and isinstance(x, NeedsBase) | isinstance(y, NeedsBase):
        note = f"{kind(x)} against {kind(y)}, only the parts that need no base are compared"
    if x is None:
        assert y is not None
        return Gap(key, _finite(norm2(y)), 0.0, note)
    return Gap(key, _finite(distance2(x, y)), _finite(norm2(x)), note)


def _identical(x: Delta, y: Delta) -> bool:
    """Return whether two deltas are stored bit for bit alike, so that their distance is 0 and not a rounding error."""
    if type(x) is not type(y) or x.shape != y.shape:
        return False
    if getattr(x, "scale", None) != getattr(y, "scale", None) or repr(x) != repr(y):  # a repr shows every scale inside
        return False
    tx, ty = tensors(x), tensors(y)
    return set(tx) == set(ty) and all(tx[k].dtype == ty[k].dtype and torch.equal(tx[k], ty[k]) for k in tx)


def _carried_gap(key: str, x: Replacement | None, y: Replacement | None) -> Gap:
    """Compare two carried tensors; rows are compared as rows, and only with the same indices."""
    if x is None or y is None:
        return Gap(key, 1.0, float(x is not None), f"carried only by {'b' if x is None else 'a'}")
    if isinstance(x, Rows) != isinstance(y, Rows) or (isinstance(x, Rows) and isinstance(y, Rows)
                                                      and x.indices != y.indices):
        return Gap(key, 1.0, 1.0, "other rows are replaced")
    return _tensor_gap(key, *(v.values if isinstance(v, Rows) else v for v in (x, y)))


def _side_gaps(key: str, x: Delta | None, y: Delta | None) -> list[Gap]:
    """Compare what base-dependent deltas hold besides their inner part, such as the magnitude of DoRA."""
    if not isinstance(x, NeedsBase) or not isinstance(y, NeedsBase) or x.kind != y.kind:
        return []
    names = dict.fromkeys([*x.tensors, *y.tensors])
    held: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = (tensors(x), tensors(y))
    return [_tensor_gap(f"{key} ({n})", held[0][n], held[1][n]) if n in held[0] and n in held[1]
            else Gap(f"{key} ({n})", 1.0, 1.0, "only one side has it") for n in names]


def _tensor_gap(key: str, x: Tensor, y: Tensor) -> Gap:
    if x.numel() != y.numel():
        return Gap(key, 1.0, 1.0, f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    if torch.equal(x, y):  # also where both hold the same infinities
        return Gap(key, 0.0, float(x.double().square().sum()))
    xd, yd = x.double().flatten(), y.double().flatten()
    return Gap(key, _finite((xd - yd).square().sum().item()), _finite(xd.square().sum().item()))


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise FormatError("values are not finite")
    return value


def _ratio(distance: float, energy: float) -> float:
    if not energy:
        return math.inf if distance else 0.0
    return math.sqrt(distance / energy)
