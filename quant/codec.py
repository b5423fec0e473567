"""FactorCodec: a pair of inverse functions between one factor and its streams."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.factor import Encoded


@dataclass(frozen=True, kw_only=True)
class FactorCodec(ABC):
    """A codec whose dataclass fields are its JSON config.

    Factors are coded along their *long* axis: `transpose` says that a factor (out, r) is turned first, so that groups
    run along `out` and never along the rank, which is shorter than any group.
    """

    id: ClassVar[str]
    transpose: bool = False

    def __post_init__(self) -> None:
        """Refuse options of the wrong type: they may come from a file."""
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if type(value) is not wanted:
                raise UsageError(f"{self.id} takes {field.name} as {wanted.__name__}, not {str(value)[:40]!r}")

    @abstractmethod
    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return the streams of a float32 matrix w (rows, columns), coded row by row."""

    @abstractmethod
    def sizes(self, rows: int, columns: int) -> Mapping[str, tuple[torch.dtype, int]]:
        """Return dtype and number of entries of every stream of a matrix (rows, columns)."""

    @abstractmethod
    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return the float32 matrix (rows, columns) the streams stand for."""

    @classmethod
    def encode(cls, factor: Tensor, **config: Any) -> Encoded:
        """Return `factor` (r, in) or (out, r) as codes along its longer axis, decoded to its own dtype."""
        made = cls(transpose=factor.shape[0] > factor.shape[1], **config)
        w = factor.T if made.transpose else factor
        return Encoded(cls.id, {k: v for k, v in asdict(made).items()}, made.streams(w.float().contiguous()),
                       factor.shape, torch.float32 if factor.dtype == torch.float64 else factor.dtype)

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for streams that cannot be those of a factor of this shape. Allocates nothing."""
        if len(shape) != 2:
            raise FormatError(f"{self.id} codes a matrix, not shape {tuple(shape)}")
        expect(self.id, streams, self.sizes(*self._turned(shape)))

    def decode(self, streams: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the factor. Raises FormatError for streams that do not fit the shape."""
        self.check(streams, shape)
        w = self.values(streams, *self._turned(shape))
        return (w.T if self.transpose else w).to(dtype).contiguous()

    def _turned(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return (rows, columns) of the matrix that is coded row by row."""
        return (shape[1], shape[0]) if self.transpose else (shape[0], shape[1])

    def bits(self, shape: Sequence[int]) -> float:
        """Return stored bits a value for a factor of this shape, everything counted."""
        rows, columns = sorted(shape)
        zeros = torch.zeros(rows, columns)
        return 8 * sum(s.nbytes for s in self.streams(zeros).values()) / math.prod(shape)


def expect(codec: str, streams: Mapping[str, Tensor], sizes: Mapping[str, tuple[torch.dtype, int]]) -> None:
    """Raise FormatError unless `streams` are flat and have exactly these names, dtypes and numbers of entries."""
    for name in {**sizes, **streams}:
        if name not in streams:
            raise FormatError(f"{codec}: stream {name} is missing")
        if name not in sizes:
            raise FormatError(f"{codec}: stream {name[:40]} is not one of {', '.join(sizes)}")
        (dtype, n), t = sizes[name], streams[name]
        if t.dim() != 1 or t.numel() != n:
            raise FormatError(f"{codec}: stream {name} has shape {tuple(t.shape)}, expected {n} entries")
        if t.dtype != dtype:
            raise FormatError(f"{codec}: stream {name} is {str(t.dtype)[6:]}, expected {str(dtype)[6:]}")


def grouped(w: Tensor, group: int) -> Tensor:
    """Return w (rows, columns) as (rows * ceil(columns / group), group), the last group of a row zero-padded."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % group)).reshape(-1, group)
