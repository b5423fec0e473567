"""Cuts: what stays of every pruned parameter, and tensors and deltas cut to it, masked by it, or spread out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Delta, Dense, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import decoded
from adaptc.lowrank import low_rank
from adaptc.prune.groups import COLUMNS, ROWS, Coupling


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What stays of a parameter of logical shape `shape`: sorted entries of its rows and columns, None for all."""

    shape: tuple[int, ...]
    rows: Tensor | None = None
    cols: Tensor | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape that stays."""
        sizes = [len(k) if k is not None else n for k, n in zip((self.rows, self.cols), self.shape, strict=False)]
        return tuple(sizes)

    @property
    def whole(self) -> bool:
        """Whether everything stays."""
        return self.kept == self.shape

    def slice(self, w: Tensor) -> Tensor:
        """Return the part of w (`shape`) that stays."""
        return _take(_take(w, ROWS, self.rows), COLUMNS, self.cols)

    def spread(self, part: Tensor) -> Tensor:
        """Return `part` (what `slice` gives) in its place in a tensor of `shape` that is zero elsewhere."""
        return _put(_put(part, ROWS, self.rows, self.shape[0]), COLUMNS, self.cols, self.shape[-1])

    def mask(self, w: Tensor) -> Tensor:
        """Return w with everything that goes set to zero."""
        return w if self.whole else self.spread(self.slice(w))

    def after(self, earlier: Cut) -> Cut:
        """Return this cut of what `earlier` left, as one cut of the original parameter."""
        def both(first: Tensor | None, then: Tensor | None) -> Tensor | None:
            return then if first is None else first if then is None else first[then]

        return Cut(earlier.shape, both(earlier.rows, self.rows), both(earlier.cols, self.cols))


def cuts_of(chosen: Iterable[tuple[Coupling, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Cut]:
    """Return the cut of every parameter for the units (sorted) that stay of every coupling.

    `shapes` are logical. A fused parameter loses the union of what its parts lose.
    """
    stays: dict[tuple[str, int], Tensor] = {}
    for coupling, units in chosen:
        gone = torch.ones(coupling.units, dtype=torch.bool)
        gone[units] = False
        for part in coupling.parts:
            place = (part.key, part.axis)
            if place not in stays:
                stays[place] = torch.ones(shapes[part.key][part.axis], dtype=torch.bool)
            stays[place][part.entries(gone.nonzero().flatten())] = False
    out: dict[str, Cut] = {}
    for (key, axis), mask in stays.items():
        index = mask.nonzero().flatten()
        cut = out.get(key, Cut(tuple(shapes[key])))
        out[key] = replace(cut, rows=index) if axis == ROWS else replace(cut, cols=index)
    return out


def slice_delta(key: str, delta: Delta, cut: Cut) -> Delta:
    """Return what stays of a delta: rows of B, columns of A, the multiplier as it was.

    Raises UnsupportedError for deltas that need the base weights, whose meaning changes with the rows they act on.
    """
    if isinstance(delta, Sum):
        terms: tuple[BaseFree, ...] = tuple(slice_delta(key, t, cut) for t in delta.terms)  # type: ignore[misc]
        return Sum(terms, cut.kept)
    return _each(key, delta, cut, back=False)


def spread_delta(key: str, delta: Delta, cut: Cut) -> Delta:
    """Return a delta of the pruned parameter as one of the whole: zero on every row and column that had gone."""
    if tuple(delta.shape) != cut.kept:
        raise FormatError(f"{key}: adapter has shape {tuple(delta.shape)}, the map keeps {cut.kept} of {cut.shape}")
    if isinstance(delta, Sum):
        terms: tuple[BaseFree, ...] = tuple(spread_delta(key, t, cut) for t in delta.terms)  # type: ignore[misc]
        return Sum(terms, cut.shape)
    return _each(key, delta, cut, back=True)


def _each(key: str, delta: Delta, cut: Cut, *, back: bool) -> Delta:
    if isinstance(delta, NeedsBase):
        raise UnsupportedError(f"{key}: {delta.kind} depends on whole rows of the base, which pruning changes",
                               hint="write it as a plain delta first: adaptc run resolve --base DIR IN OUT")
    shape = cut.shape if back else cut.kept
    if isinstance(delta, Sparse):
        return _sparse(delta, cut, back=back)
    if isinstance(delta, Dense):
        w = decoded(delta.weight).reshape(delta.shape)
        return Dense(cut.spread(w) if back else cut.slice(w), delta.scale, shape)
    pair = low_rank(delta)
    if pair is None or len(delta.shape) != 2:
        raise UnsupportedError(f"{key}: a delta of shape {tuple(delta.shape)} has no rows and columns to prune")
    a, b = decoded(pair.a), decoded(pair.b)
    if back:
        a, b = _put(a, COLUMNS, cut.cols, shape[1]), _put(b, ROWS, cut.rows, shape[0])
    else:
        a, b = _take(a, COLUMNS, cut.cols), _take(b, ROWS, cut.rows)
    return LowRank(a, b, pair.core, pair.scale, shape)


def _take(t: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """Return the entries `index` of an axis, all for None."""
    return t if index is None else t.index_select(axis, index)


def _put(t: Tensor, axis: int, index: Tensor | None, size: int) -> Tensor:
    """Return the tensor of which `_take` gives t, zero elsewhere."""
    if index is None:
        return t
    shape = list(t.shape)
    shape[axis] = size
    return t.new_zeros(shape).index_copy_(axis, index, t)


def _sparse(delta: Sparse, cut: Cut, *, back: bool) -> Sparse:
    """Move the entries of a sparse delta between the numbering of the whole and of what stays."""
    source, target = (cut.kept, cut.shape) if back else (cut.shape, cut.kept)
    width, held, values = source[1] if len(source) == 2 else 1, decoded(delta.indices).long(), decoded(delta.values)
    places, inside = [], torch.ones(len(held), dtype=torch.bool)
    for index, at, size in ((cut.rows, held // width, cut.shape[0]),
                            (cut.cols, held % width, cut.shape[1] if len(cut.shape) == 2 else 1)):
        if index is None:
            places.append(at)
        elif back:
            places.append(index[at])
        else:
            new = torch.full((size,), -1).index_copy_(0, index, torch.arange(len(index)))
            places.append(new[at])
            inside &= places[-1] >= 0
    flat = places[0] * (target[1] if len(target) == 2 else 1) + places[1]
    return Sparse(flat[inside], values[inside], delta.scale, tuple(target))


def shape_of(stored: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Return the logical shape (out, in) of a weight stored as `stored`."""
    return stored[::-1] if transposed and len(stored) == 2 else stored

