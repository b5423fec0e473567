"""Which dialect a file is, with the evidence."""

from __future__ import annotations

from adaptc.errors import UnsupportedError
from adaptc.formats.format import Evidence, Format
from adaptc.formats.source import Source
from adaptc.registry import FORMATS


def recognise(source: Source, dialect: str | None = None) -> tuple[Format, Evidence]:
    """Return the format of `source` and why. The strongest evidence wins. Raises UnsupportedError if there is none."""
    if dialect is not None:
        return FORMATS.get(dialect)(), Evidence(3, "given by the caller")
    found: list[tuple[Format, Evidence]] = []
    for _, cls in FORMATS.items():
        fmt: Format = cls()
        evidence = fmt.sniff(source)
        if evidence is not None:
            found.append((fmt, evidence))
    if not found:
        some = ", ".join(list(source.tensors)[:3]) or "no tensors"
        raise UnsupportedError(f"{source.file.name}: no known adapter dialect (holds {some})",
                               hint=f"known dialects: {', '.join(FORMATS.offered())}")
    best = max(e.strength for _, e in found)
    top = [(f, e) for f, e in found if e.strength == best]
    if len(top) > 1:
        raise UnsupportedError(f"{source.file.name}: could be {' or '.join(f.id for f, _ in top)}",
                               hint="--dialect says which")
    return top[0]
