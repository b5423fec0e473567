"""adaptc sweep: quality against bytes, and the smallest file that is good enough."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes, read_nbytes
from adaptc.cli.eval import asked_for, verdict
from adaptc.cli.options import evaluating, example, input_argument, reading, speaking
from adaptc.cli.render import Block, Facts, Notes, Table, Voice, number
from adaptc.errors import UsageError

if TYPE_CHECKING:
    from adaptc.cli.reading import Opened
    from adaptc.evidence.curve import Bound, Point
    from adaptc.evidence.sweep import Bench, Recipe

_RANKS, _BITS = "1,2,4,8,16", "0.25,0.5,1,2,4"


@click.command("sweep", short_help="Measure quality against bytes.",
               epilog=example('adaptc sweep adapter/ --base minilm/ --data test.tsv --until "kl<0.01"'))
@input_argument()
@click.option("-o", "--output", type=click.Path(), metavar="OUT",
              help="Where the measurements go, .json or .csv; beside IN by default (in.sweep.json).")
@click.option("--ranks", metavar="N,N,...", help=f"Truncations; {_RANKS} where nothing is asked for.")
@click.option("--bits", metavar="B,B,...", help=f"Quantizations; {_BITS} where nothing is asked for.")
@click.option("--sizes", metavar="S,S,...", help="Quantizations to whole files, as 40KB, or 1/64 of IN in float32.")
@click.option("--until", metavar="BOUND", help='Find the smallest file with, as "kl<0.01", "accuracy_drop<=0.003".')
@click.option("--by", type=click.Choice(["bits", "rank"]), default="bits", show_default=True,
              help="--until: what to search over.")
@click.option("--save", type=click.Path(), metavar="FILE", help="--until: where that file goes; beside IN by default.")
@click.option("--metric", metavar="NAME", help="Quality for the Pareto front; accuracy, perplexity or kl by default.")
@click.option("--without-head", is_flag=True, help="Count and write the deltas alone, measure with the head of IN.")
@click.option("--head-from", type=click.Path(), metavar="ADAPTER", help="classify: everyone gets its classifier.")
@click.option("--cache", type=click.Path(), metavar="DIR", help="Measured points; beside OUT by default.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@click.option("--force", is_flag=True, help="Replace existing outputs (never an input).")
@evaluating
@reading
@speaking
def command(source: str, output: str | None, base: str, data: str, ranks: str | None, bits: str | None,
            sizes: str | None, until: str | None, by: str, save: str | None, metric: str | None, without_head: bool,
            head_from: str | None, cache: str | None, jobs: int, force: bool, alpha: float | None,
            dialect: str | None, bootstrap: int, seed: int, voice: Voice, **given: Any) -> None:
    """Compress IN in many ways, measure each on data beside IN itself, and show what a byte buys.

    Points are made as by `adaptc compress --rank` and `adaptc quantize --bits/--size`, bytes are those of the files
    these write. Every point is remembered by content: a second run, or one after a kill, measures only what is new.
    """
    from adaptc.cli.reading import about, open_adapter
    from adaptc.evidence.curve import Bound, front
    from adaptc.evidence.metrics import METRICS
    from adaptc.evidence.sweep import SOURCE, rank_of_all
    from adaptc.formats.atomic import check

    bound = Bound.parse(until) if until is not None else None
    if metric is not None and metric not in METRICS:
        raise UsageError(f"metric {metric} is not known", hint=f"known: {', '.join(METRICS)}")
    opened = open_adapter(source, alpha, dialect)
    out = Path(output) if output is not None else _beside(opened, ".sweep.json")
    if out.suffix not in (".json", ".csv"):
        raise UsageError(f"{out} is no table that can be written", hint="names end in .json or .csv")
    check(out, force=force, inputs=opened.inputs)
    donor = open_adapter(head_from, alpha, dialect).adapter if head_from else opened.adapter if without_head else None
    rows, settings = asked_for(data, given)
    bench = _bench(opened, donor, base, data, rows, settings, without_head, Path(cache or f"{out}.cache"), alpha)
    bench.bootstrap, bench.seed, bench.jobs = bootstrap, seed, jobs
    most = rank_of_all(bench.source)
    recipes, notes = _recipes(bench, ranks, bits, sizes, bound is not None, most)
    if bound is not None:
        saved = _saved(opened, bench, bound, by, save, force)
    with voice.progress() as progress, about(source):
        points = bench.points([SOURCE, *recipes], progress)
        quality = metric or next(m for m in ("perplexity", "accuracy", "kl") if m in points[0].metrics)
        on_front = {p.spec for p in front(points, quality)}
        tried = bench.search(bound, by, max(most, 1), progress) if bound is not None else []
    best = min((p for p in [*points[1:], *tried] if bound and bound.met(p)), key=lambda p: p.nbytes, default=None)
    table = _data(opened, base, data, bench, points, on_front, quality, most)
    if bound is not None and best is not None:
        from adaptc.formats import save as write

        fmt = bench.format_of(best.spec)
        write(bench.make(best.spec).adapter, saved, dialect=fmt.id, force=force, allow_loss=True, inputs=opened.inputs)
        table["until"] = {"bound": str(bound), "file": str(saved), "value": bound.of(best), "point": asdict(best),
                          "tried": [asdict(p) for p in tried]}
        notes.append(f"{bound}: {best.label} is the smallest of {len(tried)} tried, {bound.of(best):.4g} in "
                     f"{best.nbytes:,} bytes, wrote {saved}")
    _write(out, table, force)
    if bench.reused:
        notes.append(f"{bench.reused} of {len(points) + len(tried)} points were measured before ({bench.cache.folder})")
    voice.show(table, *_blocks(table, points, tried, on_front, quality, notes), f"wrote {out}")


def _bench(opened: Opened, donor: Any, base: str, data: str, rows: Sequence[Any], settings: Any, bare: bool,
           cache: Path, alpha: float | None) -> Bench:
    """Return the bench, with digests of everything that a measurement depends on."""
    from adaptc.evidence.cache import Cache, digest_files, digest_model, digest_tensors
    from adaptc.evidence.sweep import Bench, nbytes_of, without_head
    from adaptc.formats import writer

    source = without_head(opened.adapter) if bare else opened.adapter
    nbytes = nbytes_of(writer(source, None), source) if bare else opened.nbytes
    folder = opened.source.file.parent
    files = [p for name in opened.files if (p := folder / name).is_file()] or [opened.source.file]
    local = Path(base)
    identity = {"adapter": digest_files(files), "alpha": alpha, "dialect": opened.format.id, "head": not bare,
                "donor": digest_tensors(donor.replaced) if donor is not None else None,
                "base": digest_model(local) if local.exists() else f"hub:{base}", "data": digest_files([Path(data)])}
    return Bench(base, source, nbytes, donor, rows, settings, Cache(cache), identity)


def _recipes(bench: Bench, ranks: str | None, bits: str | None, sizes: str | None, searching: bool, most: int
             ) -> tuple[list[Recipe], list[str]]:
    """Return what to make, and notes on what is left out."""
    from adaptc.evidence.sweep import by_bits, by_rank, by_size, float32_nbytes

    if not searching and ranks is None and bits is None and sizes is None:
        ranks, bits = _RANKS, _BITS
    asked = [int(v) for v in _numbers("ranks", ranks, whole=True)]
    kept = [r for r in asked if r < most]
    notes = [f"ranks of {most} and more would change nothing"] if len(kept) < len(asked) else []
    full = float32_nbytes(bench.source)
    recipes = [by_rank(r) for r in kept] + [by_bits(b) for b in _numbers("bits", bits)]
    for text in filter(None, (sizes or "").split(",")):
        over, slash, under = text.partition("/")
        if slash and not (over.strip().isdigit() and under.strip().isdigit() and int(under)):
            raise UsageError(f"size {text!r} is no fraction", hint="such as 1/64")
        nbytes = full * int(over) // int(under) if slash else read_nbytes(text)
        recipes.append(by_size(text.strip(), nbytes))
    if not recipes and not searching:
        raise UsageError(f"nothing to measure: every rank asked for is {most} or more")
    return recipes, notes


def _numbers(option: str, text: str | None, whole: bool = False) -> list[float]:
    try:
        found = [float(v) for v in (text or "").split(",") if v.strip()]
    except ValueError as e:
        raise UsageError(f"{option} {text!r} are no numbers", hint="such as 1,2,4") from e
    wrong = next((v for v in found if v <= 0 or (whole and v != int(v))), None)
    if wrong is not None:
        what = "whole numbers from 1" if whole else "positive numbers"
        raise UsageError(f"{option} holds {wrong:g}, expected {what}")
    return found


def _beside(opened: Opened, ending: str) -> Path:
    """Return in.json beside a folder in/, or beside a file in.safetensors; in the current folder for a Hub id."""
    path = Path(opened.name)
    if not path.exists():
        return Path(f"{path.name}{ending}")
    stem = path.resolve().name if path.is_dir() else path.name.removesuffix(".safetensors").removesuffix(".adaptc")
    return (path.resolve() if path.name in ("", ".", "..") else path).parent / f"{stem}{ending}"


def _word(bound: str) -> str:
    """Return a bound as part of a file name: kl<0.01 is kl-below-0.01."""
    for sign, word in (("<=", "-to-"), (">=", "-from-"), ("<", "-below-"), (">", "-above-")):
        bound = bound.replace(sign, word)
    return bound


def _saved(opened: Opened, bench: Bench, bound: Bound, by: str, save: str | None, force: bool) -> Path:
    """Return where the file that --until finds goes: one file for a container, as its bytes are counted."""
    from adaptc.evidence.sweep import by_bits, by_rank
    from adaptc.formats import is_folder
    from adaptc.formats.atomic import check

    fmt = bench.format_of((by_bits(1) if by == "bits" else by_rank(1)).spec)
    suffix = "" if fmt.writes == "folder" and fmt.id != "adaptc" else getattr(fmt, "suffix", ".safetensors")
    out = Path(save) if save is not None else _beside(opened, f".{_word(str(bound))}{suffix}")
    if suffix and not out.suffix:
        raise UsageError(f"{out} has no suffix, and {fmt.title} is one file here", hint=f"such as {out}{suffix}")
    check(out, force=force, folder=is_folder(fmt, out), inputs=opened.inputs)
    return out


def _data(opened: Opened, base: str, data: str, bench: Bench, points: Sequence[Point], on_front: set[str],
          quality: str, most: int) -> dict[str, Any]:
    """Return the whole sweep as JSON values."""
    from adaptc.evidence.curve import aurac

    table: dict[str, Any] = {
        "input": opened.name, "base": base, "data": data, "metric": quality, "settings": asdict(bench.settings),
        "bootstrap": bench.bootstrap, "seed": bench.seed, "identity": dict(bench.identity),
        "points": [asdict(p) | {"front": p.spec in on_front} for p in points],
    }
    ranked = [(p.setting, p) for p in points if p.goal == "rank" and p.setting] + ([(most, points[0])] if most else [])
    if len(ranked) > 1 and "accuracy" in points[0].metrics:
        ranks, values = [float(r) for r, _ in ranked], [p.value("accuracy") for _, p in ranked]
        table["aurac"] = {"ranks": sorted(ranks), "log2": aurac(ranks, values), "linear": aurac(ranks, values, False)}
    return table


def _blocks(table: Mapping[str, Any], points: Sequence[Point], tried: Sequence[Point], on_front: set[str], quality: str,
            notes: Sequence[str]) -> list[Block]:
    from adaptc.evidence.bootstrap import Estimate

    shown = list(dict.fromkeys([quality, *(m for m in ("kl", "agreement") if m in points[-1].metrics)]))
    rows = []
    for p in [*points, *(p for p in tried if p.spec not in {q.spec for q in points})]:
        e = {k: v for k, v in p.metrics[quality].items() if k != "distinguishable"}
        rows.append((p.label, f"{p.nbytes:,}", number(p.error), *(number(p.value(m), 5) for m in shown),
                     verdict(Estimate(**e)) if p.spec else "-", "*" if p.spec in on_front and p in points else ""))
    area = table.get("aurac")
    facts = Facts([("base", table["base"]), ("data", table["data"]),
                   ("source", f"{table['input']}, {print_nbytes(points[0].nbytes)}")])
    summary = [f"AURAC {area['log2']:.4g} over log2 of ranks {area['ranks'][0]:g}..{area['ranks'][-1]:g}, "
               f"{area['linear']:.4g} over ranks"] if area else []
    return [facts, Table(("point", ">bytes", ">error of dW", *(f">{m}" for m in shown), f"{quality} against source",
                          "front"), rows), Notes([*summary, *notes])]


def _write(out: Path, table: Mapping[str, Any], force: bool) -> None:
    from adaptc.formats.atomic import staged

    if out.suffix == ".json":
        text = json.dumps(table, indent=1) + "\n"
    else:
        buffer = io.StringIO()
        names = list(dict.fromkeys(m for p in table["points"] for m in p["metrics"]))
        columns = ["label", "goal", "setting", "spec", "nbytes", "error", "front", *names]
        writer = csv.DictWriter(buffer, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for p in table["points"]:
            writer.writerow(p | {m: e["value"] for m, e in p["metrics"].items()})
        text = buffer.getvalue()
    with staged(out, force=force) as temp:
        temp.write_text(text, encoding="utf8")
