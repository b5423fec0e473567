"""Factor: a tensor, or codes that decode to one on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tensor stored as the named streams of a codec; `decode` rebuilds it, nothing is cached.

    `shape` and `dtype` are those of the decoded tensor; `config` holds JSON values only.
    """

    codec: str
    config: Mapping[str, Any]
    streams: Mapping[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """Return the tensor the streams stand for, shape `shape`, dtype `dtype`."""
        from adaptc.registry import CODECS

        made: Tensor = CODECS.get(self.codec)(**self.config).decode(self.streams, tuple(self.shape), self.dtype)
        return made

    @property
    def nbytes(self) -> int:
        """Stored bytes: every stream, nothing else."""
        return sum(s.nbytes for s in self.streams.values())

    def __repr__(self) -> str:
        return f"Encoded({self.codec}, {tuple(self.shape)}, {self.nbytes} B)"


Factor: TypeAlias = Tensor | Encoded


def decoded(factor: Factor) -> Tensor:
    """Return the factor as a tensor, decoding if it is stored as codes."""
    return factor.decode() if isinstance(factor, Encoded) else factor


def describe(factor: Factor | None) -> str:
    """Return shape and dtype for a repr, never data."""
    if factor is None:
        return "None"
    if isinstance(factor, Encoded):
        return repr(factor)
    return f"{tuple(factor.shape)} {str(factor.dtype).removeprefix('torch.')}"
