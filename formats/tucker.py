"""Tucker factors of convolutions (LyCORIS lora_mid, hada_t1, lokr_t2), kept as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.factor import Encoded


class Tucker:
    """a[p, (i, k)] = sum_q mid[p, q, k] down[q, i]: a convolution's right factor, kernel apart from inputs.

    Streams mid (p, q, *kernel) and down (q, in); a: (p, in * prod(kernel)). Decoding is exact up to one rounding to the
    dtype asked for; the sum runs in float64. There is no encoding: a factor in general has no such core.
    """

    id: ClassVar[str] = "tucker"

    def decode(self, streams: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a of shape (p, in * prod(kernel)) in `dtype`."""
        mid, down = streams["mid"].double().flatten(2), streams["down"].double()
        return torch.einsum("pqk,qi->pik", mid, down).reshape(shape).to(dtype)


def fold(mid: Tensor, down: Tensor) -> Encoded:
    """Return the factor (p, in * prod(kernel)) that mid (p, q, *kernel) and down (q, in) stand for, in float64."""
    shape = torch.Size((mid.shape[0], down.shape[1] * math.prod(mid.shape[2:])))
    return Encoded(Tucker.id, {}, {"mid": mid, "down": down}, shape, torch.float64)


def unfold(a: object) -> tuple[Tensor, Tensor] | None:
    """Return (mid, down) of a factor made by `fold`, None for any other."""
    if isinstance(a, Encoded) and a.codec == Tucker.id:
        return a.streams["mid"], a.streams["down"]
    return None
