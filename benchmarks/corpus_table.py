"""Read and write back every adapter of the reference corpus, account for every tensor, and write docs/corpus.md.

    python benchmarks/corpus_table.py ../shared/corpus docs/corpus.md
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows, tensors
from adaptc.errors import AdaptcError, LossError
from adaptc.formats import save, writer
from adaptc.formats.parts import joined
from adaptc.formats.sniff import recognise
from adaptc.formats.source import Source, open_source
from adaptc.measure import relative_error

SAME = "same tensors, bit for bit"
OTHER = "same tensors, bit for bit, a list become a file with keys"


@dataclass(frozen=True)
class Row:
    """One folder: what it is, where its tensors went, and what writing it untouched gives."""

    name: str
    dialect: str
    held: int  # tensors in the file
    deltas: int
    carried: int
    scalars: int  # scales and counters, part of a delta's multiplier
    lost: tuple[str, ...]  # tensors that are nowhere in the adapter
    written: str


def rows(corpus: Path) -> Iterator[Row]:
    """Yield a row for every folder of the corpus."""
    for folder in sorted(p for p in corpus.iterdir() if p.is_dir()):
        try:
            source = open_source(folder)
            fmt, _ = recognise(source)
            adapter = fmt.read(source)
        except AdaptcError as e:
            yield Row(folder.name, "refused", 0, 0, 0, 0, (), str(e))
            continue
        held = held_tensors(source, adapter)
        scalars = {k for k, t in held.items() if t.numel() == 1}
        kept = {fingerprint(t) for t in adapter_tensors(adapter)}
        lost = tuple(k for k, t in held.items() if k not in scalars and fingerprint(t) not in kept)
        yield Row(folder.name, fmt.id, len(held), len(adapter.deltas), len(adapter.replaced) + len(adapter.extra),
                  len(scalars), lost, written(source, adapter, fmt.id))


def held_tensors(source: Source, adapter: Adapter) -> Mapping[str, Tensor]:
    """Return the tensors of a file by key; raw and listed ones by their place."""
    if source.tensors:
        return source.tensors
    if isinstance(source.payload, list):
        return {str(i): t for i, t in enumerate(source.payload)}
    return {str(i): t for i, t in enumerate(adapter_tensors(adapter))}  # raw codes: writing back compares the bytes


def adapter_tensors(adapter: Adapter) -> Iterator[Tensor]:
    """Yield every tensor an adapter holds."""
    for delta in adapter.deltas.values():
        yield from tensors(delta).values()
    yield from (v.values if isinstance(v, Rows) else v for v in adapter.replaced.values())
    yield from adapter.extra.values()


def fingerprint(t: Tensor) -> str:
    """Return a hash of the values that are not zero, whatever their order: transposing and padding do not change it."""
    flat = t.detach().double().flatten()
    return hashlib.sha256(torch.sort(flat[flat != 0]).values.numpy().tobytes()).hexdigest()


def written(source: Source, adapter: Adapter, dialect: str) -> str:
    """Write the adapter untouched, in its own dialect where there is a writer, and say how the result compares."""
    fmt = writer(adapter, None)
    if dialect == "petlvit":
        fmt = writer(adapter, dialect)
    suffix = "" if fmt.writes == "folder" else getattr(fmt, "suffix", ".safetensors")
    with tempfile.TemporaryDirectory() as temp:
        try:
            out = save(adapter, Path(temp) / f"out{suffix}", dialect=fmt.id)
        except LossError as e:
            return f"not as {fmt.title}: {e.losses[0]}"
        if dialect == "petlvit":
            return "same file, byte for byte" if out.read_bytes() == source.file.read_bytes() else "other bytes"
        again = open_source(out)
        before, after = held_tensors(source, adapter), held_tensors(again, adapter)
        if Counter(map(exact, before.values())) == Counter(map(exact, after.values())):
            keyed = [{k: exact(t) for k, t in side.items()} for side in (before, after)]
            return SAME if keyed[0] == keyed[1] else OTHER
        return same_deltas(adapter, recognise(again)[0].read(again), fmt.title)


def exact(t: Tensor) -> str:
    """Return a hash of dtype, shape and bits."""
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode() + raw).hexdigest()


def same_deltas(before: Adapter, after: Adapter, title: str) -> str:
    """Return the largest relative error over all deltas, as text."""
    before, after = joined(before), joined(after)
    if set(before.deltas) != set(after.deltas):
        return "other modules"
    worst = max(relative_error(d, after.deltas[k]) for k, d in before.deltas.items())
    return f"as {title}, same ΔW within {worst:.0e}" if worst else f"as {title}, same ΔW"


def markdown(table: Iterable[Row]) -> str:
    """Return the page."""
    found = list(table)
    by = Counter("read" if r.dialect != "refused" else "refused by name" for r in found)
    counted = ", ".join(f"{n} {what}" for what, n in sorted(by.items()))
    lines = ["# Real adapters, read and written back", "",
             f"{len(found)} published adapters: {counted}. Every tensor of a file is a factor of a delta,",
             "carried beside the deltas, or a scalar that is part of a multiplier; the script stops without a table",
             "if one is nowhere. Made by `benchmarks/corpus_table.py`.", "",
             "| adapter | dialect | tensors | deltas | carried | scalars | written back untouched |",
             "|---|---|---:|---:|---:|---:|---|"]
    for r in found:
        counts: list[Any] = [r.held, r.deltas, r.carried, r.scalars] if r.dialect != "refused" else ["", "", "", ""]
        text = r.written.replace("|", "\\|")
        lines.append(f"| {r.name} | {r.dialect} | {' | '.join(map(str, counts))} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = list(rows(Path(sys.argv[1])))
    nowhere = [f"{r.name}: {r.lost[0]} and {len(r.lost) - 1} more" for r in made if r.lost]
    if nowhere:
        raise SystemExit("\n".join(nowhere))
    Path(sys.argv[2]).parent.mkdir(exist_ok=True)
    Path(sys.argv[2]).write_text(markdown(made))
