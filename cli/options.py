"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from adaptc.cli.render import Voice

F = TypeVar("F", bound=Callable[..., Any])


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(f: F) -> F:
        for option in reversed(options):
            f = option(f)
        return f

    return add


def example(text: str) -> str:
    """Return the epilog every command ends with: one line that runs."""
    return f"\b\nExample:\n  {text}"


def input_argument(name: str = "IN") -> Callable[[F], F]:
    """An adapter to read: a file, a folder, or a Hub id."""
    return click.argument(name.lower() if name != "IN" else "source", metavar=name, type=click.Path())


reading = _stack(
    click.option("--alpha", type=float, metavar="X", help="lora_alpha of the training run, for files without one."),
    click.option("--dialect", metavar="ID", help="Read as this dialect instead of recognising it."),
)
working = _stack(
    click.option("--base", type=click.Path(), metavar="DIR",
                 help="Base model: folder, safetensors or GGUF file, Hub id."),
    click.option("--jobs", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads (0: all cores)."),
    click.option("--device", default="cpu", metavar="NAME", help="Where the algebra runs: cpu, cuda, ...",
                 show_default=True),
)
writing = _stack(
    click.option("--allow-loss", is_flag=True, help="Write even if the output dialect cannot say everything."),
    click.option("--force", is_flag=True, help="Replace an existing output (never an input)."),
)
evaluating = _stack(
    click.option("--base", required=True, metavar="DIR", help="Base model: folder, GGUF file or Hub id."),
    click.option("--data", required=True, type=click.Path(), metavar="FILE",
                 help="Text (.txt), `text TAB label` (.tsv), or JSON lines with text, label, choices (.jsonl)."),
    click.option("--task", type=click.Choice(["lm", "classify", "choice"]), help="Told by the data if not said."),
    click.option("--window", type=int, default=256, show_default=True, metavar="N", help="lm: tokens a window."),
    click.option("--max-windows", type=int, metavar="N", help="lm: no more windows than this."),
    click.option("--max-length", type=int, default=64, show_default=True, metavar="N", help="classify: tokens a row."),
    click.option("--batch", type=int, default=100, show_default=True, metavar="N", help="classify: rows at a time."),
    click.option("--bootstrap", type=click.IntRange(min=0), default=1000, show_default=True, metavar="N",
                 help="Resamples for 95% intervals; 0 for none."),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the resampling."),
)


def speaking(f: F) -> F:
    """Add --json, --quiet and --verbose, handed to the command as one `voice`."""
    def wrapped(*args: Any, json: bool, quiet: bool, verbose: bool, **kw: Any) -> Any:
        return f(*args, voice=Voice(json, quiet, verbose), **kw)

    wrapped.__doc__, wrapped.__name__ = f.__doc__, f.__name__
    wrapped.__click_params__ = getattr(f, "__click_params__", [])  # type: ignore[attr-defined]
    return _stack(
        click.option("--json", is_flag=True, help="Print one JSON document."),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
        click.option("--verbose", "-v", is_flag=True, help="One line for every module."),
    )(wrapped)  # type: ignore[return-value]
