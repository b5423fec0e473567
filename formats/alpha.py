"""Per-module alpha tensors: the scale they mean, and the alpha that means a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError
from adaptc.tensorfile import DTYPES, NAMES


def alpha_value(stem: str, alpha: Tensor) -> float:
    """Return the number in an alpha tensor. Raises FormatError unless it is one finite number."""
    if alpha.numel() != 1:
        raise FormatError(f"{stem}.alpha has {alpha.numel()} entries, it must be one number")
    value = float(alpha)
    if not math.isfinite(value):
        raise FormatError(f"{stem}.alpha is {value}")
    return value


def scale_of(value: float | None, rank: int) -> float:
    """Return s = alpha / r. Trainers take a missing or zero alpha for r, so both mean 1."""
    return value / rank if value else 1.0


def record_alpha(value: float, alpha: Tensor) -> list[Any]:
    """Return what Origin.config keeps of an alpha tensor, as JSON: value, dtype, shape."""
    return [value, NAMES[alpha.dtype], list(alpha.shape)]


def recorded_alpha(recorded: Mapping[str, Any], stem: str) -> Tensor | None:
    """Return the alpha tensor that `record_alpha` saw, None where there was none; the inverse of `record_alpha`."""
    was = recorded.get(stem)
    return None if was is None else torch.tensor(was[0], dtype=DTYPES[was[1]]).reshape(was[2])


def alpha_for(scale: float, rank: int, recorded: Mapping[str, Any], stem: str, *, optional: bool) -> Tensor | None:
    """Return the alpha tensor with scale_of(alpha, rank) == scale, for a scale that is not 0.

    The recorded tensor where it still says so; none where there was none, 1 is meant and it is `optional`; else the
    narrowest of the recorded dtype, float32 and float64 that holds scale * rank, which is never rounded to a whole
    number. Where no float64 quotient hits `scale` the nearest is one unit in the last place away.
    """
    was = recorded.get(stem)
    if was is not None and scale_of(was[0], rank) == scale:
        return recorded_alpha(recorded, stem)
    if was is None and optional and scale == 1.0:
        return None
    want = scale * rank
    dtypes = ([DTYPES[was[1]]] if was is not None else []) + [torch.float32]
    for dtype in dtypes:
        alpha = torch.tensor(want, dtype=torch.float64).to(dtype)
        if scale_of(float(alpha), rank) == scale:
            return alpha
    near = (want, math.nextafter(want, math.inf), math.nextafter(want, -math.inf))
    return torch.tensor(next((v for v in near if scale_of(v, rank) == scale), want), dtype=torch.float64)
