"""fp8 (e4m3) with one scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.quant.codec import FactorCodec

LARGEST = 448.0  # of e4m3fn


@dataclass(frozen=True, kw_only=True)
class FP8(FactorCodec):
    """w ~ scale * e4m3(w / scale), scale = max |row| / 448 for each row along the long axis (a rank direction).

    Streams: `codes` (uint8, the bits of float8_e4m3fn), `scale` (float32, one a row).
    """

    id: ClassVar[str] = "fp8"

    def streams(self, w: Tensor) -> dict[str, Tensor]:
        """Return codes and scale of w (rows, columns)."""
        scale = w.abs().amax(1) / LARGEST
        if not bool(torch.isfinite(scale).all()):
            raise FormatError("values are not finite")
        codes = (w / scale.clamp(min=1e-38)[:, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8).reshape(-1), "scale": scale}

    def sizes(self, rows: int, columns: int) -> Mapping[str, tuple[torch.dtype, int]]:
        """One byte a value, one float a row."""
        return {"codes": (torch.uint8, rows * columns), "scale": (torch.float32, rows)}

    def values(self, streams: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return scale * codes. Raises FormatError for a code that is not a number."""
        codes = streams["codes"].view(torch.float8_e4m3fn).float()
        if not bool(torch.isfinite(codes).all()):
            raise FormatError("fp8 codes hold NaN")
        return codes.reshape(rows, columns) * streams["scale"][:, None]
