"""What a fleet does to one adapter, in whatever process: read, run the recipe, write whole, and say what came of it."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from adaptc import __version__
from adaptc.errors import AdaptcError, LossError, one_line
from adaptc.evidence.fleet_paths import STAGING, is_url, local_copy, publish

if TYPE_CHECKING:
    from adaptc.base import Base
    from adaptc.formats.format import Format
    from adaptc.formats.source import Source
    from adaptc.pipeline import Pipeline

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done to every adapter of a fleet; plain values, so that it travels."""

    spec: str
    base: str | None = None
    to: str | None = None
    alpha: float | None = None
    dialect: str | None = None
    allow_loss: bool = False

    @property
    def digest(self) -> str:
        """16 hex digits of everything that decides what is written, but the input and the version."""
        said = asdict(self) | {"base": self.base and _base_stamp(self.base)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to do. `files` lie in the folder `input`, or beside the file it is; `name` is its place in `out`.

    `replace` allows an output to be there already, `whole` says that all of it is an earlier run's. `known` is the
    content hash of an earlier, finished run: the same content is not done again.
    """

    name: str
    input: str
    folder: bool
    files: tuple[str, ...]
    nbytes: int
    stamp: str
    out: str
    order: Order
    replace: bool = False
    whole: bool = False
    known: str = ""
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job. `status` "same" is a touched file with the content it had; errors are relative, of dW."""

    name: str
    input: str
    status: Literal["done", "same", "failed"]
    stamp: str
    hash: str = ""
    output: str = ""
    output_hash: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    reason: str = ""


def prepare() -> None:
    """Load what the first adapter would wait for: torch, with one thread, and every dialect and pass."""
    import torch

    from adaptc.registry import FORMATS, PASSES

    torch.set_num_threads(1)
    FORMATS.items(), PASSES.items()


def process(job: Job) -> Result:
    """Do one adapter; never raises for one that cannot be done, its result says why."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    found: dict[str, Any] = {"status": "failed", "bytes_before": job.nbytes}
    try:
        if job.version != __version__:
            raise AdaptcError(f"this worker has adaptc {__version__}, the run was started by {job.version}")
        with local_copy(job.input, job.files, job.folder) as path:
            _work(job, path, found)
    except LossError as e:
        more = f" and {len(e.losses) - 1} more" if len(e.losses) > 1 else ""
        found["reason"] = f"{e}: {e.losses[0]}{more} (--allow-loss writes the rest)"
    except AdaptcError as e:
        found["reason"] = f"{e} ({e.hint})" if e.hint else str(e)
    except OSError as e:
        found["reason"] = f"{e.filename}: {e.strerror}" if e.filename else str(e)
    except MemoryError:
        found["reason"] = "out of memory"
    except Exception as e:  # a bug must not stop the other adapters
        short = isinstance(e, RuntimeError) and "allocate" in str(e) and "memory" in str(e)
        found["reason"] = "out of memory" if short else f"internal error, please report it: {type(e).__name__}: {e}"
    found["reason"] = one_line(found.get("reason", ""))
    return Result(job.name, job.input, stamp=job.stamp, seconds=time.perf_counter() - start, peak_bytes=_peak(),
                  **found)


def _work(job: Job, path: Path, found: dict[str, Any]) -> None:
    from adaptc.formats import writer
    from adaptc.formats.sniff import recognise
    from adaptc.formats.source import open_source
    from adaptc.passes import Context

    parent = path if job.folder else path.parent
    source = open_source(path, alpha=job.order.alpha)
    read, _ = recognise(source, job.order.dialect)
    found["hash"] = content_hash(parent / name for name in job.files)
    if found["hash"] == job.known:
        found["status"] = "same"
        return
    adapter = read.read(source)
    pipeline = _pipeline(job.order.spec)
    fmt = writer(adapter, job.order.to or pipeline.container or None)
    name, folder = _place(job, source, fmt)

    def size_of(it: Any) -> int:
        return fmt.size(fmt.storable(it), folder=folder)

    ctx = Context(_base(job.order.base), jobs=1, size_of=size_of)
    outcome = pipeline([adapter], ctx)
    stored = fmt.storable(outcome.adapter)
    losses = fmt.cannot(stored)
    if losses and not job.order.allow_loss:
        raise LossError(f"{fmt.title} cannot say everything this adapter holds", losses)
    found["output_hash"], found["bytes_after"] = _write(job, name, folder, source, fmt, stored)
    found |= {"output": name, "error": outcome.error, "status": "done"}


def _place(job: Job, source: Source, fmt: Format) -> tuple[str, bool]:
    """Return the output below `job.out` and whether it is a folder: as the input is, where the dialect allows."""
    suffix = getattr(fmt, "suffix", ".safetensors")
    if job.folder:
        stem = source.file.name.split(".")[0]
        return (job.name, True) if fmt.writes == "folder" else (f"{job.name}/{stem}{suffix}", False)
    if fmt.writes == "folder" and source.file.suffix != ".safetensors":
        return job.name, True
    return job.name + suffix, False


def _write(job: Job, name: str, folder: bool, source: Source, fmt: Format, stored: Any) -> tuple[str, int]:
    """Write whole or not at all; return the content hash and bytes of the output."""
    from adaptc.formats.atomic import staged

    def hashed(at: Path) -> tuple[str, int]:
        files = sorted(p for p in at.iterdir()) if folder else [at]
        return content_hash(files), sum(p.stat().st_size for p in files)

    if is_url(job.out):
        with TemporaryDirectory(prefix="adaptc-") as temp:
            made = Path(temp) / PurePosixPath(name).name
            if folder:
                made.mkdir()
            fmt.write(stored, made)
            publish(made, job.out, name, job.replace)
            return hashed(made)
    out = Path(job.out) / name
    room = Path(job.out) / STAGING
    for parent in (out.parent, room):  # here rather than in staged(), which takes away again what it made, and perhaps
        parent.mkdir(parents=True, exist_ok=True)  # from under another worker
    with staged(out, force=job.replace, folder=folder, inputs=(source.path, source.file), room=room) as made:
        fmt.write(stored, made)
        if job.whole and folder and any(not (made / old.name).exists() for old in out.iterdir()):
            out.rename(made.parent / "old")  # of another dialect: nothing of it is anybody else's
        return hashed(made)


def content_hash(files: Iterable[Path]) -> str:
    """Return the SHA-256 of files in the order given, each preceded by its bytes as 8 little-endian ones."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb", buffering=0) as f:
            while block := f.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=4)
def _pipeline(spec: str) -> Pipeline:
    from adaptc.recipe import read_recipe

    return read_recipe(spec)


@lru_cache(maxsize=1)
def _base(path: str | None) -> Base | None:
    from adaptc.base import Base

    return None if path is None else Base(Path(path))


def _base_stamp(base: str) -> list[Any]:
    path = Path(base)
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path] if path.exists() else []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _peak() -> int:
    """Return the largest resident size this process has had, 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
