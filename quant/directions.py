"""Plain factors in a prefix-decodable order: one chunk a rank-one direction, the most important first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.tensorfile import DTYPES, NAMES

_INDEX_BYTES = 4  # module and column of a direction, uint16 each


@dataclass(frozen=True)
class Directions:
    """A JointCode that stores factors as they are: dW = sum_j s b_j a_j, chunk j = column b_j then row a_j.

    `order` (directions, 2): module number and column of every chunk, in payload order; `config` holds the dtype and
    the multiplier of each module. A payload cut short gives fewer directions.
    """

    id: ClassVar[str] = "directions"
    modules: Mapping[str, tuple[int, int]]
    dtype: torch.dtype
    scales: tuple[float, ...]
    order: npt.NDArray[np.uint16]
    payload: Tensor  # (bytes,) uint8

    @classmethod
    def encode(cls, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> Directions:
        """Encode name -> (b (m, k), a (k, n), scale), one dtype: chunks by falling s^2 |b_j|^2 |a_j|^2 a byte."""
        pairs = [(b, a) for b, a, _ in factors.values()]
        shapes = {name: (b.shape[0], a.shape[1]) for name, (b, a, _) in factors.items()}
        scales = tuple(s for _, _, s in factors.values())
        where = [(i, j) for i, (b, _) in enumerate(pairs) for j in range(b.shape[1])]
        dtype, meta = pairs[0][0].dtype, pairs[0][0].is_meta
        if meta:  # only the size is asked for
            order = np.array(where, np.uint16).reshape(-1, 2)
            size = sum(sum(shape) * b.shape[1] for shape, (b, _) in zip(shapes.values(), pairs, strict=True))
            payload = torch.empty(size * dtype.itemsize, dtype=torch.uint8, device="meta")
            return cls(shapes, dtype, scales, order, payload)
        gains = [b.double().square().sum(0) * a.double().square().sum(1) * s * s / (b.shape[0] + a.shape[1])
                 for b, a, s in factors.values()]
        by_gain = torch.argsort(torch.cat(gains), descending=True, stable=True).tolist()
        order = np.array([where[g] for g in by_gain], np.uint16).reshape(-1, 2)
        chunks = [torch.cat([pairs[i][0][:, j], pairs[i][1][j]]) for i, j in order.tolist()]
        payload = torch.cat(chunks).view(torch.uint8) if chunks else torch.empty(0, dtype=torch.uint8)
        return cls(shapes, dtype, scales, order, payload)

    @property
    def streams(self) -> Mapping[str, Tensor]:
        """`index`: uint16 pairs, little-endian; `payload`: the chunks."""
        return {"index": torch.from_numpy(self.order.astype("<u2").reshape(-1).view(np.uint8)), "payload": self.payload}

    @property
    def config(self) -> Mapping[str, Any]:
        """dtype, and the multipliers: one number where all agree, else a list."""
        same = len(set(self.scales)) <= 1
        return {"dtype": NAMES[self.dtype], "scale": (self.scales or (1.0,))[0] if same else list(self.scales)}

    @classmethod
    def load(cls, modules: Mapping[str, tuple[int, int]], config: Mapping[str, Any], streams: Mapping[str, Tensor]
             ) -> Directions:
        """Return the code. Raises FormatError for chunks of unknown modules, repeated or out of order."""
        dtype = DTYPES.get(str(config.get("dtype")))
        if dtype is None or not dtype.is_floating_point:
            raise FormatError(f"directions have dtype {config.get('dtype')!r}, which is no float")
        scale = config.get("scale", 1.0)
        scales = tuple(scale) if isinstance(scale, list) else (scale,) * len(modules)
        if len(scales) != len(modules) or not all(isinstance(s, (int, float)) for s in scales):
            raise FormatError(f"{len(scales)} multipliers for {len(modules)} modules")
        raw = streams["index"].numpy()
        if len(raw) % _INDEX_BYTES:
            raise FormatError(f"index of directions has {len(raw)} bytes, not whole entries of {_INDEX_BYTES}")
        order = raw.view("<u2").astype(np.uint16).reshape(-1, 2)
        code = cls(dict(modules), dtype, tuple(float(s) for s in scales), order, streams["payload"])
        code._check()
        return code

    def _check(self) -> None:
        if len(self.order) and int(self.order[:, 0].max()) >= len(self.modules):
            raise FormatError(f"index names module {int(self.order[:, 0].max())} of {len(self.modules)}")
        if len(np.unique(self.order, axis=0)) != len(self.order):
            raise FormatError("index names a direction twice")
        limit = np.array([min(shape) for shape in self.modules.values()] or [0])
        wide = np.flatnonzero(np.array([len(c) for c in self._columns]) > np.maximum(limit, 1) * 64)
        if len(wide):
            raise FormatError(f"module {int(wide[0])} has more directions than it can need")
        for i, columns in enumerate(self._columns):
            if sorted(columns) != list(range(len(columns))):
                raise FormatError(f"module {i} lacks a direction among {len(columns)}")
        if int(self._ends[-1] if len(self._ends) else 0) < len(self.payload):
            raise FormatError(f"payload has {len(self.payload)} bytes, its index accounts for {int(self._ends[-1])}")

    @cached_property
    def _columns(self) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in self.modules]
        for i, j in self.order.tolist():
            out[i].append(j)
        return out

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        size = np.array([m + n for m, n in self.modules.values()], np.int64) * self.dtype.itemsize
        return np.cumsum(size[self.order[:, 0].astype(np.int64)]) if len(self.order) else np.zeros(0, np.int64)

    @cached_property
    def _held(self) -> int:
        """Number of chunks that the payload holds whole."""
        return int((self._ends <= len(self.payload)).sum())

    def decode(self, names: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return (b, a, scale) of the named modules, columns in their original order, missing ones left out."""
        number = {name: i for i, name in enumerate(self.modules)}
        wanted = {number[n]: n for n in (self.modules if names is None else names)}
        rows: dict[int, list[tuple[int, Tensor]]] = {i: [] for i in wanted}
        starts = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        for c, (i, j) in enumerate(self.order[: self._held].tolist()):
            if i in rows:
                chunk = self.payload[int(starts[c]) : int(self._ends[c])]
                rows[i].append((j, chunk.clone().view(self.dtype)))
        out = {}
        for i, name in wanted.items():
            m, n = self.modules[name]
            kept = [v for _, v in sorted(rows[i], key=lambda r: r[0])]
            both = torch.stack(kept) if kept else torch.empty(0, m + n, dtype=self.dtype)
            out[name] = (both[:, :m].mT, both[:, m:], self.scales[i])
        return out

    def rank(self, name: str) -> int:
        """Return how many directions of a module are held."""
        i = list(self.modules).index(name)
        return int((self.order[: self._held, 0] == i).sum())

    def nbytes(self, name: str) -> int:
        """Return the payload bytes of one module."""
        return self.rank(name) * sum(self.modules[name]) * self.dtype.itemsize

    def select(self, names: Sequence[str]) -> Directions:
        """Return the code of some of the modules, chunks unchanged."""
        number = {name: i for i, name in enumerate(self.modules)}
        new = {number[n]: k for k, n in enumerate(names)}
        starts = np.concatenate([[0], self._ends[:-1]]) if len(self._ends) else self._ends
        keep = [c for c in range(self._held) if int(self.order[c, 0]) in new]
        chunks = [self.payload[int(starts[c]) : int(self._ends[c])] for c in keep]
        order = np.array([(new[int(self.order[c, 0])], int(self.order[c, 1])) for c in keep], np.uint16).reshape(-1, 2)
        payload = torch.cat(chunks) if chunks else self.payload[:0]
        return Directions({n: self.modules[n] for n in names}, self.dtype, tuple(self.scales[number[n]] for n in names),
                          order, payload)

    def prefix(self, nbytes: int) -> Directions:
        """Return the chunks that fit into `nbytes` of index and payload, columns renumbered without holes."""
        fits = int((self._ends + _INDEX_BYTES * np.arange(1, len(self._ends) + 1) <= nbytes).sum())
        fits = min(fits, self._held)
        order = self.order[:fits].copy()
        for i in range(len(self.modules)):
            mine = np.flatnonzero(order[:, 0] == i)
            order[mine, 1] = np.argsort(np.argsort(order[mine, 1]))
        end = int(self._ends[fits - 1]) if fits else 0
        return Directions(self.modules, self.dtype, self.scales, order, self.payload[:end])
