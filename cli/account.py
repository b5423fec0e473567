"""What a pass made of an adapter, for people and as JSON: sizes on disk, measured errors, what was left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptc.bytesize import print_nbytes
from adaptc.cli.reading import Opened
from adaptc.cli.render import Block, Notes, Table, Voice, count, listed, number, spread
from adaptc.cli.writing import Target
from adaptc.grouping import grouped

if TYPE_CHECKING:
    from adaptc.passes import Outcome
    from adaptc.report import Row


def account(voice: Voice, opened: Opened, outcome: Outcome, target: Target, nbytes: int, written: bool,
            losses: Sequence[str], *, table: Table | None = None, more: Mapping[str, Any] | None = None) -> None:
    """Show the report of one transformation; `nbytes` are those of the output.

    `table` stands in place of that of ranks and errors; `more` is added to the JSON.
    """
    adapter, rows, spec = outcome.adapter, outcome.rows, ",".join(s.spec for s in _new_steps(opened, outcome))
    carried = {**adapter.replaced, **adapter.extra}
    notes = [*target.notes, *outcome.notes, *_counted(rows)]
    if carried:
        size = print_nbytes(sum(t.nbytes for t in carried.values()))
        notes.append(f"carried unchanged: {count(carried, 'tensor')}, {size} ({listed(list(carried))})")
    ratio = opened.nbytes / nbytes if nbytes else 0.0
    data: dict[str, Any] = {
        "input": opened.name, "output": str(target.out), "written": written, "spec": spec,
        "dialect": {"input": opened.format.id, "output": target.format.id},
        "bytes": {"before": opened.nbytes, "after": nbytes}, "ratio": ratio, "error": outcome.error,
        "modules": [_row(r) for r in rows], "carried": list(carried), "notes": notes, "losses": list(losses),
        **(more or {}),
    }
    near = 0.995 < ratio < 1.005
    change = "same size" if near else f"{ratio:.3g}x smaller" if ratio > 1 else f"{1 / ratio:.3g}x larger"
    verb = "wrote" if written else "would write"
    last = (f"{verb} {target.shown}: {print_nbytes(nbytes)}, was {print_nbytes(opened.nbytes)} ({change}), "
            f"relative error {number(outcome.error)}")
    shown = table or _table(rows, voice.verbose, outcome.error)
    blocks: list[Block] = [f"{opened.name}: {spec}", shown, Notes(notes),
                           Notes([f"lost: {loss}" for loss in losses], wrong=True), last]
    voice.show(data, *blocks)


def _new_steps(opened: Opened, outcome: Outcome) -> Sequence[Any]:
    return outcome.adapter.history[len(opened.adapter.history) :]


def _row(row: Row) -> dict[str, Any]:
    return {"name": row.key, "kind": row.kind, "rank": {"before": row.rank_before, "after": row.rank_after},
            "bytes": {"before": row.nbytes_before, "after": row.nbytes_after}, "error": row.error, "energy": row.energy,
            "note": row.note}


def _table(rows: Sequence[Row], each: bool, error: float) -> Table:
    from adaptc.report import total_error

    def cells(name: str, some: Sequence[Row], total: float) -> tuple[str, ...]:
        before, after = sum(r.nbytes_before for r in some), sum(r.nbytes_after for r in some)
        return (name, str(len(some)), spread([r.rank_before for r in some]), spread([r.rank_after for r in some]),
                print_nbytes(before), print_nbytes(after), number(total), number(max(r.error for r in some)))

    columns = ("module", ">count", ">rank", ">now", ">bytes", ">now", ">error", ">worst")
    lines = [cells(name, some, total_error(some)) for name, some in grouped(rows, each).items()]
    return Table(columns, lines, cells("all", rows, error) if len(lines) > 1 else None)


def _counted(rows: Sequence[Row]) -> list[str]:
    """Return the notes of rows, each once, with the modules it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            about.setdefault(row.note, []).append(row.key)
    counts = Counter({note: len(keys) for note, keys in about.items()})
    return [f"{n} of {count(rows, 'module')}: {note} ({listed(about[note], 2)})" for note, n in counts.most_common()]
