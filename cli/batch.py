"""adaptc batch: one recipe over a library of adapters."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import example, reading, speaking
from adaptc.cli.render import Notes, Table, Voice, count, number, spread

if TYPE_CHECKING:
    from adaptc.evidence.fleet import Engine, Plan
    from adaptc.evidence.fleet_find import Unit
    from adaptc.evidence.fleet_work import Result


@click.command("batch", short_help="Run a recipe over many adapters, resumable.",
               epilog=example("adaptc batch recipe.toml 'library/**/' -o out/"))
@click.argument("recipe", metavar="SPEC|RECIPE.toml")
@click.argument("inputs", metavar="IN [IN ...]", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="DIR", help="Where outputs and manifest go; mirrors the inputs.")
@click.option("--engine", type=click.Choice(["local", "ray", "serial"]), default="local", show_default=True,
              help="Worker processes, Ray tasks, or this process alone.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker processes (0: all cores).")
@click.option("--address", metavar="HOST:PORT", help="ray: the cluster to use; RAY_ADDRESS, or one of its own.")
@click.option("--root", metavar="DIR", help="Name outputs by their inputs' paths below this folder.")
@click.option("--base", type=click.Path(), metavar="DIR", help="Base model: folder, safetensors or GGUF file, Hub id.")
@click.option("--to", metavar="ID", help="Write in this dialect; each in its own by default, a container for codes.")
@click.option("--dry-run", is_flag=True, help="List what would be done and the bytes, and do nothing.")
@click.option("--verify", is_flag=True, help="Compare contents of what is done already, not only sizes and times.")
@click.option("--force", is_flag=True, help="Do everything again, replacing outputs (never an input).")
@click.option("--allow-loss", is_flag=True, help="Write even if the output dialect cannot say everything.")
@reading
@speaking
def command(recipe: str, inputs: tuple[str, ...], output: str, engine: str, jobs: int, address: str | None,
            root: str | None, base: str | None, to: str | None, dry_run: bool, verify: bool, force: bool,
            allow_loss: bool, alpha: float | None, dialect: str | None, voice: Voice) -> int:
    """Apply a recipe to every adapter IN names, each alone, and write the results below DIR.

    IN is a folder, a file, a glob in quotes ('library/**/'), a .txt list of them, or a URL that fsspec opens. What is
    done is in DIR/manifest.jsonl: the same command again does only what is missing. An adapter that fails stops no
    other; failures are listed at the end, and the exit status is then 1.
    """
    from adaptc.evidence.fleet import order_of, plan
    from adaptc.evidence.fleet_find import find
    from adaptc.evidence.manifest import history_of, manifest_of

    order = order_of(recipe, base=base, to=to, alpha=alpha, dialect=dialect, allow_loss=allow_loss)
    output = output.rstrip("/") or "/"
    units = find(inputs, output, root)
    if dry_run:
        planned = plan(units, order, output, history_of(output), force=force, verify=verify)
        return _listed(voice, units, planned, output)
    with manifest_of(output) as manifest:
        planned = plan(units, order, output, manifest.history, force=force, verify=verify)
        start = time.monotonic()
        results = _done(voice, planned, output, manifest, _engine(engine, jobs, address, len(planned.todo)))
        seconds = time.monotonic() - start
        return _account(voice, planned, results, output, seconds, str(manifest.path))


def _engine(name: str, jobs: int, address: str | None, todo: int) -> Engine:
    from adaptc.evidence.fleet import Serial

    if address and name != "ray":
        raise click.UsageError("--address goes with --engine ray")
    if name == "serial" or not todo:
        return Serial()
    if name == "ray":
        from adaptc.evidence.fleet_ray import Ray

        return Ray(jobs, address)
    from adaptc.evidence.fleet_local import Local, cores

    return Local(min(jobs or cores(), todo))


def _done(voice: Voice, planned: Plan, output: str, manifest: Any, engine: Engine) -> list[Result]:
    from adaptc.cli.pace import pace
    from adaptc.evidence.fleet import run

    results = []
    with (engine, pace(voice, len(planned.todo), planned.nbytes, "adapters") as step,
          closing(run(planned, output, manifest, engine)) as made):
        for result in made:
            results.append(result)
            step(result.bytes_before, result.status == "failed")
    return results


def _listed(voice: Voice, units: list[Unit], planned: Plan, output: str) -> int:
    """Say what a run would do."""
    todo = {j.name for j in planned.todo}
    rows = [(u.input, f"{output}/{u.name}", print_nbytes(u.nbytes), "to do" if u.name in todo else "done")
            for u in units]
    data = {"recipe": planned.order.spec, "output": output, "todo": len(todo), "done": len(planned.done),
            "bytes": planned.nbytes,
            "adapters": [{"input": u.input, "name": u.name, "bytes": u.nbytes, "todo": u.name in todo} for u in units]}
    voice.show(data, Table(("adapter", "output", ">bytes", "state"), rows),
               f"would run {planned.order.spec} on {count(todo, 'adapter')}, {print_nbytes(planned.nbytes)}; "
               f"{len(planned.done)} done already")
    return 0


def _account(voice: Voice, planned: Plan, results: list[Result], output: str, seconds: float, manifest: str) -> int:
    """Say what came of a run; return the exit code."""
    made = [r for r in results if r.status == "done"]
    failed = sorted((r for r in results if r.status == "failed"), key=lambda r: r.name)
    same = [r for r in results if r.status == "same"]
    before, after = sum(r.bytes_before for r in made), sum(r.bytes_after for r in made)
    already = len(planned.done) + len(same)
    rate = len(results) / seconds if results and seconds else 0.0
    data = {
        "recipe": planned.order.spec, "output": output, "manifest": manifest, "done": len(made), "already": already,
        "failed": len(failed), "bytes": {"before": before, "after": after}, "seconds": seconds, "rate": rate,
        "errors": [r.error for r in made],
        "failures": [{"name": r.name, "input": r.input, "reason": r.reason} for r in failed],
    }
    errors = [r.error for r in made if r.error is not None]
    peak = max((r.peak_bytes for r in results), default=0)
    rows = [(str(len(made)), str(already), str(len(failed)), print_nbytes(before), print_nbytes(after),
             spread(errors), number(rate), print_nbytes(peak) if peak else "-")]
    table = Table((">done", ">already", ">failed", ">bytes", ">now", ">error", ">a second", ">memory"), rows)
    smaller = f", {before / after:.3g}x smaller" if after and before > after else ""
    last = (f"wrote {count(made, 'adapter')} to {output}/{smaller}; manifest {manifest}"
            if results else f"nothing to do, {count(planned.done, 'adapter')} in {output}/ already")
    voice.show(data, f"{planned.order.spec} on {count(results, 'adapter')}" if results else "",
               table if results else "", Notes([f"{r.input}: {r.reason}" for r in failed], wrong=True), last)
    return 1 if failed else 0
