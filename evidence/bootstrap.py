"""Percentile bootstrap over units: intervals of metrics, and of paired differences to a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import UsageError
from adaptc.evidence.metrics import METRICS, Observed, value

_BLOCK = 2**22  # unit weights held at once: 32 MiB
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95% interval and, against a reference, the paired difference with its own.

    Intervals are None for a single unit. `distinguishable`: the interval of the difference does not contain 0.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None

    @property
    def distinguishable(self) -> bool | None:
        """Whether chance in the choice of units alone would rarely make the difference; None where unknown."""
        if self.difference_low is None or self.difference_high is None:
            return None
        return not self.difference_low <= 0.0 <= self.difference_high

    def data(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"distinguishable": self.distinguishable}


def draws(units: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield blocks (b, units) float64: how often each unit is drawn when `units` are drawn with replacement.

    The same arguments always give the same draws, which is what pairs two adapters.
    """
    random = torch.Generator().manual_seed(seed)
    step = max(1, min(resamples, _BLOCK // max(units, 1)))
    for at in range(0, resamples, step):
        drawn = torch.randint(units, (min(step, resamples - at), units), generator=random)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64)
                                                                         .expand(drawn.shape))


def estimate(names: Sequence[str], observed: Observed, reference: Observed | None = None, *, resamples: int = 1000,
             seed: int = 0) -> list[Estimate]:
    """Return every named metric of `observed`, with intervals and, where given, differences to `reference`.

    value(adapter) - value(reference) is recomputed on each resample with the same units for both (paired), and the
    interval holds the middle 95% of it. Efron and Tibshirani 1993, percentile method; when not to trust it: fewer than
    about 20 units, and calibration errors, which are biased upwards on few rows and more so on resamples.
    Raises UsageError for resamples < 0 or observations of different units.
    """
    if resamples < 0:
        raise UsageError(f"bootstrap is {resamples}, must be 0 or more")
    if reference is not None and reference.units != observed.units:
        raise UsageError(f"{observed.units} units cannot be paired with {reference.units}")
    known = {n: reference is not None and not METRICS[n].relative and METRICS[n].needs in
             {*reference.sums, *reference.bins} for n in names}
    own: dict[str, list[Tensor]] = {n: [] for n in names}
    apart: dict[str, list[Tensor]] = {n: [] for n in names}
    if observed.units > 1:
        for weights in draws(observed.units, resamples, seed):
            for n in names:
                own[n].append(METRICS[n].values(observed, weights))
                if known[n] and reference is not None:
                    apart[n].append(own[n][-1] - METRICS[n].values(reference, weights))
    out = []
    for n in names:
        point = value(n, observed)
        gap = point - value(n, reference) if known[n] and reference is not None else None
        out.append(Estimate(n, point, *_interval(own[n]), gap, *_interval(apart[n])))
    return out


def _interval(values: Sequence[Tensor]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(torch.cat(list(values)), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(low), float(high)
