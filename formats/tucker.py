"""Tucker factors of convolutions (LyCORIS lora_mid, hada_t1, lokr_t2), kept as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.factor import Encoded


class Tucker:
    """a[p, (i, k)] = sum_q mid[p, q, k] down[q, i]: a convolution's right factor, kernel apart from inputs.

    Streams mid (p, q, *kernel) and down (q, in); a: (p, in * prod(kernel)). Decoding is exact up to one rounding to the
    dtype asked for; the sum runs in float64. There is no encoding: a factor in general has no such core.
    """

    id: ClassVar[str] = "tucker"

    def check(self, streams: Mapping[str, Tensor], shape: Sequence[int]) -> None:
        """Raise FormatError for factors that do not make this shape."""
        mid, down = floats(self.id, streams, "mid", "down")
        if mid.dim() < 3 or down.dim() != 2 or mid.shape[1] != down.shape[0] or tuple(shape) != _made(mid, down):
            raise FormatError(f"{self.id}: mid {tuple(mid.shape)} and down {tuple(down.shape)} make no {tuple(shape)}")

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a of shape (p, in * prod(kernel)) in `dtype`."""
        self.check(streams, shape)
        mid, down = streams["mid"].double().flatten(2), streams["down"].double()
        return torch.einsum("pqk,qi->pik", mid, down).reshape(shape).to(dtype)


def fold(mid: Tensor, down: Tensor) -> Encoded:
    """Return the factor (p, in * prod(kernel)) that mid (p, q, *kernel) and down (q, in) stand for, in float64."""
    return Encoded(Tucker.id, {}, {"mid": mid, "down": down}, torch.Size(_made(mid, down)), torch.float64)


def unfold(a: object) -> tuple[Tensor, Tensor] | None:
    """Return (mid, down) of a factor made by `fold`, None for any other."""
    if isinstance(a, Encoded) and a.codec == Tucker.id:
        return a.streams["mid"], a.streams["down"]
    return None


def floats(codec: str, streams: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    """Return the streams `names`. Raises FormatError unless there are just these and all hold floats."""
    if set(streams) != set(names):
        raise FormatError(f"{codec}: streams are {', '.join(sorted(streams))[:80]}, expected {', '.join(names)}")
    wrong = [n for n in names if not streams[n].dtype.is_floating_point]
    if wrong:
        raise FormatError(f"{codec}: stream {wrong[0]} holds no floats")
    return [streams[n] for n in names]


def _made(mid: Tensor, down: Tensor) -> tuple[int, int]:
    return mid.shape[0], down.shape[1] * math.prod(mid.shape[2:])
