"""The one renderer: tables and facts with rich on a terminal, aligned text in a pipe, JSON when asked, progress."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import click

from adaptc.errors import one_line


@dataclass(frozen=True)
class Table:
    """Columns (a title that starts with ">" is set to the right), rows of text, and a last row of totals.

    `spare` names columns that a narrow terminal does without, the least missed first.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] | None = None
    spare: Sequence[str] = ()


@dataclass(frozen=True)
class Facts:
    """Labelled lines; a fact without a value is left out."""

    pairs: Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Notes:
    """Things worth knowing, one a line. `wrong` marks what needs the reader's attention."""

    lines: Sequence[str]
    wrong: bool = False


Block: TypeAlias = Table | Facts | Notes | str
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Voice:
    """How a command speaks: as JSON, not at all, or in text; progress only to a person."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def show(self, data: Mapping[str, Any], *blocks: Block) -> None:
        """Print `data` as one JSON document, or `blocks` as text, or nothing."""
        if self.json:
            click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))
        elif not self.quiet:
            shown = [b for b in blocks if not _empty(b)]
            (_show_rich if sys.stdout.isatty() else _show_text)(shown)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """Yield a callback (label, done, total) that draws a bar on stderr, None where nobody watches."""
        if self.json or self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def step(label: str, done: int, total: int) -> None:
                if label not in tasks or done == 1:
                    for old in tasks.values():
                        bar.update(old, visible=False)
                    tasks[label] = bar.add_task(label, total=total)
                bar.update(tasks[label], completed=done)

            yield step


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people: 0, 0.0432, 1.2e-07, inf; "-" where there is none."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.{digits}g}"


def spread(values: Sequence[float | int | None], digits: int = 3) -> str:
    """Return the one value, or the lowest and highest: "8", "3..17"; "-" where there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    low, high = (str(v) if isinstance(v, int) else number(v, digits) for v in (min(known), max(known)))
    return low if low == high else f"{low}..{high}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names joined by commas, the tail of a long list as a count."""
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail


def count(things: Sized, noun: str) -> str:
    """Return "1 tensor", "2 tensors"."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _empty(block: Block) -> bool:
    if isinstance(block, Table):
        return not block.rows
    return not (block.lines if isinstance(block, Notes) else block.pairs if isinstance(block, Facts) else block)


def _spaced(blocks: Sequence[Block]) -> Iterator[tuple[bool, Block]]:
    """Yield every block with whether an empty line goes before it."""
    for at, block in enumerate(blocks):
        yield at > 0 and not (isinstance(block, Notes) and isinstance(blocks[at - 1], Notes)), block


def _cells(table: Table, width: int | None = None) -> tuple[list[str], list[list[str]], list[str] | None]:
    """Return titles, rows and total as printable text; `width` drops spare columns until the table fits."""
    rows = [list(table.columns), *(map(one_line, row) for row in table.rows), *([table.total] if table.total else [])]
    columns = [list(column) for column in zip(*rows, strict=True)]
    for spare in table.spare:
        if width is not None and sum(max(map(len, c)) + 2 for c in columns) > width:
            columns = [c for c in columns if c[0].lstrip(">") != spare]
    titles, *body = (list(row) for row in zip(*columns, strict=True))
    return titles, body[: len(table.rows)], body[-1] if table.total else None


def _show_text(blocks: Sequence[Block]) -> None:
    for spaced, block in _spaced(blocks):
        if spaced:
            click.echo()
        if isinstance(block, Table):
            titles, rows, total = _cells(block)
            body = [[t.lstrip(">") for t in titles], *rows, *([total] if total else [])]
            widths = [max(map(len, column)) for column in zip(*body, strict=True)]
            for row in body:
                cells = (c.rjust(w) if t[0] == ">" else c.ljust(w) for c, w, t in zip(row, widths, titles, strict=True))
                click.echo("  ".join(cells).rstrip())
        elif isinstance(block, Facts):
            known = [(label, value) for label, value in block.pairs if value]
            width = max(len(label) for label, _ in known)
            for label, value in known:
                click.echo(f"{label:<{width}}  {one_line(value)}")
        else:
            for line in block.lines if isinstance(block, Notes) else [block]:
                click.echo(_mark(block) + one_line(line))


def _mark(block: Notes | str) -> str:
    return "" if isinstance(block, str) else "! " if block.wrong else "- "


def _show_rich(blocks: Sequence[Block]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False)
    for spaced, block in _spaced(blocks):
        if spaced:
            console.print()
        if isinstance(block, Table):
            titles, rows, total = _cells(block, console.width)
            grid = Grid(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
            for title in titles:
                right = title.startswith(">")
                grid.add_column(title.lstrip(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
            for row in rows:
                grid.add_row(*map(Text, row))
            if total:
                grid.add_section()
                grid.add_row(*(Text(cell, style="bold") for cell in total))
            console.print(grid)
        elif isinstance(block, Facts):
            facts = Grid.grid(padding=(0, 2))
            facts.add_column(style="dim", no_wrap=True)
            for label, value in block.pairs:
                if value:
                    facts.add_row(label, Text(one_line(value)))
            console.print(facts)
        else:
            style = "bold" if isinstance(block, str) else "red" if block.wrong else "dim"
            for line in block.lines if isinstance(block, Notes) else [block]:
                console.print(Text(_mark(block) + one_line(line), style=style))


def _plain(value: Any) -> Any:
    """Return JSON values: NaN and infinities, which JSON has not, become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
