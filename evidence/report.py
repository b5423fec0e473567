"""What adapters are and what was done to them, as one page: provenance, bytes, spectra, errors, curves, warnings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from adaptc import __version__
from adaptc.adapter import Adapter
from adaptc.bytesize import print_nbytes
from adaptc.difference import Difference, Gap
from adaptc.evidence.charts import Series, bars, heat, lines
from adaptc.evidence.page import charts, figure, page, paragraph, section, table, warnings
from adaptc.evidence.report_scores import evaluation, sweep
from adaptc.grouping import grouped, layer_type
from adaptc.lowrank import low_rank, plain
from adaptc.quant.baseline import sign_mean, truncation_nf4
from adaptc.quant.quantize import stored_nbytes
from adaptc.squeeze.inspection import Module

_MOST_LINES, _MOST_COLUMNS, _MOST_ROWS = 6, 64, 24


@dataclass(frozen=True)
class Subject:
    """One adapter of a report: what it is called, its files, its dialect and why, its modules as inspected.

    `difference` is how far it is from the original, None where there is none to compare with.
    """

    name: str
    files: Mapping[str, int]
    dialect: str
    adapter: Adapter
    modules: Sequence[Module]
    difference: Difference | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self.files.values())


def report(subjects: Sequence[Subject], measured: Sequence[tuple[str, Mapping[str, Any]]] = (),
           original: Subject | None = None) -> str:
    """Return the page about `subjects`, beside `original` where given, with the results of sweeps and evaluations.

    `measured` holds (name, JSON document) of `adaptc sweep` and `adaptc eval`. Raises FormatError for a document that
    is neither.
    """
    names = [s.name for s in subjects] + [name for name, _ in measured]
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    lead = f"Written by adaptc {__version__} from the files themselves; every error is measured, none estimated."
    parts = [_overview(subjects, original)]
    parts += [_subject(s, original) for s in subjects]
    parts += [sweep(name, data) if "points" in data else evaluation(name, data) for name, data in measured]
    return page(title, lead, parts)


def _overview(subjects: Sequence[Subject], original: Subject | None) -> str:
    everyone = [*([original] if original else []), *subjects]
    if len(everyone) < 2:
        return ""
    first = everyone[0]
    rows = [(s.name + (" (original)" if s is original else ""), print_nbytes(s.nbytes),
             f"{first.nbytes / s.nbytes:.3g}x", str(len(s.modules)),
             "-" if s.difference is None else f"{s.difference.error:.3g}") for s in everyone]
    size = bars([(s.name, float(s.nbytes), print_nbytes(s.nbytes)) for s in everyone])
    data = table(("adapter", ">bytes", ">smaller", ">modules", ">error of ΔW"), rows)
    error = bars([(s.name, s.difference.error, f"{s.difference.error:.3g}") for s in subjects if s.difference])
    return section("All of them", data, charts(
        figure("Bytes on disk", "every file of the adapter", size, data),
        figure("Relative error of ΔW", "‖ΔW − ΔŴ‖ / ‖ΔW‖ over all modules, against the original", error, data)))


def _subject(s: Subject, original: Subject | None) -> str:
    return section(s.name, _facts(s), warnings(_flags(s)), charts(
        _bytes(s), _spectra(s),
        _grid(s, "Effective rank", "exp of the entropy of the energies σ²; 1 is a single direction",
              {m.key: m.effective_rank for m in s.modules}),
        _errors(s), _baseline(s, original)), _history(s), _kinds(s))


def _facts(s: Subject) -> str:
    origin = s.adapter.origin
    carried = len({**s.adapter.replaced, **s.adapter.extra})
    facts = [("dialect", s.dialect), ("base model", origin.base_model or "not named"),
             ("fingerprint of the base", origin.fingerprint or "none"),
             ("files", ", ".join(f"{n} {print_nbytes(b)}" for n, b in s.files.items())),
             ("changed parameters", str(len(s.modules))), ("carried tensors", str(carried))]
    return table(("what", "it says"), facts)


def _history(s: Subject) -> str:
    rows = [(h.spec, h.version, print_nbytes(h.nbytes_before), print_nbytes(h.nbytes_after),
             "-" if h.error is None else f"{h.error:.3g}") for h in s.adapter.history]
    if not rows:
        return paragraph("No history: this file was not made by adaptc, or does not say.")
    return "<h3>History</h3>" + table(("pass", "version", ">bytes before", ">after", ">error of ΔW"), rows)


def _kinds(s: Subject) -> str:
    rows = []
    for name, some in grouped(s.modules).items():
        ranks = [m.rank for m in some if m.rank is not None]
        effective = [m.effective_rank for m in some if m.effective_rank is not None]
        rows.append((name, str(len(some)), "-" if not ranks else f"{min(ranks)} to {max(ranks)}",
                     print_nbytes(sum(m.nbytes for m in some)), f"{median(effective):.3g}" if effective else "-"))
    return "<h3>Modules</h3>" + table(("kind", ">count", ">rank", ">bytes", ">effective rank, median"), rows)


def _flags(s: Subject) -> list[str]:
    about: dict[str, list[str]] = {}
    for m in s.modules:
        for flag in m.flags:
            about.setdefault(flag, []).append(m.key)
    lines = [f"{len(keys)} of {len(s.modules)} modules: {flag} ({keys[0]}{' and others' if len(keys) > 1 else ''})"
             for flag, keys in about.items()]
    if s.difference is not None:
        lines += [f"{len(keys)} modules are only {where}: {keys[0]}" for keys, where in (
            (s.difference.only_a, "in the original"), (s.difference.only_b, "in this adapter")) if keys]
        lines += [f"{g.key}: {g.note or 'carried tensor differs'} (error {g.error:.3g})" for g in s.difference.carried
                  if g.error][:5]
    return lines


def _bytes(s: Subject) -> str:
    sizes = {name: sum(m.nbytes for m in some) for name, some in grouped(s.modules).items()}
    carried = sum(t.nbytes for t in {**s.adapter.replaced, **s.adapter.extra}.values())
    rest = s.nbytes - sum(sizes.values()) - carried
    sizes |= {name: n for name, n in (("carried tensors", carried), ("headers, configs", rest)) if n > 0}
    most = dict(sorted(sizes.items(), key=lambda kv: -kv[1])[:_MOST_ROWS])
    data = table(("part", ">bytes", ">share"), [(k, f"{n:,}", f"{100 * n / max(s.nbytes, 1):.1f} %")
                                                for k, n in sizes.items()])
    return figure("Bytes by kind of module", f"{print_nbytes(s.nbytes)} in all",
                  bars([(k, float(n), print_nbytes(n)) for k, n in most.items()]), data)


def _spectra(s: Subject) -> str:
    """Draw the median of sigma_i / sigma_1 over the modules of a kind, the kinds with the most energy."""
    held = {name: [m for m in some if m.spectrum and m.spectrum[0] > 0] for name, some in grouped(s.modules).items()}
    energy = {name: sum(m.energy or 0.0 for m in some) for name, some in held.items() if some}
    series, rows = [], []
    for name in sorted(energy, key=lambda k: -energy[k]):
        spectra = [m.spectrum for m in held[name] if m.spectrum]
        middle = [median(x[i] / x[0] if i < len(x) else 0.0 for x in spectra) for i in range(max(map(len, spectra)))]
        series.append(Series(name, [(i + 1.0, v) for i, v in enumerate(middle)]))
        rows.append((name, str(len(spectra)), ", ".join(f"{v:.3g}" for v in middle[:16])))
    return figure("Spectra", "median of σᵢ/σ₁ over the modules of a kind", lines(series[:_MOST_LINES], "direction i",
                  "σᵢ/σ₁", log_y=True), table(("kind", ">modules", "σᵢ/σ₁, the first 16"), rows))


def _errors(s: Subject) -> str:
    if s.difference is None:
        return ""
    return _grid(s, "Relative error of ΔW", f"module by module; {s.difference.error:.3g} in all",
                 {g.key: g.error for g in s.difference.modules if g.energy})


def _grid(s: Subject, title: str, caption: str, values: Mapping[str, float | None]) -> str:
    """Draw one number a module as kinds by layers, or by the largest where the names make no small grid."""
    known = {k: v for k, v in values.items() if v is not None}
    if not known:
        return ""
    kinds = list(dict.fromkeys(map(layer_type, known)))
    layers = sorted({_layer(k) for k in known}, key=_natural)
    data = table(("parameter", ">value"), [(k, f"{v:.4g}") for k, v in known.items()])
    if not 1 < len(layers) <= _MOST_COLUMNS or len(kinds) > _MOST_ROWS:
        most = sorted(known.items(), key=lambda kv: -kv[1])[:_MOST_ROWS]
        return figure(title, f"{caption}; the {len(most)} largest", bars([(k, v, f"{v:.3g}") for k, v in most]), data)
    place = {(layer_type(k), _layer(k)): v for k, v in known.items()}
    cells = [[place.get((kind, layer)) for layer in layers] for kind in kinds]
    return figure(title, f"{caption}; kinds by layers", heat(kinds, layers, cells), data)


def _baseline(s: Subject, original: Subject | None) -> str:
    """Draw what truncation + NF4 makes of the original in the bytes of these deltas, and plain sign x mean."""
    if original is None or s.difference is None or set(s.adapter.deltas) != set(original.adapter.deltas):
        return ""
    factors = {}
    for key, delta in original.adapter.deltas.items():
        pair = low_rank(plain(delta))  # type: ignore[arg-type]
        if pair is None or len(pair.b.shape) != 2:
            return ""
        factors[key] = (*pair.factors(), 1.0)
    spent = stored_nbytes(s.adapter, list(s.adapter.deltas))
    nf4, naive = truncation_nf4(factors, spent), sign_mean(factors)
    rows = [("this adapter", s.difference.error, spent), ("truncation + NF4", nf4.error, nf4.nbytes),
            ("sign × mean", naive.error, naive.nbytes)]
    data = table(("scheme", ">error of ΔW", ">bytes of codes"), [(n, f"{e:.4g}", f"{b:,}") for n, e, b in rows])
    return figure("Against the trivial schemes", f"truncation + NF4 in the same {print_nbytes(spent)} of codes; "
                  "sign × mean takes what it takes", bars([(n, e, f"{e:.3g}") for n, e, _ in rows]), data)


def _layer(key: str) -> str:
    """Return the numbers in a parameter name, "3" or "0.1.0"; "-" without any."""
    return ".".join(p for p in key.split(".") if p.isdigit()) or "-"


_natural: Callable[[str], tuple[int, ...]] = lambda text: tuple(map(int, re.findall(r"\d+", text)))


__all__ = ["Gap", "Subject", "report"]
