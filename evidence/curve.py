"""What a set of measured points says together: the Pareto front, the area under a curve of ranks, a bound to meet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.errors import UsageError
from adaptc.evidence.metrics import METRICS


@dataclass(frozen=True)
class Point:
    """One file: how it was made, its bytes, the error of dW, and every metric as the JSON of an Estimate."""

    label: str
    spec: str
    goal: str  # "source", "rank", "bits" or "size"
    setting: float | None
    nbytes: int
    error: float
    metrics: Mapping[str, Mapping[str, Any]]

    def value(self, metric: str) -> float:
        """Return a metric's value. Raises UsageError where it was not measured."""
        if metric not in self.metrics:
            raise UsageError(f"metric {metric} was not measured", hint=f"measured: {', '.join(self.metrics)}")
        return float(self.metrics[metric]["value"])


def front(points: Sequence[Point], metric: str) -> list[Point]:
    """Return the points that no other beats: fewer bytes at no worse `metric`, or a better metric at no more bytes."""
    sign = -1.0 if METRICS[metric].more_is_better else 1.0
    best, out = math.inf, []
    for p in sorted(points, key=lambda p: (p.nbytes, sign * p.value(metric))):
        if sign * p.value(metric) < best:
            best = sign * p.value(metric)
            out.append(p)
    return out


def aurac(ranks: Sequence[float], accuracies: Sequence[float], log: bool = True) -> float:
    """Return the area under the rank-accuracy curve, divided by the width of the range of ranks.

    sum_i (x_{i+1} - x_i) (a_i + a_{i+1}) / 2 / (x_n - x_1), x = log2 rank (or rank, `log` False): the mean accuracy
    over the range, in the unit of accuracy. One rank gives its accuracy. MatryoshkaLoRA, arXiv 2605.07850, which
    uses both. Raises UsageError without points or for a rank twice.
    """
    pairs = sorted(zip(ranks, accuracies, strict=True))
    if not pairs or len({r for r, _ in pairs}) < len(pairs):
        raise UsageError(f"{len(pairs)} points make no curve of ranks")
    x = [math.log2(r) if log else float(r) for r, _ in pairs]
    a = [acc for _, acc in pairs]
    if len(pairs) == 1:
        return a[0]
    area = sum((x[i + 1] - x[i]) * (a[i] + a[i + 1]) / 2 for i in range(len(x) - 1))
    return area / (x[-1] - x[0])


_BOUND = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Bound:
    """A condition on a point: `kl<0.01`, `perplexity<=25`, or against the source `accuracy_drop<0.003`."""

    metric: str
    relation: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Return the bound that `text` writes. Raises UsageError for what is none."""
        found = _BOUND.fullmatch(text)
        if found is None:
            raise UsageError(f"{text!r} is no bound", hint='such as "kl<0.01", "accuracy_drop<=0.003", "perplexity<25"')
        metric, relation, limit = found.groups()
        plain = metric.removesuffix("_drop").removesuffix("_rise")
        if plain not in METRICS or (plain != metric and METRICS[plain].relative):
            raise UsageError(f"metric {metric} is not known", hint=f"known: {', '.join(METRICS)}, and _drop or _rise "
                                                                   f"after those that do not compare already")
        try:
            return cls(metric, relation, float(limit))
        except ValueError as e:
            raise UsageError(f"{limit!r} is no number") from e

    def of(self, point: Point) -> float:
        """Return the figure of `point` that is bounded."""
        for suffix, sign in (("_drop", -1.0), ("_rise", 1.0)):
            if self.metric.endswith(suffix):
                plain = self.metric.removesuffix(suffix)
                point.value(plain)
                return sign * float(point.metrics[plain]["difference"] or 0.0)
        return point.value(self.metric)

    def met(self, point: Point) -> bool:
        """Return whether `point` keeps the bound."""
        value = self.of(point)
        return {"<": value < self.limit, "<=": value <= self.limit, ">": value > self.limit,
                ">=": value >= self.limit}[self.relation]

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.limit:g}"
