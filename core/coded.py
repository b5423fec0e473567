"""Deltas stored in a code that covers many modules at once, and what such a code must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


class JointCode(Protocol):
    """An immutable code of the low-rank deltas of several modules, its payload most important first.

    `streams` and `config` are all there is to store (uint8 tensors, JSON values); `load` is the inverse, for modules
    given as name -> (out, in) in the same order. Any prefix of the stream "payload" decodes to smaller factors.
    """

    id: ClassVar[str]

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """The modules in order: name -> (out, in)."""

    @property
    def streams(self) -> Mapping[str, Tensor]:
        """The stored streams, uint8, one of them named "payload"."""

    @property
    def config(self) -> Mapping[str, Any]:
        """JSON values stored beside the streams."""

    @classmethod
    def load(cls, modules: Mapping[str, tuple[int, int]], config: Mapping[str, Any], streams: Mapping[str, Tensor]
             ) -> JointCode:
        """Return the code. Raises FormatError for streams that contradict the modules."""

    def decode(self, names: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Return (b (out, k), a (k, in), scale) with dW = scale * b @ a for the named modules (None: all)."""

    def rank(self, name: str) -> int:
        """Return how many directions of a module are stored."""

    def nbytes(self, name: str) -> int:
        """Return the payload bytes of one module."""

    def select(self, names: Sequence[str]) -> JointCode:
        """Return the code of some of the modules, values unchanged."""

    def prefix(self, nbytes: int) -> JointCode:
        """Return the best code whose streams take at most `nbytes`, made by dropping the least important directions."""


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """dW of one module of a joint code; decoded to ordinary low-rank factors on demand."""

    code: JointCode
    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Directions stored for this module."""
        return self.code.rank(self.name)

    @property
    def nbytes(self) -> int:
        """Payload bytes of this module."""
        return self.code.nbytes(self.name)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (b (out, k), a (k, in), scale) with dW = scale * b @ a, in the code's own dtype."""
        return self.code.decode([self.name])[self.name]

    def dense(self) -> Tensor:
        """Return dW in float64, shape `shape`."""
        b, a, s = self.factors()
        return (b.double() * s @ a.double()).reshape(self.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Return x @ dW^T for x (..., in), in the dtype of x."""
        b, a, s = self.factors()
        return x @ a.to(x.dtype).mT @ b.to(x.dtype).mT * s

    def __repr__(self) -> str:
        return f"Coded({self.shape}, {self.code.id}, rank {self.rank}, {self.nbytes} B)"
