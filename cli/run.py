"""adaptc run: passes in a row, from one line or a recipe file."""

from __future__ import annotations

from dataclasses import replace

import click

from adaptc.cli.options import example, reading, speaking, working, writing
from adaptc.cli.render import Voice


@click.command("run", short_help="Apply passes from one line or a recipe file.",
               epilog=example('adaptc run "truncate{rank=8,dtype=fp16}" adapter/ smaller/'))
@click.argument("recipe", metavar="SPEC|RECIPE.toml")
@click.argument("sources", metavar="IN [IN ...]", nargs=-1, required=True, type=click.Path())
@click.argument("output", metavar="OUT", type=click.Path())
@click.option("--to", metavar="ID", help="Write in this dialect; that of IN by default, a container for codes.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
@reading
@working
@writing
@speaking
def command(recipe: str, sources: tuple[str, ...], output: str, to: str | None, dry_run: bool, alpha: float | None,
            dialect: str | None, base: str | None, jobs: int, device: str, allow_loss: bool, force: bool,
            voice: Voice) -> None:
    """Apply passes to IN in the order they are written, and write OUT.

    A spec is name{option=value,...}, several joined by commas; a recipe is a TOML file of [[step]] tables. What was
    applied is kept in the history of OUT, in the same words. Several inputs are taken where the first pass is merge.
    """
    from adaptc.cli.account import account
    from adaptc.cli.merge import short_names, together
    from adaptc.cli.reading import about, open_adapter, open_base
    from adaptc.cli.writing import target
    from adaptc.passes import Context
    from adaptc.recipe import read_recipe

    pipeline = read_recipe(recipe)
    each = tuple(open_adapter(s, alpha, dialect) for s in sources)
    opened = each[0] if len(each) == 1 else together(each, short_names(sources))
    place = target(opened, output, "", to or pipeline.container or None, force)
    ctx = Context(open_base(base), jobs=jobs, device=device, size_of=place.size_of)
    with voice.progress() as progress, about(opened.name):
        outcome = pipeline([o.adapter for o in each], replace(ctx, progress=progress))
        losses = place.losses(outcome.adapter, allow_loss)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, opened, outcome, place, nbytes, not dry_run, losses)
