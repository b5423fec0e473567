"""adaptc sparsify: few entries of every delta, as SHiRA holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import read_nbytes, short_nbytes
from adaptc.cli.options import example, input_argument, reading, speaking, working, writing
from adaptc.cli.reading import Opened
from adaptc.cli.render import Table, Voice, number

if TYPE_CHECKING:
    from adaptc.base import Base
    from adaptc.prune.shira import Sparsified


@dataclass(frozen=True)
class Tuned(Opened):
    """A whole fine-tuned model, seen as the change it makes to its base."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that changed."""
        return self.adapter.nbytes


@click.command("sparsify", short_help="Keep few entries of every delta.",
               epilog=example("adaptc sparsify tuned-model/ --base model/ --density 0.02"))
@input_argument()
@click.option("-o", "--output", type=click.Path(), metavar="OUT",
              help="Where to write; beside IN by default (in.d0.01.adaptc.safetensors, or in-d0.01/ for a folder).")
@click.option("--density", type=float, metavar="D", help="Share of the entries of every module, as 0.01.")
@click.option("--count-like-rank", "rank", type=click.IntRange(min=1), metavar="R",
              help="R (out + in) entries of every module, as many as rank-R factors have: PEFT's SHIRA.")
@click.option("--size", metavar="BYTES", callback=lambda ctx, param, value: value and read_nbytes(value),
              help="The highest scores of all modules within this size of the whole output, as 2MiB or 500KB.")
@click.option("--mask", type=click.Choice(["magnitude", "activation", "snip", "random", "struct"]), default="magnitude",
              show_default=True, help="What is kept: |dW|, |dW| ||x||, |dW o W0|, a draw, rows and columns.")
@click.option("--across", is_flag=True, help="Spend --density over all modules at once, where scores are highest.")
@click.option("--refine", is_flag=True, help="Fit the values to the calibration inputs.")
@click.option("--calibration", type=click.Path(), metavar="FILE",
              help="Statistics of the inputs (adaptc calibrate): errors at the outputs, mask activation.")
@click.option("--min-energy", type=float, default=0.5, metavar="E", show_default=True,
              help="Refuse where less of ||dW||^2 than this share is kept.")
@click.option("--accept-loss", is_flag=True, help="Write even then: it is another adapter.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Store values in this dtype.")
@click.option("--seed", type=int, default=0, metavar="N", help="random: seed of the draw.")
@click.option("--include", multiple=True, metavar="PATTERN",
              help="Only modules that fit, as q_proj or layers.0; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules that fit; repeatable.")
@click.option("--to", metavar="ID", help="Write in this dialect: adaptc by default, peft with --count-like-rank.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@reading
@working
@writing
@speaking
def command(source: str, output: str | None, calibration: str | None, to: str | None, dry_run: bool,
            alpha: float | None, dialect: str | None, base: str | None, jobs: int, device: str, allow_loss: bool,
            force: bool, voice: Voice, **given: Any) -> None:
    """Keep few entries of every delta of IN: exact for changes that are sparse, another adapter for others.

    IN is a fine-tuned model (with --base), a sparse adapter, or any other. A trained LoRA spreads its energy over all
    entries, and the few that are kept hold little of it: below --min-energy nothing is written.
    """
    from adaptc.cli.account import account
    from adaptc.cli.reading import about, open_base, open_calibration
    from adaptc.cli.writing import target
    from adaptc.fingerprint import stamped
    from adaptc.passes import Context
    from adaptc.prune.shira import Sparsify

    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    step = Sparsify(**options)
    weights = open_base(base)
    opened = _opened(source, alpha, dialect, weights, allow_loss)
    place = target(opened, output, _tag(step), to or ("peft" if step.rank is not None else "adaptc"), force)
    ctx = Context(weights, open_calibration(calibration), jobs=jobs, device=device, size_of=place.size_of)
    with voice.progress() as progress, about(source):
        outcome = step(stamped(opened.adapter, weights), replace(ctx, progress=progress))
        losses = place.losses(outcome.adapter, allow_loss)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, opened, outcome, place, nbytes, not dry_run, losses, table=_table(outcome, voice.verbose),
            more=_data(outcome))


def _opened(source: str, alpha: float | None, dialect: str | None, base: Base | None, allow_loss: bool) -> Opened:
    """Return the adapter that the user called `source`, or the change of a whole model."""
    from adaptc.cli.reading import about, open_adapter
    from adaptc.errors import LossError, NeedsError
    from adaptc.prune.extract import extracted, is_model
    from adaptc.resolve import resolved

    path = Path(source)
    if dialect is not None or not is_model(path, base):
        opened = open_adapter(source, alpha, dialect, base)
        with about(source):
            return opened if base is None else replace(opened, adapter=resolved(opened.adapter, base))
    from adaptc.base import Base
    from adaptc.formats.format import Evidence
    from adaptc.formats.source import Source
    from adaptc.registry import FORMATS

    if base is None:
        raise NeedsError(f"{source} is a whole model, and its change needs the base", hint="--base names it")
    with about(source):
        change = extracted(Base(path), base)
        if change.lost and not allow_loss:
            raise LossError("an adapter has no place for everything this model holds", change.lost,
                            hint="--allow-loss leaves it out")
    held = Source(path, path if path.is_file() else next(iter(sorted(path.glob("*.safetensors"))), path), {})
    return Tuned(source, held, FORMATS.get("adaptc")(), Evidence(3, "a model folder"), change.adapter)


def _tag(step: Any) -> str:
    """Return the part of the default output's name that says what was asked: d0.01, k8, 2MiB."""
    if step.size is not None:
        return str(short_nbytes(step.size))
    return f"k{step.rank}" if step.rank is not None else f"d{step.density:g}"


def _table(outcome: Sparsified, each: bool) -> Table:
    from adaptc.calibration import SPLITS
    from adaptc.grouping import grouped
    from adaptc.prune.kept import Kept, output_error
    from adaptc.report import total_error

    rows = {r.key: r for r in outcome.rows}
    splits = [s for s in SPLITS if output_error(outcome.masks, s) is not None]

    def cells(name: str, some: Sequence[Kept]) -> tuple[str, ...]:
        energy, entries, of = sum(m.energy for m in some), sum(m.entries for m in some), sum(m.of for m in some)
        kept = sum(m.kept * m.energy for m in some) / energy if energy else 1.0
        errors = [total_error([rows[m.key] for m in some])]
        errors += [output_error(some, s) or 0.0 for s in splits]
        return (name, str(len(some)), f"{entries:,}", f"{100 * entries / of:.3g}%", f"{100 * kept:.3g}%",
                *map(number, errors))

    columns = ("module", ">count", ">entries", ">density", ">energy kept", ">error",
               *(f">outputs, {'held out' if s == 'held' else s}" for s in splits))
    lines = [cells(name, some) for name, some in grouped(outcome.masks, each).items()]
    return Table(columns, lines, cells("all", outcome.masks) if len(lines) > 1 else None)


def _data(outcome: Sparsified) -> dict[str, Any]:
    from adaptc.prune.kept import output_error

    def errors(some: Any) -> dict[str, float | None]:
        return {"train": output_error(some, "train"), "held": output_error(some, "held")}

    return {"masks": [{"name": m.key, "entries": m.entries, "of": m.of, "energy": m.energy, "kept": m.kept,
                       "output_error": errors([m])} for m in outcome.masks],
            "kept": sum(m.kept * m.energy for m in outcome.masks) / (sum(m.energy for m in outcome.masks) or 1.0),
            "output_error": errors(outcome.masks)}
