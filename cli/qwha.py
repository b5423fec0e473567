"""adaptc qwha: quantise a base model, and an adapter that takes back what that lost."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptc.bytesize import print_nbytes
from adaptc.cli.options import example, speaking
from adaptc.cli.render import Facts, Notes, Table, Voice, count, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adaptc.passes import Outcome
    from adaptc.quant.qwha import Fitted
    from adaptc.report import Row


@click.command("qwha", short_help="Quantise a base, with an adapter that takes back the loss.",
               epilog=example("adaptc qwha --base model/ --quant int3 --calibration stats.safetensors "
                              "--rank-budget 16 -o q3.adaptc.safetensors --write-base model-int3/"))
@click.option("--base", required=True, type=click.Path(), metavar="DIR",
              help="Base model: folder, safetensors or GGUF file, or Hub id.")
@click.option("--quant", required=True, metavar="Q",
              help="nf4, int2, int3, int4 or int8, or the folder of a quantised model.")
@click.option("--calibration", required=True, type=click.Path(), metavar="FILE",
              help="Statistics of the inputs (adaptc calibrate).")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="OUT", help="Where to write the adapter.")
@click.option("--rank-budget", type=int, metavar="R", help="R (out + in) coefficients a layer, as a rank-R LoRA has.")
@click.option("--density", type=float, metavar="D", help="This share of a layer's entries instead, as 0.03.")
@click.option("--from-adapter", type=click.Path(), metavar="A", help="A trained adapter that the result absorbs.")
@click.option("--write-base", type=click.Path(), metavar="DIR",
              help="Also write the quantised base, decoded, as a model folder: the adapter is right with it alone.")
@click.option("--group", type=int, default=64, show_default=True, metavar="N", help="Weights that share a scale.")
@click.option("--gptq", is_flag=True, help="Feed rounding errors back to the columns that follow.")
@click.option("--allocation", type=click.Choice(["activation", "weight", "even"]), default="activation",
              show_default=True, help="What the rows of a layer share its coefficients by.")
@click.option("--selection", type=click.Choice(["energy", "coefficient"]), default="energy", show_default=True,
              help="Keep the largest |x0| sqrt(G_jj), or |x0|.")
@click.option("--rounds", type=int, default=2, show_default=True, metavar="N",
              help="Choose coefficients in N steps, each where the error left is steepest (1: the paper's).")
@click.option("--t", type=float, default=1.0, show_default=True, metavar="T", help="Power of AdaAlloc's shares.")
@click.option("--damping", type=float, default=1e-4, show_default=True, metavar="L",
              help="Added to the statistics, times their mean diagonal.")
@click.option("--no-refine", is_flag=True, help="Keep the coefficients' own values.")
@click.option("--basis", type=click.Choice(["walsh", "none"]), default="walsh", show_default=True,
              help="none: entries of the weights themselves.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True,
              help="Store values in this dtype.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only layers that fit, as q_proj; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No layers that fit; repeatable.")
@click.option("--to", type=click.Choice(["adaptc", "qhft"]), default="adaptc", show_default=True,
              help="adaptc's container, or a checkpoint for the official code (power-of-two widths).")
@click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores).")
@click.option("--force", is_flag=True, help="Replace existing outputs (never an input).")
@speaking
def command(base: str, calibration: str, output: str, from_adapter: str | None, write_base: str | None, to: str,
            jobs: int, force: bool, no_refine: bool, rounds: int, voice: Voice, **given: Any) -> None:
    """Quantise the linear layers of a base model and fit coefficients in a Walsh-Hadamard basis to the loss.

    Every layer then computes WQ x + F (U x) with few coefficients F. Errors at the outputs are shown on the
    calibration tokens and on those kept aside. The adapter belongs to the quantised base and is refused on another.
    """
    from adaptc.cli.reading import about, open_adapter, open_base, open_calibration
    from adaptc.errors import UsageError
    from adaptc.formats import save
    from adaptc.formats.atomic import check
    from adaptc.passes import Context
    from adaptc.quant.qwha import QWHA
    from adaptc.quant.qwha_base import layers, rewritten

    options = {k: v for k, v in given.items() if v not in (None, ())}
    step = QWHA(refine=not no_refine, rounds=1 if no_refine else rounds, **options)
    if write_base is not None and Path(step.quant).is_dir():
        raise UsageError(f"{step.quant} is the quantised base already, --write-base has nothing to write")
    out, copy = Path(output), None if write_base is None else Path(write_base)
    inputs = tuple(map(Path, (base, calibration, *([from_adapter] if from_adapter else []))))
    check(out, force=force, folder=not out.suffix, inputs=inputs)
    with about(base):
        weights, seen = open_base(base), open_calibration(calibration)
    assert weights is not None
    assert seen is not None
    start = open_adapter(from_adapter).adapter if from_adapter else None
    with voice.progress() as progress, about(base):
        adapter = layers(weights, seen, start)
        ctx = Context(weights, seen, jobs=jobs, progress=progress)
        with rewritten(weights, copy, force=force) if copy else nullcontext() as put:
            outcome, found = step.measured(adapter, ctx, put)
            save(outcome.adapter, out, dialect=to, force=force, inputs=inputs)
    files = [p for p in out.rglob("*") if p.is_file()] if out.is_dir() else [out]
    _show(voice, outcome, found, base, output, write_base, sum(p.stat().st_size for p in files))


def _show(voice: Voice, outcome: Outcome, found: Mapping[str, Fitted], base: str, output: str,
          write_base: str | None, nbytes: int) -> None:
    rows = [r for r in outcome.rows if r.key in found]
    left = [r for r in outcome.rows if r.key not in found]
    spec, made_for = outcome.adapter.history[-1].spec, outcome.adapter.origin.notes[-1]
    data = {
        "base": base, "output": output, "write_base": write_base, "spec": spec, "bytes": nbytes,
        "fingerprint": outcome.adapter.origin.fingerprint, "notes": [made_for],
        "outputs": {s: _rms(rows, found, s) for s in ("train", "held")},
        "modules": [{"name": r.key, "coefficients": found[r.key].delta.values.numel(), "bytes": r.nbytes_after,
                     "error": r.error, "outputs": found[r.key].outputs} for r in rows],
        "left_alone": [{"name": r.key, "why": r.note} for r in left],
    }
    coefficients = sum(f.delta.values.numel() for f in found.values())
    entries = sum(f.delta.shape[0] * f.delta.shape[1] for f in found.values())
    facts = Facts([("quantiser", made_for.removeprefix("made for its base quantised by ")), ("spec", spec),
                   ("coefficients", f"{coefficients}, {100 * coefficients / max(entries, 1):.2f} % of the weights")])
    notes = [f"{made_for}: right on that alone" + ("" if write_base else " (--write-base writes it)")]
    if left:
        notes.append(f"{count(left, 'module')} left alone, as {left[0].key}: {left[0].note}")
    wrote = f"wrote {output}: {print_nbytes(nbytes)}" + (f", and {write_base}/" if write_base else "")
    held = _rms(rows, found, "held")
    last = f"{wrote}, {number(_rms(rows, found, 'train'))} of the quantiser's error at the outputs is left"
    voice.show(data, facts, _table(rows, found, voice.verbose), Notes(notes),
               last + ("" if held is None else f", {number(held)} held out"))


def _rms(rows: Sequence[Row], found: Mapping[str, Fitted], split: str) -> float | None:
    """Return the root mean square of the layers' relative output errors, None where some have none."""
    outputs = [f.outputs for f in (found[r.key] for r in rows)]
    values = [o[split] for o in outputs if split in o]  # type: ignore[index]
    return (sum(v * v for v in values) / len(values)) ** 0.5 if values and len(values) == len(outputs) else None


def _table(rows: Sequence[Row], found: Mapping[str, Fitted], each: bool) -> Table:
    from adaptc.grouping import grouped

    def cells(name: str, some: Sequence[Row]) -> tuple[str, ...]:
        errors = [_rms(some, found, split) for split in ("train", "held")]
        return (name, str(len(some)), str(sum(found[r.key].delta.values.numel() for r in some)),
                print_nbytes(sum(r.nbytes_after for r in some)), *("-" if e is None else number(e) for e in errors))

    lines = [cells(name, some) for name, some in grouped(rows, each).items()]
    columns = ("module", ">count", ">coefficients", ">bytes", ">output error", ">held out")
    return Table(columns, lines, cells("all", rows) if len(lines) > 1 else None)
