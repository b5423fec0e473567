"""Where an output goes, whether it may, and what it costs to say it in that dialect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptc.cli.reading import Opened
from adaptc.errors import LossError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from adaptc.adapter import Adapter
    from adaptc.formats.format import Format


@dataclass(frozen=True)
class Target:
    """An output path with the dialect that will be written there."""

    out: Path
    format: Format
    folder: bool
    inputs: tuple[Path, ...]
    force: bool
    notes: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The output as people write it, a folder with its slash."""
        return f"{self.out}/" if self.folder else str(self.out)

    def size_of(self, adapter: Adapter) -> int:
        """Return the exact bytes that `adapter` would take here."""
        return self.format.size(self.format.storable(adapter), folder=self.folder)

    def losses(self, adapter: Adapter, allow: bool) -> tuple[str, ...]:
        """Return what writing would lose. Raises LossError listing it unless `allow`."""
        losses = self.format.cannot(self.format.storable(adapter))
        if losses and not allow:
            raise LossError(f"{self.format.title} cannot say everything this adapter holds", losses,
                            hint="--allow-loss writes the rest; --to names another dialect")
        return losses

    def write(self, adapter: Adapter) -> int:
        """Write whole or not at all; return the bytes that are now on disk."""
        from adaptc.formats import save

        save(adapter, self.out, dialect=self.format.id, force=self.force, allow_loss=True, inputs=self.inputs)
        files = [p for p in self.out.rglob("*") if p.is_file()] if self.out.is_dir() else [self.out]
        return sum(p.stat().st_size for p in files)


def target(opened: Opened, out: str | None, tag: str, to: str | None, force: bool) -> Target:
    """Return where the result goes: `out`, else beside the input with `tag` in its name.

    in.safetensors becomes in.<tag>.safetensors, a folder in/ becomes in-<tag>/; a Hub id goes to the current folder.
    Raises UsageError for an output that exists (unless `force`) or is the input, UnsupportedError for a read-only one.
    """
    from adaptc.formats import is_folder, writer
    from adaptc.formats.atomic import check

    fmt = writer(opened.adapter, to)
    if not fmt.writes:
        raise UnsupportedError(f"{fmt.title} is read only here", hint="peft can hold most adapters")
    path = Path(out) if out is not None else _beside(opened, fmt, tag)
    if path.name in ("", ".."):
        path = path.resolve()
    folder = is_folder(fmt, path)
    suffix = getattr(fmt, "suffix", ".safetensors")
    if not folder and not path.suffix:
        raise UsageError(f"{path} has no suffix, and {fmt.title} is one file", hint=f"such as {path}{suffix}")
    check(path, force=force, folder=folder, inputs=opened.inputs)
    notes = []
    if fmt.id != opened.format.id and to is None:
        why = "holds untouched factors only" if opened.format.writes else "is read only"
        notes.append(f"{opened.format.title} {why}, written as {fmt.title}")
    if fmt.writes == "folder" and not folder and fmt.id != "adaptc":
        notes.append("one file, without the folder's config: its ranks and scales are in the metadata")
    return Target(path, fmt, folder, opened.inputs, force, tuple(notes))


def _beside(opened: Opened, fmt: Format, tag: str) -> Path:
    source, suffix = opened.source.path, getattr(fmt, "suffix", ".safetensors")
    if not Path(opened.name).exists():  # a Hub id, read from the cache
        return Path(f"{opened.name.rsplit('/', 1)[-1]}-{tag}")
    if source.is_dir():
        whole = source.resolve() if source.name in ("", "..") else source
        return whole.with_name(f"{whole.name}-{tag}" if fmt.writes == "folder" else f"{whole.name}.{tag}{suffix}")
    if fmt.writes == "folder" and source.suffix != ".safetensors":
        return source.with_name(f"{source.stem}-{tag}")
    return source.with_name(f"{source.stem.removesuffix('.adaptc')}.{tag}{suffix}")
