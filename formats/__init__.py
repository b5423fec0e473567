"""The world outside: dialects, opened by evidence, written whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptc.adapter import Adapter
    from adaptc.formats.format import Format


def load(path: str | Path, *, alpha: float | None = None, dialect: str | None = None) -> Adapter:
    """Return the adapter at `path`: a file, a PEFT or MLX folder, or a Hub id, in whatever dialect it is.

    `alpha` is for bare files that cannot tell their scale; `dialect` overrides recognition. Raises FormatError for
    damaged data, UnsupportedError for adapters refused by name, NeedsError when the scale is missing.
    """
    from adaptc.formats.sniff import recognise
    from adaptc.formats.source import open_source

    source = open_source(path, alpha=alpha)
    return recognise(source, dialect)[0].read(source)


def save(adapter: Adapter, path: str | Path, *, dialect: str | None = None, force: bool = False,
         allow_loss: bool = False, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Write `adapter` to `path` in its own dialect (or `dialect`), whole or not at all; return the path.

    Raises LossError listing what the dialect cannot say unless `allow_loss`, UsageError if `path` exists unless
    `force`, or if it is one of `inputs`, which are never overwritten.
    """
    from adaptc.errors import LossError
    from adaptc.formats.atomic import staged

    out, fmt = Path(path), writer(adapter, dialect)
    adapter = fmt.storable(adapter)
    losses = fmt.cannot(adapter)
    if losses and not allow_loss:
        raise LossError(f"{fmt.title} cannot say everything this adapter holds: {'; '.join(losses)}", losses,
                        hint="--allow-loss writes the rest")
    with staged(out, force=force, folder=is_folder(fmt, out), inputs=tuple(map(Path, inputs))) as temp:
        fmt.write(adapter, temp)
    return out


def is_folder(fmt: Format, out: Path) -> bool:
    """Return whether `fmt` writes `out` as a folder: it can, and the name has no suffix of a tensor file."""
    return fmt.writes == "folder" and out.suffix not in (".safetensors", ".bin", ".npz")


def size_of(adapter: Adapter) -> int:
    """Return the exact bytes of `adapter` written in its own dialect, all files."""
    fmt = writer(adapter, None)
    return fmt.size(fmt.storable(adapter))


def writer(adapter: Adapter, dialect: str | None) -> Format:
    """Return the format that writes `adapter`: `dialect`, else its own, else PEFT for dialects that are read only."""
    from adaptc.registry import FORMATS

    fmt: Format = FORMATS.get(dialect or adapter.origin.container or adapter.origin.dialect)()
    if dialect or (fmt.writes and not fmt.exact_only):
        return fmt
    plain: Format = FORMATS.get("peft")()
    return plain
