"""How far a change of weights moves a layer's outputs, on the tokens a pass saw and on those it did not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptc.calibration import SPLITS, Calibration, Split
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import NeedsError
from adaptc.lowrank import low_rank


def output_errors(calibration: Calibration, key: str, before: Delta | Tensor, after: Delta | Tensor | None
                  ) -> dict[Split, float]:
    """Return sqrt(E||(dW - dW') x||^2 / E||dW x||^2) for each split that the statistics of parameter `key` have.

    With C the second moment of the inputs, E||dW x||^2 = tr(dW C dW^T); from factors where both sides have them. A
    matrix (m, n) stands for itself, None for zero. 0 where both energies are 0, inf where only the first is. Raises
    NeedsError where there are no statistics of `key` at all, else what Calibration.gram raises.
    """
    splits = [s for s in SPLITS if calibration.moment(key, s) is not None]
    if not splits:
        raise NeedsError(f"{calibration.path.name} has no statistics of {key}")
    whole, gap = _parts(before), _parts(before, after)
    return {s: _ratio(_energy(calibration, key, gap, s), _energy(calibration, key, whole, s)) for s in splits}


def _parts(x: Delta | Tensor, y: Delta | Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Return x - y in float64 as factors (b, a) where both have them, else as a matrix."""
    fx, fy = _factors(x), _factors(y)
    if y is None:
        return fx if fx is not None else _matrix(x)
    if fx is not None and fy is not None:
        return torch.cat([fx[0], -fy[0]], -1), torch.cat([fx[1], fy[1]], -2)
    return _matrix(x) - _matrix(y)


def _factors(x: Delta | Tensor | None) -> tuple[Tensor, Tensor] | None:
    made = None if x is None or isinstance(x, (Tensor, NeedsBase)) else low_rank(x)
    return None if made is None else made.factors()


def _matrix(x: Delta | Tensor) -> Tensor:
    return x.double().flatten(1) if isinstance(x, Tensor) else x.dense().flatten(1)


def _energy(calibration: Calibration, key: str, dw: Tensor | tuple[Tensor, Tensor], split: Split) -> float:
    return calibration.energy(key, dw, split) if isinstance(dw, Tensor) else calibration.output_energy(key, *dw, split)


def _ratio(left: float, total: float) -> float:
    if total == 0.0:
        return 0.0 if left == 0.0 else math.inf
    return math.sqrt(left / total)
