"""Figures of merit from what a model said: every one a function of weighted units, so that it can be resampled.

A unit is a row, or a window of text. `Observed` keeps sums a unit, never outputs; a metric maps unit weights (how often
each unit was drawn) to its value, so one matrix product gives a thousand bootstrap values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True, eq=False)
class Observed:
    """Sums of one adapter's outputs over each of n units, all float64.

    `sums`: name -> (n,): "count" (tokens or 1) and, where known, "loss" (the window's mean), "nll", "right",
    "right_normed", "kl", "agree". `bins`: "confidence" (equal width) and "adaptive" (equal mass), each
    (groups, n, BINS, 3): the number of predictions, of right ones, and the sum of confidences in each bin.
    """

    sums: Mapping[str, Tensor]
    bins: Mapping[str, Tensor]

    @property
    def units(self) -> int:
        """Rows or windows."""
        return len(self.sums["count"])


def equal_width(confidence: Tensor, right: Tensor, unit: Tensor, units: int) -> Tensor:
    """Return (1, units, BINS, 3) for predictions with confidence (p,), correctness (p,) and unit (p,).

    Bin i holds confidences in (i/BINS, (i+1)/BINS], the first one 0 too.
    """
    at = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return _binned(at, confidence, right, unit, units)[None]


def equal_mass(confidence: Tensor, right: Tensor, unit: Tensor, units: int) -> Tensor:
    """Return (groups, units, BINS, 3) for confidences (p, groups), each group in bins of equally many predictions.

    `right` is (p, groups). Bins are those of all predictions, ranked stably, and stay when units are resampled.
    """
    out = []
    for one, true in zip(confidence.T, right.T, strict=True):
        rank = torch.empty_like(unit)
        rank[one.sort(stable=True).indices] = torch.arange(len(one))
        out.append(_binned(rank * BINS // max(len(one), 1), one, true, unit, units))
    return torch.stack(out)


def _binned(at: Tensor, confidence: Tensor, right: Tensor, unit: Tensor, units: int) -> Tensor:
    values = torch.stack([torch.ones_like(confidence), right.double(), confidence], 1)  # (p, 3)
    flat = torch.zeros(units * BINS, 3, dtype=torch.float64).index_add_(0, unit * BINS + at, values.double())
    return flat.reshape(units, BINS, 3)


def _gaps(observed: Observed, kind: str, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return |accuracy - confidence| (draws, groups, BINS) and the number of predictions in each bin, of a kind."""
    table = observed.bins[kind]
    groups, units = table.shape[:2]
    sums = weights @ table.permute(1, 0, 2, 3).reshape(units, -1)
    count, right, confidence = sums.reshape(-1, groups, BINS, 3).unbind(-1)
    safe = count.clamp(min=1.0)
    return (right / safe - confidence / safe).abs(), count


def _ratio(name: str) -> Callable[[Observed, Tensor], Tensor]:
    return lambda o, w: (w @ o.sums[name]) / (w @ o.sums["count"])


def _perplexity(observed: Observed, weights: Tensor) -> Tensor:
    return ((weights @ observed.sums["loss"]) / weights.sum(1)).exp()


def _ece(observed: Observed, weights: Tensor) -> Tensor:
    gap, count = _gaps(observed, "confidence", weights)
    return ((gap * count).sum(-1) / count.sum(-1)).mean(-1)


def _mce(observed: Observed, weights: Tensor) -> Tensor:
    gap, count = _gaps(observed, "confidence", weights)
    return torch.where(count > 0, gap, 0.0).amax((-1, -2))


def _ace(observed: Observed, weights: Tensor) -> Tensor:
    gap, count = _gaps(observed, "adaptive", weights)
    return ((gap * count).sum(-1) / count.sum(-1)).mean(-1)


@dataclass(frozen=True)
class Metric:
    """A metric: its formula in words, whether more is better, what it needs, and the function of unit weights."""

    name: str
    about: str
    more_is_better: bool
    needs: str  # the entry of sums or bins it is made of
    values: Callable[[Observed, Tensor], Tensor]  # weights (draws, units) float64 -> (draws,)
    relative: bool = False  # compares with the reference itself


METRICS: dict[str, Metric] = {m.name: m for m in (
    Metric("accuracy", "share of top-1 predictions that are the label", True, "right", _ratio("right")),
    Metric("accuracy_normed", "the same with log-probabilities divided by the UTF-8 bytes of each ending", True,
           "right_normed", _ratio("right_normed")),
    Metric("perplexity", "exp of the mean over windows of the mean loss of each window", False, "loss", _perplexity),
    Metric("nll", "mean negative log-likelihood of the label, in nats", False, "nll", _ratio("nll")),
    Metric("kl", "mean KL(reference || adapter) of the output distributions, in nats", False, "kl", _ratio("kl"), True),
    Metric("agreement", "share of top-1 predictions equal to the reference's", True, "agree", _ratio("agree"), True),
    Metric("ece", "mean |accuracy - confidence| over 15 bins of equal width, weighted by their predictions", False,
           "confidence", _ece),
    Metric("mce", "the largest |accuracy - confidence| of these bins", False, "confidence", _mce),
    Metric("ace", "as ece in 15 bins of equal mass, per class, mean over classes", False, "adaptive", _ace),
)}


def available(observed: Observed) -> list[str]:
    """Return the names of the metrics that these observations allow, in the order of METRICS."""
    have = {*observed.sums, *observed.bins}
    return [name for name, metric in METRICS.items() if metric.needs in have]


def value(name: str, observed: Observed) -> float:
    """Return one metric over all units."""
    return float(METRICS[name].values(observed, torch.ones(1, observed.units, dtype=torch.float64))[0])
