"""adaptc, the compiler for adapters.

    import adaptc
    a = adaptc.load("adapter/")
    b = adaptc.compress(a, rank=8)
    adaptc.save(b, "adapter-r8/")

Letters used everywhere: w0 base weight (out, in, ...); dw the change; a (r, in); b (out, r); r rank; s scale, the
multiplier itself (alpha/r, or alpha/sqrt(r)); m = out, n = in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "adaptc.formats",
    "save": "adaptc.formats",
    "compress": "adaptc.squeeze",
    "merge": "adaptc.squeeze.merge",
    "run": "adaptc.recipe",
    "inspect": "adaptc.squeeze.inspection",
    "diff": "adaptc.difference",
    "attach": "adaptc.kernels.runtime",
    "detach": "adaptc.kernels.runtime",
    "set_active": "adaptc.kernels.runtime",
    "Adapter": "adaptc.adapter",
    "AdaptcError": "adaptc.errors",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from adaptc.adapter import Adapter as Adapter
    from adaptc.difference import diff as diff
    from adaptc.errors import AdaptcError as AdaptcError
    from adaptc.formats import load as load
    from adaptc.formats import save as save
    from adaptc.kernels.runtime import attach as attach
    from adaptc.kernels.runtime import detach as detach
    from adaptc.kernels.runtime import set_active as set_active
    from adaptc.recipe import run as run
    from adaptc.squeeze import compress as compress
    from adaptc.squeeze.inspection import inspect as inspect
    from adaptc.squeeze.merge import merge as merge


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import adaptc` costs nothing."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'adaptc' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
