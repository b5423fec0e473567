"""Run a base model over text and collect what its linear layers see: the file that passes take as --calibration."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc import __version__
from adaptc.adapter import Adapter
from adaptc.calibration import write_calibration
from adaptc.errors import UsageError
from adaptc.evidence.calibrate_request import Request, model_digest, request_digest, task_of
from adaptc.evidence.calibrate_run import Run, check_labels, fitted, settle_padding
from adaptc.evidence.calibrate_state import State
from adaptc.evidence.gradients import KEEP
from adaptc.evidence.model import labels_of, load_model
from adaptc.evidence.passages import Passage, batches, read_passages, split_passages
from adaptc.evidence.rows import read_rows

_SAVE_SHARE = 20.0  # a save waits this many times as long as the last one took
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Seen:
    """One layer of the result: its inputs, the tokens it saw, and whose moments it shares ("" for its own)."""

    key: str
    inputs: int
    tokens: int
    held_tokens: int
    shared: str
    importance: bool


@dataclass(frozen=True)
class Report:
    """What a calibration collected (`about` is in the file too), and what is worth knowing about it."""

    about: dict[str, Any]
    layers: tuple[Seen, ...]
    nbytes: int
    notes: tuple[str, ...]


def calibrate(request: Request, out: Path, adapter: Adapter | None = None, *, force: bool = False,
              resume: bool = False, progress: Progress | None = None, every: float = 60.0) -> Report:
    """Run the base model over the data and write its statistics to `out`; return what they are of.

    Deterministic: the same request on the same machine gives the same bytes. The state goes to `out`.partial every
    `every` seconds (less often where writing takes long); a run with the same request goes on from there and ends
    with the same bytes, another one is refused unless `force`. `resume` refuses to start from nothing. Raises
    UsageError for requests that make no sense, NeedsError and FormatError for models and data that do not.
    """
    from adaptc.formats.atomic import check

    check(out, force=force, inputs=(request.data,))
    if request.gradients and adapter is None:
        raise UsageError("gradients are taken at an adapter's factors, and there is no adapter", hint="--adapter A")
    task = request.task or task_of(request.base, adapter)
    if request.gradients and task == "embed":
        raise UsageError("gradients need a loss, and embed has none", hint="--task lm or --task classify")
    rows, data = read_rows(request.data), hashlib.sha256(request.data.read_bytes()).hexdigest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # parameters that the base lacks, as a pooler, are drawn
        loaded = load_model(request.base, task, labels_of(adapter) if adapter is not None else None)
    adapter = None if adapter is None else fitted(adapter, loaded, request.gradients)
    pad = settle_padding(loaded, task, request.window)
    train, held = split_passages(read_passages(rows, loaded.tokenizer, task, request.window, request.max_tokens),
                                 request.held_out)
    if request.gradients:
        check_labels(train, loaded, task)
    else:  # sums do not depend on the order, and passages of one length need no padding; averages of batches do
        train, held = (sorted(some, key=lambda p: len(p.ids)) for some in (train, held))
    base = model_digest(loaded.model)
    run = Run(request, task, loaded, adapter)
    state = State(out, request_digest(request, task, base, adapter, [*train, *held]), run)
    resumed = state.load(force, resume)
    _work(run, state, batches(train, request.batch, pad), batches(held, request.batch, pad), resumed, progress, every)
    about = _about(request, run, state, train, held) | {"base_digest": base, "data": data}
    write_calibration(out, state.train, about, held=state.held, gradients=run.gradients, force=force)
    state.remove()
    return _report(out, run, state, about, resumed)


def _work(run: Run, state: State, train: list[Any], held: list[Any], resumed: int, progress: Progress | None,
          every: float) -> None:
    """Run all batches from number `resumed` on, saving the state now and then; finish both sides."""
    total, saved = len(train) + len(held), time.monotonic()
    with run.ready():
        for done, batch in enumerate([*train, *held][resumed:], resumed + 1):
            if done > len(train) and not state.train:
                state.turn()
            run.step(batch, learn=done <= len(train))
            if progress:
                progress("calibrate", done, total)
            if done < total and time.monotonic() - saved >= max(every, _SAVE_SHARE * state.cost):
                state.save(done)
                saved = time.monotonic()
    state.turn()


def _about(request: Request, run: Run, state: State, train: list[Passage], held: list[Passage]) -> dict[str, Any]:
    tokens, held_tokens = (sum(len(p.ids) for p in some) for some in (train, held))
    moments = run.moments
    counts = {}
    for key, leader in moments.leaders.items():
        own = {"tokens": state.counts.get(leader, 0), "held_tokens": moments.counts.get(leader, 0) if held else 0}
        if own != {"tokens": tokens, "held_tokens": held_tokens}:
            counts[key] = own
    about: dict[str, Any] = {
        "version": __version__, "base": Path(request.base).name, "task": run.task, "window": request.window,
        "data_name": request.data.name,
        "tokens": tokens, "held_tokens": held_tokens, "passages": len(train), "held_passages": len(held),
        "shared": {k: v for k, v in moments.leaders.items() if k != v}, "counts": counts,
        "adapted": run.adapter is not None,
    }
    if run.importance is not None:
        about["gradients"] = {"steps": run.importance.steps, "skipped": run.importance.skipped, "keep": KEEP}
    return about


def _report(out: Path, run: Run, state: State, about: dict[str, Any], resumed: int) -> Report:
    layers = []
    for key, leader in run.moments.leaders.items():
        own = about["counts"].get(key, about)
        moment = state.train[leader] if leader in state.train else state.held[leader]
        layers.append(Seen(key, len(moment), own["tokens"], own["held_tokens"],
                           "" if leader == key else leader, key in run.gradients))
    notes = [f"went on after {resumed} batches of an earlier run"] if resumed else []
    if run.adapter is not None:
        notes.append("inputs are those of the model with the adapter")
    silent = [k for k in run.moments.layers if k not in run.moments.leaders]
    if silent:
        notes.append(f"{len(silent)} linear layers were never called, as {silent[0]}")
    thin = [s for s in layers if s.tokens < s.inputs and not run.moments.diagonal]
    if thin:
        notes.append(f"{len(thin)} of {len(layers)} layers saw fewer tokens than they have inputs, as {thin[0].key}: "
                     f"{thin[0].tokens} for {thin[0].inputs}")
    if run.importance is not None:
        apart = len(run.adapter.deltas) if run.adapter is not None else 0
        notes += [f"{apart} deltas are not low-rank factors of a watched layer, no importance there"] * bool(apart)
        skipped = run.importance.skipped
        notes += [f"{skipped} batches had gradients that are not finite and were left out"] * bool(skipped)
    return Report(about, tuple(layers), out.stat().st_size, tuple(notes))
