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

PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes of factors
MAX_MODULES = 2**16
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
        if config.keys() != {"dtype", "scale"} or config["dtype"] not in PLAIN:
            raise FormatError(f"directions have config {str(dict(config))[:60]}, no dtype ({', '.join(PLAIN)}) and a "
                              "scale")
        scale = config["scale"]
        scales = tuple(scale) if isinstance(scale, list) else (scale,) * len(modules)
        if len(scales) != len(modules):
            raise FormatError(f"{len(scales)} multipliers for {len(modules)} modules")
        if not all(type(s) in (int, float) and abs(s) < 1e300 for s in scales):  # NaN compares false
            raise FormatError("a multiplier of directions is no finite number")
        if len(modules) > MAX_MODULES:
            raise FormatError(f"directions of {len(modules)} modules, at most {MAX_MODULES} can be numbered")
        raw = streams["index"].numpy()
        if len(raw) % _INDEX_BYTES:
            raise FormatError(f"index of directions has {len(raw)} bytes, not whole entries of {_INDEX_BYTES}")
        order = raw.view("<u2").astype(np.uint16).reshape(-1, 2)
        dtype = DTYPES[config["dtype"]]
        code = cls(dict(modules), dtype, tuple(float(s) for s in scales), order, streams["payload"])
        code._check()
        return code

    def _check(self) -> None:
        if len(self.order) and int(self.order[:, 0].max()) >= len(self.modules):
            raise FormatError(f"index names module {int(self.order[:, 0].max())} of {len(self.modules)}")
        for i, chunks in enumerate(self._chunks):
            columns = np.sort(self.order[chunks, 1])
            if not np.array_equal(columns, np.arange(len(columns))):
                raise FormatError(f"module {i} lacks a direction among {len(columns)}, or has one twice")
        if (end := int(self._ends[-1]) if len(self._ends) else 0) < len(self.payload):
            raise FormatError(f"payload has {len(self.payload)} bytes, its index accounts for {end}")

    @cached_property
    def _number(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self.modules)}

    @cached_property
    def _chunks(self) -> list[npt.NDArray[np.int64]]:
        """Numbers of the chunks of every module."""
        owner = self.order[:, 0].astype(np.int64)
        ends = np.cumsum(np.bincount(owner, minlength=len(self.modules)))
        return np.split(np.argsort(owner, kind="stable"), ends[:-1]) if self.modules else []

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
        out = {}
        for name in self.modules if names is None else names:
            i, (m, n) = self._number[name], self.modules[name]
            chunks = self._mine(i)
            chunks = chunks[np.argsort(self.order[chunks, 1])]
            kept = [self._chunk(c) for c in chunks.tolist()]
            both = (torch.cat(kept) if kept else self.payload[:0].clone()).view(self.dtype).reshape(-1, m + n)
            out[name] = (both[:, :m].mT, both[:, m:], self.scales[i])
        return out

    def _mine(self, i: int) -> npt.NDArray[np.int64]:
        """Return the chunks of module i that the payload holds whole, in payload order."""
        return self._chunks[i][self._chunks[i] < self._held]

    def _chunk(self, c: int) -> Tensor:
        return self.payload[int(self._ends[c - 1]) if c else 0 : int(self._ends[c])]

    def rank(self, name: str) -> int:
        """Return how many directions of a module are held."""
        return len(self._mine(self._number[name]))

    def nbytes(self, name: str) -> int:
        """Return the payload bytes of one module."""
        return self.rank(name) * sum(self.modules[name]) * self.dtype.itemsize

    def select(self, names: Sequence[str]) -> Directions:
        """Return the code of some of the modules, chunks unchanged."""
        mine = [self._number[n] for n in names]
        new = {i: k for k, i in enumerate(mine)}
        keep = np.sort(np.concatenate([self._mine(i) for i in mine])).tolist() if mine else []
        order = np.array([(new[int(self.order[c, 0])], int(self.order[c, 1])) for c in keep], np.uint16).reshape(-1, 2)
        payload = torch.cat([self._chunk(c) for c in keep]) if keep else self.payload[:0]
        scales = tuple(self.scales[i] for i in mine)
        return Directions({n: self.modules[n] for n in names}, self.dtype, scales, _renumbered(order), payload)

    def prefix(self, nbytes: int) -> Directions:
        """Return the chunks that fit into `nbytes` of index and payload, columns renumbered without holes."""
        fits = int((self._ends + _INDEX_BYTES * np.arange(1, len(self._ends) + 1) <= nbytes).sum())
        fits = min(fits, self._held)
        end = int(self._ends[fits - 1]) if fits else 0
        return Directions(self.modules, self.dtype, self.scales, _renumbered(self.order[:fits]), self.payload[:end])


def _renumbered(order: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Return `order` with the columns of every module numbered without holes, in the same order."""
    out = order.copy()
    by_column = np.lexsort((order[:, 1], order[:, 0]))
    owner = order[by_column, 0]
    first = np.flatnonzero(np.diff(owner.astype(np.int64), prepend=-1))
    out[by_column, 1] = np.arange(len(owner)) - np.repeat(first, np.diff(first, append=len(owner)))
    return out
