"""How far a long run is: counted, with rate and time left; a bar for a person, now and then a line for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from adaptc.cli.render import Voice

EVERY = 30.0  # seconds between lines in a log


@contextmanager
def pace(voice: Voice, total: int, nbytes: int, noun: str) -> Iterator[Callable[[int, bool], None]]:
    """Yield a callback (bytes read, failed) for every item of `total` that is finished; `nbytes` are those of all.

    Time left is counted by bytes. Says nothing with --json or --quiet.
    """
    start = told = time.monotonic()
    done = failed = read = 0

    def text() -> str:
        spent = time.monotonic() - start
        rate = done / spent if spent else 0.0
        ahead = (nbytes - read) / read * spent if read else 0.0
        wrong = f", {failed} failed" if failed else ""
        return f"{done}/{total} {noun}{wrong}, {rate:.3g}/s, {clock(ahead)} left"

    def step(size: int, wrong: bool) -> None:
        nonlocal done, failed, read, told
        done, failed, read = done + 1, failed + wrong, read + size
        if draw is not None:
            draw(done, text())
        elif speaks and time.monotonic() > told + EVERY:
            told = time.monotonic()
            click.echo(f"adaptc: {text()}", err=True)

    speaks, draw = not (voice.json or voice.quiet), None
    if not (speaks and sys.stderr.isatty()):
        yield step
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"0/{total} {noun}", total=total)

        def draw(count: int, said: str) -> None:
            bar.update(task, completed=count, description=said)

        yield step


def clock(seconds: float) -> str:
    """Return a time for people: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"
