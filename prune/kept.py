"""What a mask kept of a delta, measured on what is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaptc.calibration import SPLITS, Calibration, Split
from adaptc.delta import Delta, NeedsBase, Sparse
from adaptc.passes import Context
from adaptc.prune.view import View, blocks, view


@dataclass(frozen=True, slots=True)
class Kept:
    """One module: entries kept of how many, ||dW||^2, the share of it at those entries, and errors at the outputs.

    lost and total: split -> E||(dW - dW') x||^2 and E||dW x||^2, times the mean squared gradient at the outputs where
    it is known.
    """

    key: str
    entries: int
    of: int
    energy: float
    kept: float
    lost: dict[str, float]
    total: dict[str, float]

    def output_error(self, split: Split) -> float | None:
        """Return sqrt(E||(dW - dW') x||^2 / E||dW x||^2), None where the inputs are not known."""
        return output_error([self], split)


def output_error(masks: Sequence[Kept], split: Split) -> float | None:
    """Return the relative error at the outputs over several modules, None where some inputs are not known."""
    if not masks or any(split not in m.total for m in masks):
        return None
    total = math.fsum(m.total[split] for m in masks)
    return math.sqrt(math.fsum(m.lost[split] for m in masks) / total) if total else 0.0


def measured(key: str, before: Delta, after: Delta, ctx: Context) -> Kept:
    """Return what `after` keeps of `before`. Raises FormatError for statistics that do not fit the layer."""
    assert isinstance(after, Sparse)
    assert not isinstance(before, NeedsBase)
    seen, made = view(before), view(after)
    energy = seen.energy()
    inside = float(seen.at(after.places()).square().sum())
    kept = min(inside / energy, 1.0) if energy else 1.0
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    calibration = ctx.calibration
    if isinstance(calibration, Calibration):
        for split in SPLITS:
            if calibration.moment(key, split) is not None:
                lost[split], total[split] = _outputs(seen, made, calibration, key, split)
    return Kept(key, after.values.numel(), seen.m * seen.n, energy, kept, lost, total)


def _outputs(seen: View, made: View, calibration: Calibration, key: str, split: Split) -> tuple[float, float]:
    """Return the energies of the error and of dW at the outputs. Products are float32, their sums float64."""
    gram = calibration.gram(key, seen.n, split).float()
    found = [0.0, 0.0]
    for block in blocks(seen):
        dw = seen.rows(*block)
        for i, rows in enumerate((dw - made.rows(*block), dw)):
            through = rows * gram if gram.dim() == 1 else rows @ gram
            found[i] += float(torch.sum(through.double() * rows.double()))
    weight = calibration.sensitivity(key)
    return max(found[0], 0.0) * weight, max(found[1], 0.0) * weight
