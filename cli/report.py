"""adaptc report: everything known about adapters on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import example, reading, speaking
from adaptc.cli.render import Voice, count

if TYPE_CHECKING:
    from adaptc.cli.render import Progress
    from adaptc.evidence.report import Subject


@click.command("report", short_help="Show adapters and what was measured on one HTML page.",
               epilog=example("adaptc report small.adaptc.safetensors --against adapter/ sweep.json"))
@click.argument("sources", metavar="IN...", nargs=-1, required=True, type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="FILE.html",
              help="Where to write; beside the first IN by default (in-report.html).")
@click.option("--against", type=click.Path(), metavar="ADAPTER", help="The original: measure errors against it.")
@click.option("--base", type=click.Path(), metavar="DIR", help="Base model, for deltas that are only defined on it.")
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@reading
@speaking
def command(sources: tuple[str, ...], output: str | None, against: str | None, base: str | None, force: bool,
            jobs: int, alpha: float | None, dialect: str | None, voice: Voice) -> None:
    """Write one self-contained page about every IN: an adapter, or the JSON of adaptc sweep or adaptc eval.

    Provenance and history, bytes by module, spectra, effective ranks, and with --against errors module by module and
    the trivial schemes at the same bytes. The page holds no scripts and loads nothing.
    """
    from adaptc.evidence.report import report
    from adaptc.formats.atomic import check, staged

    out = Path(output) if output is not None else _beside(sources[0])
    check(out, inputs=tuple(Path(s) for s in (*sources, *([against] if against else []))), force=force)
    measured = [(Path(s).name, _document(s)) for s in sources if s.endswith(".json")]
    names = [s for s in sources if not s.endswith(".json")]
    with voice.progress() as progress:
        original = _subject(against, None, base, alpha, dialect, jobs, progress) if against is not None else None
        subjects = [_subject(s, original, base, alpha, dialect, jobs, progress) for s in names]
        text = report(subjects, measured, original)
    with staged(out, force=force) as temp:
        temp.write_text(text, encoding="utf8")
    nbytes = len(text.encode())
    voice.show({"output": str(out), "bytes": nbytes, "adapters": names, "documents": [n for n, _ in measured]},
               f"wrote {out}: {print_nbytes(nbytes)}, {count(names, 'adapter')}, {count(measured, 'document')}")


def _subject(name: str, original: Subject | None, base: str | None, alpha: float | None, dialect: str | None, jobs: int,
             progress: Progress | None) -> Subject:
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.difference import diff
    from adaptc.evidence.report import Subject
    from adaptc.passes import Context
    from adaptc.squeeze.inspection import inspect

    opened = open_adapter(name, alpha, dialect)
    ctx = Context(jobs=jobs, progress=progress)
    with about(name):
        modules = inspect(opened.adapter, ctx=ctx)
        gap = None if original is None else diff(original.adapter, opened.adapter, base=open_base(base), ctx=ctx)
    return Subject(Path(name).name or name, opened.files, f"{opened.format.title} ({opened.evidence.reason})",
                   opened.adapter, modules, gap)


def _document(name: str) -> Mapping[str, Any]:
    """Read a JSON object. Raises NeedsError or FormatError."""
    from adaptc.base_files import read_object
    from adaptc.errors import NeedsError

    if not Path(name).is_file():
        raise NeedsError(f"{name} does not exist", hint="IN is an adapter, or the JSON of adaptc sweep or adaptc eval")
    return read_object(Path(name))


def _beside(first: str) -> Path:
    """Return the default page: beside a file or folder, in the current folder for a Hub id."""
    path = Path(first)
    stem = path.name.split(".")[0] or "adapters"
    return (path.parent if path.exists() else Path()) / f"{stem}-report.html"
