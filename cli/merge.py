"""adaptc merge: several adapters of one base model into one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from adaptc.bytesize import read_nbytes
from adaptc.cli.options import example, reading, speaking, working, writing
from adaptc.cli.reading import Opened, open_adapter, open_base
from adaptc.cli.render import Voice
from adaptc.errors import UsageError


@dataclass(frozen=True)
class Several(Opened):
    """Several adapters that are about to become one, seen as the one they are read from."""

    parts: tuple[Opened, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all of them on disk."""
        return sum(p.nbytes for p in self.parts)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Paths that no output may replace."""
        return tuple(path for p in self.parts for path in p.inputs)


@click.command("merge", epilog=example("adaptc merge style/ subject/:0.6 -o both/ --method lego --rank 16"))
@click.argument("sources", metavar="IN[:WEIGHT]...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(), metavar="OUT", required=True, help="Where to write.")
@click.option("--method", default="exact", metavar="NAME", show_default=True,
              help="exact, cat, lego, ties, dare-linear, dare-ties, magnitude, knots, tsv, iso, linear, fedavg, fedex, "
                   "lora-fair; docs/merging.md says when not to use which.")
@click.option("--weights", metavar="W,W,...", help="One weight an input, negative ones subtract; default 1/T each.")
@click.option("--rank", type=int, metavar="N", help="Rank of every module; default the largest among the inputs there.")
@click.option("--size", metavar="BYTES", callback=lambda ctx, param, value: value and read_nbytes(value),
              help="Best ranks over all modules within this size of the whole output, as 2MiB or 500KB.")
@click.option("--density", type=float, metavar="D", help="Share of entries that ties, dare, magnitude and knots keep "
              "(default 0.5).")
@click.option("--seed", type=int, metavar="N", help="For dare's masks and lego's clusters (default 0).")
@click.option("--space", type=click.Choice(["core", "factors"]), help="ties, dare, magnitude: on dW through the joint "
              "core (default), or on A and B apart as PEFT does.")
@click.option("--gauge", type=click.Choice(["balanced", "raw"]), help="lego: units of the SVD (default), or as stored.")
@click.option("--reweight", type=click.Choice(["both", "parameter", "output", "none"]), help="lego: which corrections.")
@click.option("--scale", type=float, metavar="S", help="Multiply the result (default 1).")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Store factors in this dtype.")
@click.option("--heads", metavar="WHICH", help="Of heads and norms that differ, keep: first, drop, or those of one IN.")
@click.option("--any-base", is_flag=True, help="Merge even if the inputs name different base models.")
@click.option("--to", metavar="ID", help="Write in this dialect instead of that of the first IN.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@reading
@working
@writing
@speaking
def command(sources: tuple[str, ...], output: str, weights: str | None, heads: str | None, to: str | None,
            dry_run: bool, alpha: float | None, dialect: str | None, base: str | None, jobs: int, device: str,
            allow_loss: bool, force: bool, voice: Voice, **given: Any) -> None:
    """Merge adapters of one base model into one, of any ranks and dialects, without the base model.

    By default the result is the mean of their deltas, truncated optimally to the largest input rank. The error that is
    shown is the distance of what is written to the weighted sum of the inputs, whatever the method.
    """
    from adaptc.cli.account import account
    from adaptc.cli.writing import target
    from adaptc.passes import Context
    from adaptc.squeeze.merge import Merge

    paths, inline = split_weights(sources)
    chosen = inline if weights is None else _listed(weights)
    if inline is not None and weights is not None:
        raise UsageError("weights are given twice, inline and with --weights")
    opened = tuple(open_adapter(p, alpha, dialect) for p in paths)
    names = short_names(paths)
    if heads is not None and heads in paths:
        heads = names[paths.index(heads)]
    step = Merge(weights=chosen, heads=heads, names=names, **{k: v for k, v in given.items() if v is not None})
    several = together(opened, names)
    place = target(several, output, "merged", to, force)
    with voice.progress() as progress:
        ctx = Context(open_base(base), jobs=jobs, device=device, progress=progress, size_of=place.size_of)
        outcome = step([p.adapter for p in opened], ctx)
    losses = place.losses(outcome.adapter, allow_loss)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, several, outcome, place, nbytes, not dry_run, losses)


def together(opened: tuple[Opened, ...], names: tuple[str, ...]) -> Several:
    """Return several opened adapters as one input for reports: the first one's dialect, everyone's history."""
    first, history = opened[0], tuple(s for p in opened for s in p.adapter.history)
    return Several(" + ".join(names), first.source, first.format, first.evidence,
                   replace(first.adapter, history=history), opened)


def split_weights(sources: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Return paths and inline weights ("adapter:0.6"), None where there are none.

    What exists under its whole name is a path. Raises UsageError when only some inputs have a weight.
    """
    paths, weights = [], []
    for source in sources:
        path, colon, tail = source.rpartition(":")
        value = None if not colon or Path(source).exists() else _number(tail)
        paths.append(source if value is None else path)
        if value is not None:
            weights.append(value)
    if weights and len(weights) < len(sources):
        raise UsageError(f"{len(weights)} of {len(sources)} inputs have a weight", hint="give one to each, or to none")
    return tuple(paths), tuple(weights) or None


def _listed(text: str) -> tuple[float, ...]:
    values = [_number(t) for t in text.split(",")]
    if any(v is None for v in values):
        raise UsageError(f"weights are {text!r}, must be numbers with commas between", hint="--weights 0.6,0.4")
    return tuple(v for v in values if v is not None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def short_names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest tails of the paths that tell them apart; equal paths get numbers."""
    parts = [[p for p in path.split("/") if p] or [path] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{name} ({i})" for i, name in enumerate(names, 1))
