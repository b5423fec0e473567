"""adaptc calibrate: what the layers of a base model see, once, for every pass that asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import example, reading, speaking
from adaptc.cli.render import Facts, Notes, Table, Voice, spread

if TYPE_CHECKING:
    from adaptc.evidence.calibrate import Report, Seen


@click.command("calibrate", short_help="Collect statistics of a base model's inputs.",
               epilog=example("adaptc calibrate --base minilm/ --data text.txt -o stats.safetensors"))
@click.option("--base", required=True, metavar="DIR", help="Base model: folder, GGUF file or Hub id.")
@click.option("--data", required=True, type=click.Path(), metavar="FILE",
              help="Text (.txt), rows of `text TAB label` (.tsv), or JSON lines with text and label (.jsonl).")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="OUT",
              help="Where to write the statistics, as stats.safetensors.")
@click.option("--adapter", metavar="A", help="Run the model with this adapter on it.")
@click.option("--held-out", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True, metavar="F",
              help="Share of the passages whose statistics are kept apart, for errors that no pass has fitted.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="No more of the data than this.")
@click.option("--window", type=click.IntRange(min=2), default=256, show_default=True, metavar="N",
              help="Tokens a passage: text is cut into windows, rows are cut off.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N",
              help="Passages at a time.")
@click.option("--task", type=click.Choice(["lm", "classify", "embed"]),
              help="How the model runs; told by the adapter's head and the model if not said.")
@click.option("--diagonal", is_flag=True, help="Only E[x^2] of every input, not all of E[x x^T].")
@click.option("--gradients", is_flag=True, help="Also importance from the gradients at the adapter's factors.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers that fit, as q_proj; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No layers that fit, as lm_head; repeatable.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial, or fail (it is taken up without this too).")
@click.option("--force", is_flag=True, help="Replace an existing output, and drop a partial one of another request.")
@reading
@speaking
def command(output: str, adapter: str | None, resume: bool, force: bool, alpha: float | None, dialect: str | None,
            voice: Voice, **asked: Any) -> None:
    """Run the base model over data and collect, for every linear layer, the second moment of its inputs.

    Passes take the file as --calibration and run no model themselves. A part of the data is kept apart, and errors
    are reported on both. Interrupted runs go on where they were.
    """
    from adaptc.cli.reading import open_adapter
    from adaptc.evidence.calibrate import calibrate
    from adaptc.evidence.calibrate_request import Request

    opened = None if adapter is None else open_adapter(adapter, alpha, dialect).adapter
    request = Request(**{**asked, "data": Path(asked["data"])})
    with voice.progress() as progress:
        found = calibrate(request, Path(output), opened, force=force, resume=resume, progress=progress)
    _show(voice, request.base, output, found)


def _show(voice: Voice, base: str, output: str, found: Report) -> None:
    about = found.about
    layers = [{"name": s.key, "inputs": s.inputs, "tokens": s.tokens, "held_tokens": s.held_tokens,
               "shared": s.shared or None, "importance": s.importance} for s in found.layers]
    data = {"base": base, "output": output, "bytes": found.nbytes, "about": about, "layers": layers,
            "notes": list(found.notes)}
    held = f", {about['held_tokens']} in {about['held_passages']} kept apart" if about["held_passages"] else ""
    facts = Facts([("base", base), ("task", about["task"]),
                   ("tokens", f"{about['tokens']} in {about['passages']} passages{held}")])
    voice.show(data, facts, _table(found, voice.verbose), Notes(found.notes),
               f"wrote {output}: {print_nbytes(found.nbytes)}")


def _table(found: Report, each: bool) -> Table:
    from adaptc.grouping import grouped, layer_type

    def moments(some: list[Seen]) -> str:
        shared = sorted({s.shared if each else layer_type(s.shared) for s in some if s.shared})
        return f"as {', '.join(shared)}" if shared else "own"

    extra = ("importance",) if any(s.importance for s in found.layers) else ()
    rows = [(name, str(len(some)), spread([s.inputs for s in some]), spread([s.tokens for s in some]),
             spread([s.held_tokens for s in some]), moments(some),
             *("yes" if any(s.importance for s in some) else "-" for _ in extra))
            for name, some in grouped(found.layers, each).items()]
    return Table(("layer", ">count", ">inputs", ">tokens", ">held", "moments", *extra), rows, spare=(*extra, "held"))
