"""Specification of the prefill linear: the same function as the decode linear, for any number of rows."""

from adaptc.kernels.decode.naive import linear

__all__ = ["linear"]
