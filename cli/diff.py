"""adaptc diff: how far apart two adapters are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from adaptc.cli.options import example, input_argument, reading, speaking
from adaptc.cli.render import Block, Facts, Notes, Table, Voice, count, listed, number

if TYPE_CHECKING:
    from adaptc.difference import Difference


@click.command("diff", short_help="Show how far apart two adapters are.",
               epilog=example("adaptc diff adapter/ adapter-r8/ --fail-above 0.1"))
@input_argument("A")
@input_argument("B")
@click.option("--fail-above", type=click.FloatRange(min=0), metavar="E",
              help="Exit 1 if the total error, or that of any carried tensor, is above E.")
@click.option("--base", type=click.Path(), metavar="DIR", help="Base model: compares DoRA and its like as weights.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@reading
@speaking
@click.pass_context
def command(ctx: click.Context, a: str, b: str, fail_above: float | None, base: str | None, jobs: int,
            alpha: float | None, dialect: str | None, voice: Voice) -> None:
    """Show ||dW_A - dW_B|| / ||dW_A||, module by module and in total, from factors.

    Dialects may differ; modules are matched by parameter name, and one that is missing counts as zero.
    """
    from adaptc.cli.reading import open_adapter, open_base
    from adaptc.difference import diff
    from adaptc.passes import Context

    first, second = open_adapter(a, alpha, dialect), open_adapter(b, alpha, dialect)
    with voice.progress() as progress:
        found = diff(first.adapter, second.adapter, base=open_base(base), ctx=Context(jobs=jobs, progress=progress))
    failed = fail_above is not None and found.worst > fail_above
    modules = [{"name": g.key, "error": g.error, "norm": math.sqrt(g.energy), "note": g.note} for g in found.modules]
    data: dict[str, Any] = {
        "a": a, "b": b, "error": found.error, "worst": found.worst, "failed": failed,
        "modules": modules,
        "carried": [{"name": g.key, "error": g.error, "note": g.note} for g in found.carried],
        "only_a": list(found.only_a), "only_b": list(found.only_b),
    }
    verdict = [f"failed: {number(found.worst)} is above {fail_above:g}"] if failed else []
    voice.show(data, *_blocks(a, b, found, voice), *verdict)
    if failed:
        ctx.exit(1)


def _blocks(a: str, b: str, found: Difference, voice: Voice) -> list[Block]:
    from adaptc.grouping import grouped

    lines = []
    for name, gaps in grouped(found.modules, voice.verbose).items():
        energy = math.fsum(g.energy for g in gaps)
        left = math.fsum(g.distance2 for g in gaps)
        error = math.sqrt(left / energy) if energy else (math.inf if left else 0.0)
        lines.append((name, str(len(gaps)), number(error), number(max(g.error for g in gaps))))
    total = ("all", str(len(found.modules)), number(found.error),
             number(max((g.error for g in found.modules), default=0.0)))
    table = Table(("module", ">count", ">error", ">worst"), lines, total if len(lines) > 1 else None)
    carried = [g for g in found.carried if g.distance2]
    other = [f"carried {g.key}: {g.note or f'relative error {number(g.error)}'}" for g in carried]
    wrong = [f"only in {which}, counted as zero in the other: {count(keys, 'module')} ({listed(keys)})"
             for which, keys in ((a, found.only_a), (b, found.only_b)) if keys]
    notes = [f"{g.key}: {g.note}" for g in found.modules if g.note and not g.note.startswith("only in")]
    shown = other if voice.verbose else other[:8]
    hidden = [f"{len(other) - len(shown)} more carried tensors differ"] if len(other) > len(shown) else []
    same = len(found.carried) - len(carried)
    equal = f"{same} of {count(found.carried, 'tensor')} equal" if found.carried else None
    facts = Facts([("A", a), ("B", b), ("carried", equal)])
    return [facts, table, Notes(wrong + shown + hidden, wrong=True), Notes(notes),
            f"relative error {number(found.error)}"]
