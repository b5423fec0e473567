"""Run adapters over the same data, batch by batch beside the reference, and keep only sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.evidence.choice import ask_choice, choice_batches
from adaptc.evidence.metrics import Observed
from adaptc.evidence.model import Loaded
from adaptc.evidence.rows import Row, windows
from adaptc.evidence.tally import Asked, Said, Tally

Kind = Literal["lm", "classify", "choice"]
Batch = tuple[Asked, Callable[[Any], Said]]


@dataclass(frozen=True)
class Settings:
    """How data becomes batches: windows of text, rows of at most `max_length` tokens, or prompts with endings."""

    task: Kind
    window: int = 256
    max_windows: int | None = None
    max_length: int = 64
    batch: int = 100

    def __post_init__(self) -> None:
        for name in ("window", "max_length", "batch", "max_windows"):
            least, found = 2 if name == "window" else 1, getattr(self, name)
            if found is not None and found < least:
                raise UsageError(f"{name} is {found}, must be {least} or more")


def task_of(rows: Sequence[Row]) -> Kind:
    """Return the task that data looks like: choices, else a label in every row, else text."""
    if any(row.choices for row in rows):
        return "choice"
    return "classify" if all(row.label is not None for row in rows) else "lm"


def evaluate(loaded: Loaded, rows: Sequence[Row], adapters: Mapping[str, Adapter], reference: str | None,
             settings: Settings, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Observed]:
    """Return what every adapter said about `rows`, in sums a row or window; KL and agreement are with `reference`.

    Every batch goes through the reference and all adapters before the next, so nothing larger than two batches of
    logits is held. Raises FormatError for labels that the model cannot give, NeedsError for adapters that do not fit
    the model or leave parameters without values, each naming the adapter.
    """
    units, batches = _batches(loaded, rows, settings)
    order = sorted(adapters, key=lambda name: name != reference)
    tallies = {name: Tally(units, settings.task) for name in order}
    with _attached(loaded.model, adapters) as run, torch.no_grad():
        for done, (asked, ask) in enumerate(batches, 1):
            first: Said | None = None
            for name in order:
                with run(name):
                    said = ask(loaded.model)
                first = said if name == reference else first
                tallies[name].add(asked, said, first)
            if progress:
                progress("batches", done, len(batches))
    return {name: tallies[name].observed() for name in adapters}


@contextmanager
def _attached(model: Any, adapters: Mapping[str, Adapter]) -> Iterator[Callable[[str], Any]]:
    """Attach all adapters, none of them active; yield what makes one active for a block; take them off at the end."""
    from adaptc.kernels.runtime import attach, detach, set_active

    ids = {name: f"adaptc.evidence.{i}" for i, (name, a) in enumerate(adapters.items()) if a.deltas or a.replaced}
    on: list[str] = []
    try:
        for name, id in ids.items():
            try:
                attach(model, adapters[name], id)
            except AdaptcError as e:
                e.path = name
                raise
            on.append(id)

        @contextmanager
        def run(name: str) -> Iterator[None]:
            if not on:
                yield
                return
            with set_active(model, ids.get(name)):
                yield

        yield run
    finally:
        for id in on:
            detach(model, id)


def _batches(loaded: Loaded, rows: Sequence[Row], settings: Settings) -> tuple[int, Sequence[Batch]]:
    """Return the number of units and what to ask about them, batch by batch."""
    longest = {"lm": settings.window, "classify": settings.max_length, "choice": 0}[settings.task]
    places = getattr(loaded.model.config, "max_position_embeddings", None)
    if isinstance(places, int) and longest > places:
        raise UsageError(f"{longest} tokens at a time, the model has {places} positions")
    if settings.task == "lm":
        texts = windows(list(rows), loaded.tokenizer, settings.window)[: settings.max_windows]
        if not texts:
            raise FormatError("no text is two tokens long")
        return len(texts), [_window(i, ids) for i, ids in enumerate(texts)]
    if settings.task == "choice":
        return len(rows), [(asked, lambda model, c=c: ask_choice(model, c)) for asked, c in
                           choice_batches(loaded, rows, places if isinstance(places, int) else None)]
    _check_labels(rows, int(loaded.model.config.num_labels))
    _pad(loaded)
    return len(rows), [_classified(loaded, rows, at, settings) for at in range(0, len(rows), settings.batch)]


def _window(unit: int, ids: Tensor) -> Batch:
    asked = Asked(torch.full((len(ids) - 1,), unit), ids[1:])
    return asked, lambda model: Said(model(input_ids=ids[None]).logits[0, :-1])


def _classified(loaded: Loaded, rows: Sequence[Row], at: int, settings: Settings) -> Batch:
    some = rows[at : at + settings.batch]
    known = all(row.label is not None for row in rows)
    target = torch.tensor([row.label for row in some]) if known else None

    def ask(model: Any) -> Said:
        tokens = loaded.tokenizer([row.text for row in some], truncation=True, max_length=settings.max_length,
                                  padding="longest", return_tensors="pt")
        return Said(model(**tokens).logits)

    return Asked(torch.arange(at, at + len(some)), target), ask


def _check_labels(rows: Sequence[Row], classes: int) -> None:
    """Raise FormatError naming the first row without a label while others have one, or with one out of range."""
    labelled = sum(row.label is not None for row in rows)
    for i, row in enumerate(rows, 1):
        if row.choices:
            raise FormatError(f"row {i} has choices, the task is classify", hint="--task choice")
        if row.label is None and labelled:
            raise FormatError(f"row {i} has no label, {labelled} of {len(rows)} rows have one")
        if row.label is not None and not 0 <= row.label < classes:
            raise FormatError(f"row {i} has label {row.label}, the classifier has {classes} classes")


def _pad(loaded: Loaded) -> None:
    """Let a tokenizer without a padding token pad with its end of text, which attention never sees."""
    if loaded.tokenizer.pad_token is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    if getattr(loaded.model.config, "pad_token_id", None) is None:
        loaded.model.config.pad_token_id = loaded.tokenizer.pad_token_id
