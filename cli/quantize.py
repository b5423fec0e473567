"""adaptc quantize: every delta in few bits, under one budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from adaptc.bytesize import read_nbytes, short_nbytes
from adaptc.cli.options import example, input_argument, reading, speaking, working, writing
from adaptc.cli.render import Voice


@click.command("quantize", short_help="Store every delta in few bits.",
               epilog=example("adaptc quantize adapter/ --bits 1"))
@input_argument()
@click.option("-o", "--output", type=click.Path(), metavar="OUT",
              help="Where to write; beside IN by default (in.b1.adaptc.safetensors, or in-b1/ for a folder).")
@click.option("--bits", type=float, metavar="B", help="Stored bits a source parameter, as 1, 2 or 0.25.")
@click.option("--max-error", type=float, metavar="E", help="Fewest bits with the total relative error of dW within E.")
@click.option("--size", metavar="BYTES", callback=lambda ctx, param, value: value and read_nbytes(value),
              help="Least error within this size of the whole output, as 40KB or 2MiB.")
@click.option("--method", type=click.Choice(["rd", "affine", "nf4", "fp8", "bilora"]), default="rd", show_default=True,
              help="One budget over everything (rd), or plain codes of each factor as it is.")
@click.option("--group", type=click.IntRange(min=1), default=64, metavar="N", help="affine: values that share a scale.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="First the best rank-N part of every module.")
@click.option("--energy", type=float, metavar="E", help="First keep this share of ||dW||^2 in every module.")
@click.option("--include", multiple=True, metavar="PATTERN",
              help="Only modules that fit, as q_proj or layers.0; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules that fit; repeatable.")
@click.option("--calibration", type=click.Path(), metavar="FILE",
              help="Second moments of the inputs (docs/recipes.md): code for outputs where that is better.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@reading
@working
@writing
@speaking
def command(source: str, output: str | None, dry_run: bool, bits: float | None, max_error: float | None,
            size: int | None, method: str, group: int, rank: int | None, energy: float | None,
            include: tuple[str, ...], exclude: tuple[str, ...], calibration: str | None, alpha: float | None,
            dialect: str | None, base: str | None, jobs: int, device: str, allow_loss: bool, force: bool,
            voice: Voice) -> None:
    """Store the deltas of IN in few bits and write a container.

    One budget is spent over all modules and singular directions at once: it chooses ranks and bits together. The
    result decodes to ordinary LoRA factors (adaptc decode); its errors are measured on those.
    """
    from adaptc.cli.account import account
    from adaptc.cli.reading import about, open_adapter, open_base, open_calibration
    from adaptc.cli.writing import target
    from adaptc.fingerprint import stamped
    from adaptc.passes import Context
    from adaptc.pipeline import Pipeline
    from adaptc.spec import build

    picks = {k: v for k, v in (("include", include), ("exclude", exclude)) if v}
    wanted: dict[str, Any] = {"bits": bits, "max_error": max_error, "size": size}
    goal = {k: v for k, v in wanted.items() if v is not None}
    if len(goal) != 1 and method == "rd":
        raise click.UsageError(f"give one of --bits, --max-error and --size, not {len(goal) or 'none'}")
    goal |= {"method": method, **({"group": group} if method == "affine" else {})}
    cut = {k: v for k, v in (("rank", rank), ("energy", energy)) if v is not None}
    steps = ([build("truncate", {**cut, **picks})] if cut else []) + [build("quantize", {**goal, **picks})]
    weights = open_base(base)
    opened = open_adapter(source, alpha, dialect, weights)
    tag = _tag(method, bits, max_error, size)
    place = target(opened, output, tag, "adaptc", force)
    ctx = Context(weights, open_calibration(calibration), jobs=jobs, device=device, size_of=place.size_of)
    with voice.progress() as progress, about(source):
        adapter = stamped(opened.adapter, weights)
        outcome = Pipeline(tuple(steps))(adapter, replace(ctx, progress=progress))
        losses = place.losses(outcome.adapter, allow_loss)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, opened, outcome, place, nbytes, not dry_run, losses)


def _tag(method: str, bits: float | None, max_error: float | None, size: int | None) -> str:
    """Return the part of the default output's name that says what was asked: b1, 40KB, err0.1, nf4, affine-b3."""
    goal = short_nbytes(size) if size is not None else f"err{max_error:g}" if max_error is not None else ""
    goal = f"b{bits:g}" if bits is not None else goal
    return goal if method == "rd" else "-".join(p for p in (method, goal) if p)
