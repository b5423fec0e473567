"""NF4 with double quantization, as bitsandbytes stores it (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.quant.codec import FactorCodec

# Quantiles of a normal variable scaled to [-1, 1], with an exact zero.
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK, OUTER = 64, 256


@cache
def dynamic_map() -> Tensor:
    """Return the 256 values of the signed 8-bit dynamic code, float32: seven decades, 2^i fractions in decade i.

    +- (0.1 + 0.9 (k + 1/2) / 2^i) 10^(i - 6) for i = 0..6, k = 0..2^i - 1, computed in float64, with 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        fractions = [(0.1 + 0.9 * (k + 0.5) / 2**i) * 10.0 ** (i - 6) for k in range(2**i)]
        values += fractions + [-f for f in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class NF4(FactorCodec):
    """w ~ LEVELS[code] * absmax over blocks of 64 values; absmax as 8-bit dynamic codes over 256 blocks plus a mean.

    Streams: `codes` (two a byte, the first in the high half), `absmax` (uint8), `scale` (float32, one for 256 blocks),
    `offset` (float32, one): absmax = dynamic_map[absmax] * scale + offset. 4.127 bits a value. Values equal
    bitsandbytes' `quantize_4bit(..., "nf4", compress_statistics=True)` to 1e-6.
    """

    id: ClassVar[str] = "nf4"

    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return codes, absmax, scale and offset of w, flattened row by row."""
        blocks = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % BLOCK)).reshape(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        if not bool(torch.isfinite(absmax).all()):
            raise FormatError("values are not finite")
        code = nearest(blocks / absmax.clamp(min=1e-30)[:, None], torch.tensor(LEVELS))
        flat = torch.nn.functional.pad(code.reshape(-1)[: w.numel()], (0, w.numel() % 2), value=7)
        offset = absmax.mean()
        outer = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % OUTER)).reshape(-1, OUTER)
        scale = outer.abs().amax(1)
        nested = nearest(outer / scale.clamp(min=1e-30)[:, None], dynamic_map()).reshape(-1)[: len(absmax)]
        return {"codes": flat[0::2] << 4 | flat[1::2], "absmax": nested, "scale": scale, "offset": offset.reshape(1)}

    def sizes(self, rows: int, columns: int) -> Mapping[str, tuple[torch.dtype, int]]:
        """Half a byte a value, one byte a block, one float for 256 blocks, one float."""
        n = rows * columns
        blocks = -(-n // BLOCK)
        return {"codes": (torch.uint8, -(-n // 2)), "absmax": (torch.uint8, blocks),
                "scale": (torch.float32, -(-blocks // OUTER)), "offset": (torch.float32, 1)}

    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return LEVELS[code] * absmax."""
        n, absmax = rows * columns, streams["absmax"]
        code = torch.stack([streams["codes"] >> 4, streams["codes"] & 15], -1).reshape(-1)[:n]
        scale = streams["scale"].repeat_interleave(OUTER)[: len(absmax)]
        block = dynamic_map()[absmax.long()] * scale + streams["offset"]
        return (torch.tensor(LEVELS)[code.long()] * block.repeat_interleave(BLOCK)[:n]).reshape(rows, columns)


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each x, uint8; `levels` ascending."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
