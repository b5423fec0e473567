"""Results of `adaptc sweep` and `adaptc eval` as sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptc.bytesize import print_nbytes
from adaptc.errors import FormatError
from adaptc.evidence.charts import Series, lines, ranges
from adaptc.evidence.curve import Point, front
from adaptc.evidence.metrics import METRICS
from adaptc.evidence.page import charts, figure, paragraph, section, table


def sweep(name: str, data: Mapping[str, Any]) -> str:
    """Return curves of every metric over bytes, with the front of files that no other beats."""
    try:
        points = [Point(**{k: p[k] for k in Point.__dataclass_fields__}) for p in data["points"]]
        metrics = [m for m in points[0].metrics if m in METRICS and all(m in p.metrics for p in points)]
        figures = [_curve(points, m) for m in metrics]
        rows = [(p.label, print_nbytes(p.nbytes), f"{p.error:.3g}", *(_said(p.metrics[m]) for m in metrics))
                for p in sorted(points, key=lambda p: p.nbytes)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise FormatError(f"{name} is no result of adaptc sweep ({type(e).__name__}: {e})") from e
    data_table = table(("file", ">bytes", ">error of ΔW", *(f">{m}" for m in metrics)), rows)
    return section(f"Sweep: {name}", charts(*figures), data_table)


def _curve(points: Sequence[Point], metric: str) -> str:
    best = front(points, metric)
    goals = list(dict.fromkeys(p.goal for p in points if p.goal != "source"))
    series = [Series(f"by {g}", sorted((float(p.nbytes), p.value(metric)) for p in points if p.goal == g), True)
              for g in goals]
    series += [Series("source", [(float(p.nbytes), p.value(metric))], True) for p in points if p.goal == "source"]
    series.append(Series("no other beats", [(float(p.nbytes), p.value(metric)) for p in best]))
    more = "more is better" if METRICS[metric].more_is_better else "less is better"
    rows = [(p.label, f"{p.nbytes:,}", _said(p.metrics[metric]), "yes" if p in best else "") for p in points]
    return figure(f"{metric} over bytes", more, lines(series, "bytes on disk", metric, log_x=True),
                  table(("file", ">bytes", f">{metric}", "on the front"), rows))


def evaluation(name: str, data: Mapping[str, Any]) -> str:
    """Return every metric of every adapter with its bootstrap interval, and what the differences amount to."""
    try:
        adapters = [(str(a["name"]), {str(e["metric"]): e for e in a["metrics"]}) for a in data["adapters"]]
        metrics = list(dict.fromkeys(m for _, held in adapters for m in held))
        figures, said = [], []
        for metric in metrics:
            rows = [(n, *_interval(held[metric])) for n, held in adapters if metric in held]
            cells = [(n, f"{v:.4g}", f"{low:.4g} to {high:.4g}") for n, v, low, high in rows]
            figures.append(figure(metric, "value and 95 % bootstrap interval", ranges(rows),
                                  table(("adapter", f">{metric}", "interval"), cells)))
            said += [(n, metric, f"{held[metric]['difference']:+.3g}", _verdict(metric, held[metric]))
                     for n, held in adapters if held.get(metric, {}).get("difference") is not None]
        about = f"{data['units']} rows or windows of {data['data']} on {data['base']}; reference {data['reference']}."
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(f"{name} is no result of adaptc sweep or adaptc eval ({type(e).__name__}: {e})") from e
    return section(f"Evaluation: {name}", paragraph(about), charts(*figures),
                   table(("adapter", "metric", ">difference", "against the reference"), said))


def _verdict(metric: str, estimate: Mapping[str, Any]) -> str:
    if not estimate.get("distinguishable"):
        return "not distinguishable"
    better = (estimate["difference"] > 0) == (metric in METRICS and METRICS[metric].more_is_better)
    return "better" if better else "worse"


def _interval(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    value = float(estimate["value"])
    low, high = estimate.get("low"), estimate.get("high")
    return value, value if low is None else float(low), value if high is None else float(high)


def _said(estimate: Mapping[str, Any]) -> str:
    return f"{float(estimate['value']):.4g}"
