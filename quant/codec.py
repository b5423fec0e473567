"""FactorCodec: a pair of inverse functions between one factor and its streams."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.factor import Encoded


@dataclass(frozen=True, kw_only=True)
class FactorCodec(ABC):
    """A codec whose dataclass fields are its JSON config.

    Factors are coded along their *long* axis: `transpose` says that a factor (out, r) is turned first, so that groups
    run along `out` and never along the rank, which is shorter than any group.
    """

    id: ClassVar[str]
    transpose: bool = False

    @abstractmethod
    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return the streams of a float32 matrix w (rows, columns), coded row by row."""

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

    def decode(self, streams: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the factor. Raises FormatError for streams that do not fit the shape."""
        if len(shape) != 2:
            raise FormatError(f"{self.id} codes a matrix, not shape {tuple(shape)}")
        rows, columns = (shape[1], shape[0]) if self.transpose else (shape[0], shape[1])
        try:
            w = self.values(streams, rows, columns)
        except KeyError as e:
            raise FormatError(f"{self.id}: stream {e} is missing") from e
        return (w.T if self.transpose else w).to(dtype).contiguous()

    def bits(self, shape: Sequence[int]) -> float:
        """Return stored bits a value for a factor of this shape, everything counted."""
        rows, columns = sorted(shape)
        zeros = torch.zeros(rows, columns)
        return 8 * sum(s.nbytes for s in self.streams(zeros).values()) / math.prod(shape)


def expect(stream: Tensor, n: int, name: str) -> Tensor:
    """Return a stream of n entries. Raises FormatError for another length."""
    if stream.numel() != n:
        raise FormatError(f"stream {name} has {stream.numel()} entries, expected {n}")
    return stream


def grouped(w: Tensor, group: int) -> Tensor:
    """Return w (rows, columns) as (rows * ceil(columns / group), group), the last group of a row zero-padded."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % group)).reshape(-1, group)
