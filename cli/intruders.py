"""What `adaptc inspect --intruders` shows: intruder dimensions by module, before and after a pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.bytesize import print_nbytes
from adaptc.cli.render import Block, Facts, Notes, Table, Voice, count, listed, number
from adaptc.errors import UsageError
from adaptc.grouping import grouped

if TYPE_CHECKING:
    from adaptc.cli.reading import Opened
    from adaptc.squeeze.intruders import Module


def show_intruders(voice: Voice, opened: Opened, base: str | None, after: str | None, cache: str | None, top: int,
                   cosine: float, jobs: int) -> None:
    """Measure and show the intruders of an adapter on its base, and of what the passes `after` make of it."""
    from adaptc.cli.reading import about, open_base
    from adaptc.passes import Context
    from adaptc.pipeline import Pipeline
    from adaptc.spec import parse
    from adaptc.squeeze.eigenbase import Spectra
    from adaptc.squeeze.intruders import inspect_intruders

    weights = open_base(base)
    if weights is None:
        raise UsageError("intruders are dimensions of the base weights too", hint="--base DIR, the model's folder")
    spectra = Spectra(Path(cache) if cache is not None else None)
    with voice.progress() as progress, about(opened.name):
        ctx = Context(weights, jobs=jobs, progress=progress, cache=spectra.folder)
        before = inspect_intruders(opened.adapter, ctx, spectra, top, cosine)
        outcome = Pipeline(parse(after))(opened.adapter, ctx) if after is not None else None
        then = inspect_intruders(outcome.adapter, ctx, spectra, top, cosine) if outcome is not None else None
    held = sum(p.stat().st_size for p in spectra.folder.glob("*.safetensors"))
    kept = (f"spectra of the base: {spectra.computed} computed, {spectra.read} read again, {print_nbytes(held)} in "
            f"{spectra.folder}")
    data: dict[str, Any] = {
        "input": opened.name, "base": base, "top": top, "cosine": cosine, "before": [_module(m) for m in before],
        "after": None if then is None else {"spec": after, "error": outcome.error if outcome else None,
                                            "modules": [_module(m) for m in then]},
        "spectra": {"computed": spectra.computed, "read": spectra.read, "bytes": held, "folder": str(spectra.folder)},
    }
    facts = Facts([("base", base), ("intruders", f"largest |cosine| with W0's left singular vectors below {cosine:g}, "
                                                 f"among the {top} leading ones of W0 + dW")])
    notes = [kept]
    if outcome is not None:
        notes.insert(0, f"after {after}: relative error of dW {number(outcome.error)}")
    voice.show(data, *_blocks(facts, before, then, voice.verbose), Notes([*_said(before), *notes]))


def _blocks(facts: Facts, before: Sequence[Module], then: Sequence[Module] | None, each: bool) -> list[Block]:
    later = {m.key: m for m in then or ()}
    looked = [m for m in before if m.cosines]
    rows = [_row(name, some, later) for name, some in grouped(looked, each).items()]
    columns = ["module", ">count", ">intruders", ">share of ||W||^2", ">least cosine"]
    if then is not None:
        columns += [">now", ">share", ">least"]
    return [facts, Table(columns, rows, _row("all", looked, later) if len(rows) > 1 else None)]


def _row(name: str, some: Sequence[Module], later: dict[str, Module]) -> tuple[str, ...]:
    return (name, str(len(some)), *_cells(some),
            *(_cells([later[m.key] for m in some if m.key in later]) if later else ()))


def _cells(some: Sequence[Module]) -> tuple[str, str, str]:
    """Return the number of intruders, their mean share of ||W||^2, and the least cosine."""
    return (str(sum(m.count for m in some)), number(sum(m.share for m in some) / len(some)) if some else "-",
            number(min((c for m in some for c in m.cosines), default=None)))


def _said(modules: Sequence[Module]) -> list[str]:
    about: dict[str, list[str]] = {}
    for m in modules:
        if m.note:
            about.setdefault(m.note, []).append(m.key)
    return [f"{len(keys)} of {count(modules, 'module')}: {note} ({listed(keys, 2)})" for note, keys in about.items()]


def _module(m: Module) -> dict[str, Any]:
    return {"name": m.key, "shape": list(m.shape), "intruders": m.count, "share": m.share, "cosines": list(m.cosines),
            "note": m.note}
