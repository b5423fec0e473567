"""adaptc compress: every delta at the best rank for what was asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from adaptc.bytesize import read_nbytes, short_nbytes
from adaptc.cli.options import example, input_argument, reading, speaking, working, writing
from adaptc.cli.render import Voice

_GOALS = ("rank", "energy", "max_error", "size")


@click.command("compress", short_help="Truncate every delta optimally.",
               epilog=example("adaptc compress adapter/ --rank 8"))
@input_argument()
@click.option("-o", "--output", type=click.Path(), metavar="OUT",
              help="Where to write; beside IN by default (in.r8.safetensors, or in-r8/ for a folder).")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Best rank-N part of every module.")
@click.option("--energy", type=float, metavar="E",
              help="Smallest ranks that keep this share of ||dW||^2, as 0.99.")
@click.option("--max-error", type=float, metavar="E",
              help="Smallest ranks with the relative error of every dW within E.")
@click.option("--size", metavar="BYTES", callback=lambda ctx, param, value: value and read_nbytes(value),
              help="Best ranks over all modules within this size of the whole output, as 2MiB or 500KB.")
@click.option("--bits", type=float, metavar="B",
              help="Then store that in B bits a parameter, as 1 or 0.5, in a container (see adaptc quantize).")
@click.option("--method", type=click.Choice(["exact", "rsvd"]), default="exact", show_default=True,
              help="SVD of the small core, or randomised as LoRA-Squeeze has it.")
@click.option("--oversample", type=click.IntRange(min=0), default=10, metavar="N", help="rsvd: extra directions.")
@click.option("--power", type=click.IntRange(min=0), default=2, metavar="N", help="rsvd: power iterations.")
@click.option("--seed", type=int, default=0, metavar="N", help="rsvd: seed of its random matrix.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Store factors in this dtype.")
@click.option("--fit", type=click.Choice(["vllm"]), help="Round ranks up to those vLLM has buffers for.")
@click.option("--include", multiple=True, metavar="PATTERN",
              help="Only modules that fit, as q_proj or layers.0; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules that fit; repeatable.")
@click.option("--to", metavar="ID", help="Write in this dialect instead of that of IN.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@reading
@working
@writing
@speaking
def command(source: str, output: str | None, bits: float | None, to: str | None, dry_run: bool, alpha: float | None,
            dialect: str | None, base: str | None, jobs: int, device: str, allow_loss: bool, force: bool, voice: Voice,
            **given: Any) -> None:
    """Truncate every low-rank delta of IN optimally, without its base model.

    The product B A is never formed: the result is the best approximation of its rank (Eckart-Young), and the error
    that is shown is measured on what is written. IN is a file, a folder or a Hub id, and never overwritten.
    """
    from adaptc.cli.account import account
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.cli.writing import target
    from adaptc.passes import Context
    from adaptc.pipeline import Pipeline
    from adaptc.spec import build

    wanted = {k: v for k, v in given.items() if v not in (None, ())}
    if bits is not None and "size" in wanted:
        raise click.UsageError("--size with --bits are two budgets: adaptc quantize --size spends one on both")
    if not {*_GOALS, "dtype"} & set(wanted):
        raise click.UsageError("nothing to do: give --rank, --energy, --max-error or --size, or a --dtype to cast to")
    if wanted["method"] == "exact":
        wanted = {k: v for k, v in wanted.items() if k not in ("oversample", "power", "seed")}
    picks = {k: v for k, v in wanted.items() if k in ("include", "exclude")}
    steps = [build("truncate", wanted), *([build("quantize", {"bits": bits, **picks})] if bits is not None else [])]
    weights = open_base(base)
    opened = open_adapter(source, alpha, dialect, weights)
    tag = _tag(wanted) if bits is None else f"{_tag(wanted)}-b{bits:g}"
    place = target(opened, output, tag, to or (None if bits is None else "adaptc"), force)
    ctx = Context(weights, jobs=jobs, device=device, size_of=place.size_of)
    with voice.progress() as progress, about(source):
        outcome = Pipeline(tuple(steps))(opened.adapter, replace(ctx, progress=progress))
        losses = place.losses(outcome.adapter, allow_loss)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, opened, outcome, place, nbytes, not dry_run, losses)


def _tag(wanted: dict[str, Any]) -> str:
    """Return the part of the default output's name that says what was asked: r8, e0.99, err0.05, 2MiB, fp16."""
    goal = next((g for g in _GOALS if g in wanted), "dtype")
    value = wanted.get(goal)
    if goal == "size" and isinstance(value, int):
        return short_nbytes(value)
    return {"rank": f"r{value}", "energy": f"e{value:g}" if goal == "energy" else "",
            "max_error": f"err{value:g}" if goal == "max_error" else ""}.get(goal, str(value))
