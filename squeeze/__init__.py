"""Fewer ranks, fewer adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptc.adapter import Adapter


def compress(adapter: Adapter, *, base: str | Path | None = None, jobs: int = 0, device: str = "cpu",
             **options: Any) -> Adapter:
    """Return `adapter` with every delta truncated optimally: options are those of the Truncate pass.

    compress(a, rank=8), compress(a, energy=0.99), compress(a, max_error=0.05), compress(a, size=2 * 2**20).
    `size` counts the file the adapter's own dialect would write. Raises UsageError for options that make no sense.
    """
    from adaptc.base import Base
    from adaptc.formats import size_of
    from adaptc.passes import Context
    from adaptc.resolve import resolved
    from adaptc.squeeze.truncate import Truncate

    ctx = Context(base=Base(Path(base)) if base else None, jobs=jobs, device=device, size_of=size_of)
    if ctx.base is not None:
        adapter = resolved(adapter, ctx.base, keep=("dora",))
    return Truncate(**options)(adapter, ctx).adapter
