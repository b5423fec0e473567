"""The same, faster: functions on weights and adapters in their run-time layout, each beside its fp32 specification.

`<op>/naive.py` says what an op computes, `<op>/triton.py` is its GPU kernel, `native/` its CPU code, `<op>/__init__.py`
picks one. ADAPTC_KERNELS forces the choice: naive, triton (also on the CPU, through Triton's interpreter) or native.

    x (M, n) activations   y (M, m)   w0 (m, n) base weight
    q, p, core             run-time layout of an adapter, see `resident`
    plane                  one +-1 bit of every element of a direction; word: 16 planes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptc.kernels.sparse.switch import SparseSwitch as SparseSwitch

__all__ = ["SparseSwitch"]


def __getattr__(name: str) -> Any:
    """Import SparseSwitch when it is first asked for."""
    if name == "SparseSwitch":
        from adaptc.kernels.sparse.switch import SparseSwitch

        return SparseSwitch
    raise AttributeError(f"module 'adaptc.kernels' has no attribute '{name}'")
