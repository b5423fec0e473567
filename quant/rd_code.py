"""The rate-distortion code as a JointCode: what the container stores and what deltas point into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.quant.rd import RDCode, cut, decode
from adaptc.quant.rd_index import Index, decode_index, encode_index, payload_order, pieces

MOST_SAMPLES = 160  # that a byte of a stream can stand for: the cheapest class takes 1/18 bit a sample at least
_FIELDS = ("v", "u", "mantissa", "exponent", "lengths")


@dataclass(frozen=True)
class RateDistortion:
    """Directions of many modules coded under one budget, in the order of error removed a bit; scale is always 1.

    Byte format: docs/rd-coding.md. Wraps `adaptc.quant.rd.RDCode`.
    """

    id: ClassVar[str] = "rd"
    code: RDCode

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """name -> (out, in), in index order."""
        return self.code.shapes

    @property
    def streams(self) -> Mapping[str, Tensor]:
        """`index` and `payload`."""
        return {"index": _tensor(self.code.index), "payload": _tensor(self.code.payload)}

    @property
    def config(self) -> Mapping[str, Any]:
        """Nothing besides the streams."""
        return {}

    @classmethod
    def load(cls, modules: Mapping[str, tuple[int, int]], config: Mapping[str, Any], streams: Mapping[str, Tensor]
             ) -> RateDistortion:
        """Return the code; the index is decoded and checked against modules and payload."""
        if config:
            raise FormatError(f"rate-distortion code has config {str(dict(config))[:60]}, it takes none")
        # Of the mapped file: bytes are read when a module is decoded.
        payload = memoryview(streams["payload"].numpy())  # type: ignore[arg-type]  # numpy's stubs, before 3.12
        code = cls(RDCode(dict(modules), streams["index"].numpy().tobytes(), payload))
        if int(code._width.sum()) < len(payload):
            raise FormatError(f"payload has {len(payload)} bytes, its index accounts for {code._width.sum()}")
        code._check_lengths()
        return code

    def _check_lengths(self) -> None:
        """Refuse streams too short for their samples before memory for those is asked for."""
        for name, (m, n) in self.modules.items():
            for d in self._span[name]:
                for (_, start, stop), nbytes in zip(pieces(m, n), self._index.lengths[d], strict=True):
                    if stop - start > MOST_SAMPLES * nbytes:
                        raise FormatError(f"{name}: a stream of {nbytes} bytes claims {stop - start} samples")

    @cached_property
    def _index(self) -> Index:
        return decode_index(self.code.index, list(self.code.shapes.values()))

    @cached_property
    def _width(self) -> npt.NDArray[np.int64]:
        """Payload bytes of each direction, in index order."""
        return np.array([sum(parts) for parts in self._index.lengths], np.int64)

    @cached_property
    def _where(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """First payload byte of each direction, and whether the payload holds all of it."""
        order = payload_order(self._index)
        ends = np.cumsum(self._width[order])
        start, whole = np.empty_like(ends), np.empty(len(ends), np.bool_)
        start[order] = ends - self._width[order]
        whole[order] = ends <= len(self.code.payload)
        return start, whole

    @cached_property
    def _span(self) -> Mapping[str, range]:
        """Directions of each module."""
        ends = np.cumsum(self._index.counts).tolist()
        return {n: range(e - c, e) for n, c, e in zip(self.code.shapes, self._index.counts, ends, strict=True)}

    def decode(self, names: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return float32 (b, a, 1.0) of the named modules."""
        part = self if names is None or len(names) == len(self.code.shapes) else self.select(names)
        return {n: (torch.from_numpy(b), torch.from_numpy(a), 1.0) for n, (b, a) in decode(part.code).items()}

    def rank(self, name: str) -> int:
        """Return how many directions of a module the payload holds."""
        _, whole = self._where
        return int(sum(bool(whole[d]) for d in self._span[name]))

    def nbytes(self, name: str) -> int:
        """Return the payload bytes of a module's directions."""
        _, whole = self._where
        return int(sum(int(self._width[d]) for d in self._span[name] if whole[d]))

    def select(self, names: Sequence[str]) -> RateDistortion:
        """Return the code of some of the modules, every stream unchanged, index made anew."""
        if len(names) == len(self.modules) and list(names) == list(self.modules) and bool(self._where[1].all()):
            return self
        start, whole = self._where
        mine = [[d for d in self._span[n] if whole[d]] for n in names]
        flat = [d for ds in mine for d in ds]
        fields: dict[str, Any] = {f: [getattr(self._index, f)[d] for d in flat] for f in _FIELDS}
        index = replace(self._index, counts=[len(ds) for ds in mine], **fields)
        shapes = {n: self.code.shapes[n] for n in names}
        order = payload_order(index)
        payload = b"".join(self.code.payload[start[flat[o]] : start[flat[o]] + self._width[flat[o]]] for o in order)
        return RateDistortion(RDCode(shapes, encode_index(index, list(shapes.values())), payload))

    def prefix(self, nbytes: int) -> RateDistortion:
        """Return the longest prefix of directions whose index and payload fit `nbytes`; nothing is decoded."""
        return RateDistortion(cut(self.code, nbytes))


def _tensor(data: bytes | memoryview) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
