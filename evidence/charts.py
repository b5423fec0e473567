"""Small charts as inline SVG, drawn for the width of a phone; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360  # units; the page shows them one to one on a phone, a little larger on a screen
_LABEL = 132  # room for names at the left of bars and heat maps
_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line: its name, its points in order of x, and whether the points are marked."""

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Return horizontal bars from (name, value from 0, text of the value)."""
    top = max((v for _, v, _ in rows), default=0.0) or 1.0
    room = WIDTH - _LABEL - 72
    out = []
    for i, (name, value, said) in enumerate(rows):
        y = 6 + 22 * i
        out.append(f'<text x="{_LABEL - 6}" y="{y + 12}" class="end">{_short(name, 20)}</text>'
                   f'<rect x="{_LABEL}" y="{y}" width="{max(room * value / top, 1):.1f}" height="16" rx="2" class="c0">'
                   f"<title>{escape(name)}: {escape(said)}</title></rect>"
                   f'<text x="{_LABEL + room * value / top + 5:.1f}" y="{y + 12}" class="dim">{escape(said)}</text>')
    return _svg(22 * len(rows) + 10, out)


def heat(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]], digits: int = 3) -> str:
    """Return a grid of rows by columns, darker for larger values; an empty cell for None, a scale below."""
    known = [v for row in cells for v in row if v is not None]
    top = max(known, default=0.0) or 1.0
    wide = (WIDTH - _LABEL - 4) / max(len(columns), 1)
    tall = 18
    out = []
    for i, (name, values) in enumerate(zip(rows, cells, strict=True)):
        y = tall * i
        out.append(f'<text x="{_LABEL - 6}" y="{y + 13}" class="end">{_short(name, 20)}</text>')
        for j, v in enumerate(values):
            if v is None:
                continue
            out.append(f'<rect x="{_LABEL + wide * j:.2f}" y="{y + 1}" width="{max(wide - 0.6, 0.6):.2f}" '
                       f'height="{tall - 2}" class="c0" fill-opacity="{0.06 + 0.94 * v / top:.3f}">'
                       f"<title>{escape(name)} {escape(columns[j])}: {v:.{digits}g}</title></rect>")
    foot = tall * len(rows) + 14
    every = max(1, math.ceil(len(columns) / 8))
    for j in range(0, len(columns), every):
        out.append(f'<text x="{_LABEL + wide * (j + 0.5):.1f}" y="{foot}" class="mid dim">{escape(columns[j])}</text>')
    for k in range(5):
        out.append(f'<rect x="{_LABEL + 14 * k}" y="{foot + 8}" width="13" height="9" class="c0" '
                   f'fill-opacity="{0.06 + 0.94 * k / 4:.3f}"/>')
    out.append(f'<text x="{_LABEL - 6}" y="{foot + 16}" class="end dim">0</text>'
               f'<text x="{_LABEL + 76}" y="{foot + 16}" class="dim">{top:.{digits}g}</text>')
    return _svg(foot + 22, out)


def lines(series: Sequence[Series], x_name: str, y_name: str, log_x: bool = False, log_y: bool = False) -> str:
    """Return lines over a common frame with a legend below; points that a logarithm cannot show are left out."""
    shown = [Series(s.name, [(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)
                             and (x > 0 or not log_x) and (y > 0 or not log_y)], s.marked) for s in series]
    shown = [s for s in shown if s.points]
    if not shown:
        return ""
    xs, ys = ([p[k] for s in shown for p in s.points] for k in (0, 1))
    left, right, top, bottom = 46, WIDTH - 10, 22, 196
    across, ticks_x = _axis(xs, left, right, log_x)
    up, ticks_y = _axis(ys, bottom, top, log_y)
    out = [f'<line x1="{left}" y1="{up(t):.1f}" x2="{right}" y2="{up(t):.1f}" class="grid"/>'
           f'<text x="{left - 5}" y="{up(t) + 4:.1f}" class="end dim">{_tick(t)}</text>' for t in ticks_y]
    out += [f'<text x="{across(t):.1f}" y="{bottom + 15}" class="mid dim">{_tick(t)}</text>' for t in ticks_x]
    for i, s in enumerate(shown):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in s.points)
        out.append(f'<polyline points="{path}" class="line s{i % _COLOURS}"><title>{escape(s.name)}</title></polyline>')
        if s.marked or len(s.points) == 1:
            out += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2" class="c{i % _COLOURS}">'
                    f"<title>{escape(s.name)}: {x:.4g}, {y:.4g}</title></circle>" for x, y in s.points]
    out.append(f'<text x="{(left + right) / 2:.0f}" y="{bottom + 31}" class="mid">{escape(x_name)}</text>'
               f'<text x="4" y="11">{escape(y_name)}</text>')
    y = bottom + 48
    for i, s in enumerate(shown if len(shown) > 1 else []):
        x = 8 + (i % 2) * (WIDTH // 2)
        out.append(f'<rect x="{x}" y="{y - 8}" width="12" height="4" class="c{i % _COLOURS}"/>'
                   f'<text x="{x + 17}" y="{y - 2}">{_short(s.name, 24)}</text>')
        y += 17 if i % 2 else 0
    return _svg(y + (8 if len(shown) % 2 else -9) if len(shown) > 1 else bottom + 38, out)


def ranges(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Return values with their intervals, from (name, value, low, high): a dot on a line, one a row."""
    ends = [v for _, value, low, high in rows for v in (value, low, high) if math.isfinite(v)]
    if not ends:
        return ""
    at, ticks = _axis(ends, _LABEL + 6, WIDTH - 14, False)
    foot = 22 * len(rows) + 8
    out = [f'<line x1="{at(t):.1f}" y1="2" x2="{at(t):.1f}" y2="{foot - 4}" class="grid"/>'
           f'<text x="{at(t):.1f}" y="{foot + 10}" class="mid dim">{_tick(t)}</text>' for t in ticks]
    for i, (name, value, low, high) in enumerate(rows):
        y = 14 + 22 * i
        out.append(f'<text x="{_LABEL - 6}" y="{y + 4}" class="end">{_short(name, 20)}</text>'
                   f'<line x1="{at(low):.1f}" y1="{y}" x2="{at(high):.1f}" y2="{y}" class="line s0"/>'
                   f'<circle cx="{at(value):.1f}" cy="{y}" r="4" class="c0"><title>{escape(name)}: {value:.4g} '
                   f"({low:.4g} to {high:.4g})</title></circle>")
    return _svg(foot + 16, out)


