"""Affine codes of 2, 3, 4 or 8 bits in groups along the long axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError, UsageError
from adaptc.quant.codec import FactorCodec, grouped
from adaptc.quant.pack import pack_codes, packed_nbytes, unpack_codes


@dataclass(frozen=True, kw_only=True)
class Affine(FactorCodec):
    """w ~ low + step * code, code in 0 .. 2^width - 1, one (low, step) in fp16 for each group of `group` values.

    Streams: `codes` (uint8, packed by `quant.pack`), `step` and `low` (float16, one a group). Rounding to nearest
    within the stored range; a constant group has step 0. Not for budgets: rate-distortion coding is better at every
    size. Use it where the consumer wants plain integers.
    """

    id: ClassVar[str] = "affine"
    width: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        FactorCodec.__post_init__(self)
        if self.width not in (2, 3, 4, 8) or not 1 <= self.group <= 2**16:
            raise UsageError(f"affine codes take 2, 3, 4 or 8 bits in groups to 65536, not {self.width}, {self.group}")

    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return codes, step and low of w (rows, columns)."""
        g = grouped(w, self.group)
        padded = torch.arange(g.numel()).reshape(g.shape) % (-(-w.shape[1] // self.group) * self.group) >= w.shape[1]
        low = g.masked_fill(padded, float("inf")).amin(1).half()
        high = g.masked_fill(padded, float("-inf")).amax(1)
        step = ((high - low.float()).clamp(min=0) / (2**self.width - 1)).half()
        if not bool(torch.isfinite(low).all() and torch.isfinite(step).all()):
            raise FormatError("values do not fit the fp16 range of a group")
        code = ((g - low.float()[:, None]) / step.float().clamp(min=1e-30)[:, None]).round().clamp(0, 2**self.width - 1)
        kept = code.reshape(w.shape[0], -1)[:, : w.shape[1]].to(torch.uint8)
        return {"codes": pack_codes(kept, self.width), "step": step, "low": low}

    def sizes(self, rows: int, columns: int) -> Mapping[str, tuple[torch.dtype, int]]:
        """Codes of `width` bits, step and low of every group."""
        groups = rows * -(-columns // self.group)
        return {"codes": (torch.uint8, packed_nbytes(rows * columns, self.width)), "step": (torch.float16, groups),
                "low": (torch.float16, groups)}

    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return low + step * code."""
        code = unpack_codes(streams["codes"], self.width, rows * columns).reshape(rows, columns)
        group = torch.arange(columns) // self.group
        step, low = (streams[k].float().reshape(rows, -1)[:, group] for k in ("step", "low"))
        return low + step * code
