"""Channels: rows of B and columns of A that hardly matter, dropped from an adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, UsageError
from adaptc.factor import Encoded, decoded
from adaptc.passes import Change, Context, Pass
from adaptc.quant.codec import expect

_AXES = ("rows", "cols")


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A factor of which only some rows, or only some columns, are stored; the others are zero.

    Streams: `rows` or `cols` (int32, sorted places along that axis), and `values`, the stored part flattened row by row
    in the factor's dtype.
    """

    id: ClassVar[str] = "lines"

    @classmethod
    def encode(cls, factor: Tensor, kept: Tensor, axis: int) -> Encoded:
        """Return the rows (axis 0) or columns (axis 1) `kept`, sorted, of a factor as codes."""
        streams = {_AXES[axis]: kept.to(torch.int32), "values": factor.index_select(axis, kept).flatten()}
        return Encoded(cls.id, {}, streams, factor.shape, factor.dtype)

    def check(self, streams: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Raise FormatError for streams that cannot be those of a factor of this shape."""
        if len(shape) != 2:
            raise FormatError(f"{self.id} codes a matrix, not shape {tuple(shape)}")
        axis = int(_AXES[1] in streams)
        kept, values = streams.get(_AXES[axis]), streams.get("values")
        count = kept.numel() if kept is not None else 0
        dtype = values.dtype if values is not None and values.is_floating_point() else torch.float32
        expect(self.id, streams, {_AXES[axis]: (torch.int32, count), "values": (dtype, count * shape[1 - axis])})
        assert kept is not None
        if count and not (bool((kept[1:] > kept[:-1]).all()) and 0 <= int(kept[0]) <= int(kept[-1]) < shape[axis]):
            raise FormatError(f"{self.id}: {_AXES[axis]} is no sorted list of places below {shape[axis]}")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the factor. Raises FormatError for streams that do not fit the shape."""
        self.check(streams, shape)
        axis = int(_AXES[1] in streams)
        kept = streams[_AXES[axis]].long()
        part = (len(kept), shape[1]) if axis == 0 else (shape[0], len(kept))
        return torch.zeros(shape, dtype=dtype).index_copy_(axis, kept, streams["values"].reshape(part).to(dtype))

    def bits(self, shape: tuple[int, ...]) -> float:
        """Return stored bits a value where every row is kept as float32: its values, and its place."""
        return 32 + 32 / shape[1]


@dataclass(frozen=True, kw_only=True)
class Channels(Pass):
    """Drop the outputs and inputs that a low-rank delta hardly changes: rows of B and columns of A.

    Row i of dW = s B A has ||dW_i||^2 = s^2 b_i (A A^T) b_i^T and column j s^2 a_j^T (B^T B) a_j, so scores do not
    depend on how dW is split into B and A. `ratio` is the share of rows and of columns that goes from each module;
    `max_error` instead drops as many as the relative error of the module stays within, cheapest first (the sum of the
    dropped energies bounds it). Only what stays is stored, in a container; other dialects get zeros in the old shape.
    Do not use it in place of truncate, which is the optimum for the same rank: it pays where channels are dead.
    """

    name: ClassVar[str] = "channels"
    container: ClassVar[str] = "adaptc"
    ratio: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.max_error is None):
            raise UsageError("channels takes one of ratio and max_error")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UsageError(f"ratio is {self.ratio:g}, must be 0 (keep all) or more and below 1")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise UsageError(f"max_error is {self.max_error:g}, must be 0 or more and below 1")

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` is one pair of factors of a matrix."""
        return isinstance(delta, LowRank) and len(delta.a.shape) == 2

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Any]:
        """Return the modules to change: none for a ratio of 0, which asks for nothing."""
        return {} if self.ratio == 0 else super().plan(adapter, ctx)

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return the delta with its weakest rows and columns gone."""
        assert isinstance(delta, LowRank)
        b, a = delta.factors()
        rows, cols = (((b @ (a @ a.mT)) * b).sum(1)).clamp(min=0), (((b.mT @ b) @ a) * a).sum(0).clamp(min=0)
        if self.ratio is not None:
            kept = tuple(_strongest(e, len(e) - int(len(e) * self.ratio + 1e-9)) for e in (rows, cols))
        else:
            kept = _within(rows, cols, (self.max_error or 0.0) ** 2 * float(rows.sum()))
        m, n = len(rows), len(cols)
        made = LowRank(Lines.encode(decoded(delta.a), kept[1], 1), Lines.encode(decoded(delta.b), kept[0], 0),
                       delta.core, delta.scale, delta.shape)
        if len(kept[0]) == m and len(kept[1]) == n:
            return Change(delta, 0.0, "no row or column is weak enough")
        return Change(made)


def _strongest(energy: Tensor, keep: int) -> Tensor:
    return torch.sort(energy, descending=True, stable=True).indices[:keep].sort().values


def _within(rows: Tensor, cols: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """Return the rows and columns that stay when the weakest go, with dropped energies of at most `allowed` in sum."""
    energy, order = torch.sort(torch.cat([rows, cols]), stable=True)
    gone = order[: int((energy.cumsum(0) <= allowed).sum())]
    stays = torch.ones(len(order), dtype=torch.bool)
    stays[gone] = False
    return stays[: len(rows)].nonzero().flatten(), stays[len(rows) :].nonzero().flatten()