def _axis(values: Sequence[float], start: float, end: float, log: bool
          ) -> tuple[Callable[[float], float], list[float]]:
    """Return (value -> position, ticks) for an axis that holds `values`."""
    low, high = min(values), max(values)
    if log:
        first, last = math.log10(low), math.log10(high)
        first, last = (first - 0.15, last + 0.15) if last - first < 1e-9 else (first, last)
        span = last - first
        steps = (1, 2, 5) if span < 2.2 else (1,)
        ticks = [m * 10.0**e for e in range(math.floor(first), math.ceil(last) + 1) for m in steps]
        ticks = [t for t in ticks if first - 1e-9 <= math.log10(t) <= last + 1e-9] or [low, high]
        if len(ticks) > 6:
            ticks = ticks[:: math.ceil(len(ticks) / 6)]
        return (lambda v: start + (end - start) * (math.log10(v) - first) / span), ticks
    pad = (high - low) * 0.04 or abs(high) * 0.05 or 0.5
    low, high = (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    ticks = [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return (lambda v: start + (end - start) * (v - low) / (high - low)), ticks


def _tick(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _short(name: str, most: int) -> str:
    """Return the end of a name, which tells modules apart, escaped."""
    return escape(name if len(name) <= most else "…" + name[-(most - 1) :])


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
