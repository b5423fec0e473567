"""adaptc eval: what adapters are worth on the user's own data."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import evaluating, example, reading, speaking
from adaptc.cli.render import Block, Facts, Notes, Table, Voice, number
from adaptc.errors import UsageError

if TYPE_CHECKING:
    from adaptc.evidence.bootstrap import Estimate
    from adaptc.evidence.evaluate import Settings

_DEFAULT = {"lm": ("perplexity", "kl", "agreement"), "classify": ("accuracy", "nll", "kl", "agreement", "ece"),
            "choice": ("accuracy", "accuracy_normed", "kl", "agreement", "ece")}
_COLUMNS = ("adapter", "bytes", "metric", "value", "low", "high", "difference", "difference_low", "difference_high",
            "distinguishable")


@click.command("eval", short_help="Measure adapters on data.",
               epilog=example("adaptc eval --base minilm/ full/ small/ --data test.tsv"))
@click.argument("sources", metavar="ADAPTER...", nargs=-1, required=True)
@click.option("--reference", metavar="ADAPTER", help="Compare with this one of them; the first by default.")
@click.option("--head-from", type=click.Path(), metavar="ADAPTER", help="classify: everyone gets its classifier.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Show this metric; repeatable, or `all`.")
@click.option("--csv", "csv_out", type=click.Path(), metavar="FILE", help="Also write every metric as a table.")
@click.option("--force", is_flag=True, help="Replace an existing --csv file.")
@evaluating
@reading
@speaking
def command(sources: tuple[str, ...], base: str, data: str, reference: str | None, head_from: str | None,
            metrics: tuple[str, ...], csv_out: str | None, force: bool, alpha: float | None, dialect: str | None,
            bootstrap: int, seed: int, voice: Voice, **given: Any) -> None:
    """Run the base model with each ADAPTER over data, and compare with the first.

    ADAPTER is a file, a folder or a Hub id in any dialect, or `none` for the base alone. Brackets hold 95% bootstrap
    intervals over rows or windows; differences are paired. KL and agreement need no labels.
    """
    from adaptc.cli.reading import open_adapter
    from adaptc.evidence.bootstrap import estimate
    from adaptc.evidence.evaluate import evaluate
    from adaptc.evidence.metrics import METRICS, available
    from adaptc.evidence.ready import BASE, ready
    from adaptc.formats.atomic import check

    reference = reference or sources[0]
    _check(sources, reference, metrics, METRICS)
    if csv_out is not None:
        check(Path(csv_out), force=force)
    opened = {s: open_adapter(s, alpha, dialect) for s in sources if s != "none"}
    donor = open_adapter(head_from, alpha, dialect).adapter if head_from else None
    rows, settings = asked_for(data, given)
    adapters = {s: opened[s].adapter if s in opened else BASE for s in sources}
    loaded, adapters = ready(base, settings.task, adapters, donor)
    with voice.progress() as progress:
        observed = evaluate(loaded, rows, adapters, reference if len(sources) > 1 else None, settings, progress)
    names = available(observed[reference])
    if not names:
        raise UsageError(f"{Path(data).name} has no labels, and there is no second adapter to compare with",
                         hint="`none` compares with the base model")
    found = {s: estimate(names, o, None if s == reference else observed[reference], resamples=bootstrap, seed=seed)
             for s, o in observed.items()}
    sizes = {s: opened[s].nbytes if s in opened else 0 for s in sources}
    shown = names if "all" in metrics else [n for n in metrics or _DEFAULT[settings.task] if n in names]
    absent = [n for n in metrics if n not in (*names, "all")]
    if absent:
        raise UsageError(f"{absent[0]} cannot be measured here", hint=f"measured: {', '.join(names)}")
    units = observed[reference].units
    if csv_out is not None:
        _write_csv(Path(csv_out), found, sizes, force)
    table = {"base": base, "data": data, "reference": reference, "units": units, "bootstrap": bootstrap, "seed": seed,
             "settings": asdict(settings),
             "adapters": [{"name": s, "bytes": sizes[s], "metrics": [e.data() for e in found[s]]} for s in sources]}
    last = [f"wrote {csv_out}"] if csv_out is not None else []
    voice.show(table, *_blocks(found, sizes, reference, shown, settings, units, base, data), *last)


def asked_for(data: str, given: Mapping[str, Any]) -> tuple[list[Any], Settings]:
    """Return the rows of a data file and the settings that the options give, the task told by the rows if not said."""
    from adaptc.evidence.evaluate import Settings, task_of
    from adaptc.evidence.rows import read_rows

    rows = read_rows(data)
    kept = {k: v for k, v in given.items() if k in ("window", "max_windows", "max_length", "batch")}
    return rows, Settings(given["task"] or task_of(rows), **kept)


def _check(sources: Sequence[str], reference: str, metrics: Sequence[str], known: Mapping[str, Any]) -> None:
    if len(set(sources)) < len(sources):
        raise UsageError("an adapter is named twice")
    if reference not in sources:
        raise UsageError(f"reference {reference} is none of the {len(sources)} adapters", hint=", ".join(sources))
    for name in metrics:
        if name not in known and name != "all":
            raise UsageError(f"metric {name} is not known", hint=f"known: {', '.join(known)}, all")


def _blocks(found: Mapping[str, list[Estimate]], sizes: Mapping[str, int], reference: str, shown: Sequence[str],
            settings: Settings, units: int, base: str, data: str) -> list[Block]:
    unit = f"windows of {settings.window} tokens" if settings.task == "lm" else "rows"
    facts = Facts([("base", base), ("data", f"{data}: {units} {unit}, task {settings.task}"), ("reference", reference)])
    rows, apart = [], []
    for name, estimates in found.items():
        by = {e.metric: e for e in estimates}
        rows.append((name, print_nbytes(sizes[name]) if sizes[name] else "-",
                     *(_cell(by[m]) if m in by else "-" for m in shown)))
        for e in (by[m] for m in shown if m in by and by[m].difference is not None):
            apart.append((name, e.metric, _signed(e.difference), _between(e.difference_low, e.difference_high, True),
                          verdict(e)))
    few = [f"{units} {unit} are few for an interval"] if units < 20 else []
    return [facts, Table(("adapter", ">bytes", *(f">{m}" for m in shown)), rows),
            Table(("against the reference", "metric", ">difference", ">95% interval", "verdict"), apart), Notes(few)]


def verdict(e: Estimate) -> str:
    """Return what a paired difference amounts to: better, worse, or not distinguishable."""
    from adaptc.evidence.metrics import METRICS

    if e.distinguishable is None or e.difference is None:
        return "-"
    if not e.distinguishable:
        return "not distinguishable"
    return "better" if (e.difference > 0) == METRICS[e.metric].more_is_better else "worse"


def _cell(e: Estimate) -> str:
    return f"{number(e.value, 5)} {_between(e.low, e.high)}".strip()


def _between(low: float | None, high: float | None, signed: bool = False) -> str:
    if low is None or high is None:
        return ""
    return f"[{_signed(low)}, {_signed(high)}]" if signed else f"[{number(low)}, {number(high)}]"


def _signed(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:+.3g}"


def _write_csv(path: Path, found: Mapping[str, list[Estimate]], sizes: Mapping[str, int], force: bool) -> None:
    from adaptc.formats.atomic import staged

    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, estimates in found.items():
        for e in estimates:
            writer.writerow({"adapter": name, "bytes": sizes[name], **e.data()})
    with staged(path, force=force) as temp:
        temp.write_text(text.getvalue(), encoding="utf8")
