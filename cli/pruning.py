"""What the modes of adaptc prune do once their inputs are named, and how they report it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adaptc.bytesize import print_nbytes
from adaptc.cli.reading import Opened, about, open_calibration
from adaptc.cli.render import Notes, Table, Voice, count, number
from adaptc.errors import NeedsError, UsageError

if TYPE_CHECKING:
    from adaptc.adapter import Adapter
    from adaptc.prune.groups import Kind
    from adaptc.prune.loraprune import Options, Pruned

_GROUPS: tuple[Kind, ...] = ("heads", "ffn")
KINDS = {"heads": "attention heads", "ffn": "FFN channels", "other": "everything else"}


def prune_model(base: str, opened: Opened | None, output: str | None, voice: Voice, *, calibration: str | None,
                schedule: int | None, data: str | None, max_tokens: int | None, window: int, heads_only: bool,
                ffn_only: bool, force: bool, dry_run: bool, **options: Any) -> None:
    """Prune a model and its adapter in one step, or in the steps of a schedule, and report it."""
    from adaptc.prune.loraprune import Options, open_model, prune
    from adaptc.prune.schedule import in_steps

    if heads_only and ffn_only:
        raise UsageError("--heads-only and --ffn-only leave nothing to prune")
    chosen = Options(heads=not ffn_only, ffn=not heads_only, **options)
    if opened is None and chosen.ratio and chosen.criterion in ("loraprune", "adapter"):
        raise NeedsError(f"criterion {chosen.criterion} needs an adapter", hint="--adapter A, or another --criterion")
    if (schedule is None) != (data is None):
        raise UsageError("--schedule and --data go together", hint="it calibrates anew on the text before each step")
    if schedule is not None and calibration is not None:
        raise UsageError("--schedule calibrates anew before each step and takes no --calibration")
    out = None if output is None or dry_run else Path(output)
    _check(output, base, opened, force)
    statistics = open_calibration(calibration)
    adapter = opened.adapter if opened is not None else None
    inputs = opened.inputs if opened is not None else ()
    told = {"base": base, "base_model": adapter.origin.base_model if adapter is not None else None}
    with voice.progress() as progress, about(base), model_folder(base) as folder:
        if schedule is None:
            done = prune(open_model(folder, chosen.unit), adapter, chosen, statistics, out=out, about=told,
                         force=force, inputs=inputs, progress=progress)
        else:
            from adaptc.evidence.calibrate import calibrate
            from adaptc.evidence.calibrate_request import Request

            def measure(model: Path, tuned: Adapter | None, statistics: Path) -> None:
                calibrate(Request(str(model), Path(str(data)), max_tokens=max_tokens, window=window,
                                  diagonal=not chosen.refit, gradients=chosen.criterion == "loraprune"),
                          statistics, tuned, progress=progress)

            done = in_steps(folder, adapter, chosen, schedule, measure, out=out, about=told, force=force,
                            inputs=inputs, progress=progress)
    _report(voice, base, output, chosen, done, written=out is not None)


def recover_adapter(pruned: str, index_map: str | None, out: Path, voice: Voice, *, force: bool, dry_run: bool) -> None:
    """Write an adapter of a pruned model as one of the whole, in its own dialect."""
    from adaptc.cli.account import account
    from adaptc.cli.reading import open_adapter
    from adaptc.cli.writing import target
    from adaptc.delta import kind
    from adaptc.passes import Outcome
    from adaptc.prune.index_map import NAME, read_map
    from adaptc.prune.recover import recover
    from adaptc.prune.slice import rebased
    from adaptc.report import Row, energy_of, rank_of

    opened = open_adapter(pruned)
    beside = opened.source.path if opened.source.path.is_dir() else opened.source.file.parent
    where = Path(index_map) if index_map is not None else beside.resolve().parent / NAME
    with about(str(where)):
        cuts, told = read_map(where)
    place = target(opened, str(out), "recovered", None, force)
    with about(pruned):
        whole = recover(opened.adapter, cuts)
    name = told.get("base_model") or told.get("base")
    whole = rebased(whole, str(name) if name else None)
    rows = tuple(Row(k, kind(before), rank_of(before), rank_of(whole.deltas[k]), before.nbytes, whole.deltas[k].nbytes,
                     0.0, energy_of(before)) for k, before in opened.adapter.deltas.items())
    losses = place.losses(whole, True)
    nbytes = place.size_of(whole) if dry_run else place.write(whole)
    account(voice, opened, Outcome(whole, rows), place, nbytes, not dry_run, losses)


def prune_channels(opened: Opened, ratio: float, out: Path, voice: Voice, *, force: bool, dry_run: bool) -> None:
    """Drop the weakest channels of an adapter alone, and write it where they need not be stored."""
    from adaptc.cli.account import account
    from adaptc.cli.writing import target
    from adaptc.passes import Context
    from adaptc.pipeline import Pipeline
    from adaptc.prune.channels import Channels

    step = Channels(ratio=ratio)
    place = target(opened, str(out), "channels", "adaptc" if out.suffix else None, force)
    with voice.progress() as progress, about(opened.name):
        outcome = Pipeline((step,))(opened.adapter, Context(size_of=place.size_of, progress=progress))
        losses = place.losses(outcome.adapter, False)
    nbytes = place.size_of(outcome.adapter) if dry_run else place.write(outcome.adapter)
    account(voice, opened, outcome, place, nbytes, not dry_run, losses)


@contextmanager
def model_folder(base: str) -> Iterator[Path]:
    """Yield the folder of a base model, given as such, as a Hub id, or as a GGUF file, which is decoded."""
    from adaptc.hub import fetch, is_hub_id

    path = Path(base)
    if path.suffix != ".gguf":
        if not path.exists() and is_hub_id(base):
            path = fetch(base, ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"))
        if not path.is_dir():
            raise NeedsError(f"{base} is no folder", hint="--base wants a model folder, a GGUF file, or a Hub id")
        yield path
        return
    from adaptc.evidence.unpack import unpack_gguf

    with TemporaryDirectory(prefix="adaptc-") as folder:
        unpack_gguf(path, Path(folder))
        yield Path(folder)


def _check(output: str | None, base: str, opened: Opened | None, force: bool) -> None:
    from adaptc.formats.atomic import check

    if output is not None:
        inputs = (Path(base), *(opened.inputs if opened is not None else ()))
        check(Path(output), force=force, folder=True, inputs=inputs)


def _report(voice: Voice, base: str, output: str | None, options: Options, done: Pruned, written: bool) -> None:
    groups = [k for k in _GROUPS if getattr(options, k)]
    prunable, total = done.removed(*groups), done.removed()
    errors: dict[str, dict[str, float | None]] = {
        k: {"train": done.error(k, "train"), "held": done.error(k, "held")} for k in _GROUPS}
    data: dict[str, Any] = {
        "base": base, "output": output, "written": written, "spec": str(options),
        "removed": {"groups": prunable, "model": total}, "notes": list(done.notes),
        "kinds": [{"kind": s.kind, "units": _pair(s.units), "parameters": _pair(s.parameters),
                   "bytes": _pair(s.nbytes), "output_error": errors.get(s.kind)} for s in done.shares],
        "parameters": _pair(_sums(done, "parameters")), "bytes": _pair(_sums(done, "nbytes")),
        "adapter_bytes": None if done.adapter is None else done.adapter.nbytes,
    }
    rows = [_cells(KINDS[s.kind], s.units, s.parameters, s.nbytes, errors.get(s.kind, {})) for s in done.shares]
    last_row = _cells("all", (0, 0), _sums(done, "parameters"), _sums(done, "nbytes"), {})
    columns = ("kind", ">units", ">now", ">parameters", ">now", ">bytes", ">now", ">error", ">held out")
    width = len(columns) if done.losses else len(columns) - 2
    notes = list(done.notes)
    if done.adapter is not None:
        size = print_nbytes(done.adapter.nbytes)
        notes.append(f"the adapter's {count(done.adapter.deltas, 'module')} take {size} now")
    what = "zeroed" if options.masked else "removed"
    last = (f"{'wrote' if written else 'would write'} {output or 'the model'}: {what} {prunable:.1%} of "
            f"{' and '.join(KINDS[k] for k in groups)}, {total:.1%} of the model")
    table = Table(columns[:width], [r[:width] for r in rows], last_row[:width], spare=("held out", "bytes"))
    voice.show(data, f"{base}: {options}", table, Notes(notes), last)


def _pair(values: tuple[int, int]) -> dict[str, int]:
    return {"before": values[0], "after": values[1]}


def _sums(done: Pruned, field: str) -> tuple[int, int]:
    before, after = zip(*(getattr(s, field) for s in done.shares), strict=True)
    return sum(before), sum(after)


def _cells(name: str, units: tuple[int, int], parameters: tuple[int, int], nbytes: tuple[int, int],
           errors: Mapping[str, float | None]) -> tuple[str, ...]:
    shown = [str(n) if units[0] else "-" for n in units]
    told = [number(errors.get(split)) for split in ("train", "held")]
    return (name, *shown, *(f"{n:,}" for n in parameters), *map(print_nbytes, nbytes), *told)
