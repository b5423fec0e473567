"""Whole deltas as nodes: the two factors of a slot, and sparse or spectral changes as matrices."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from adaptc.delta import BaseFree, LowRank, Sparse
from adaptc.errors import UnsupportedError
from adaptc.factor import decoded
from adaptc.formats.onnx.edit import int64
from adaptc.formats.onnx.emit import DOUBLE, FLOAT, INT64, Emitter
from adaptc.formats.onnx.model import Array, tensor_proto
from adaptc.formats.onnx.values import in_onnx_order
from adaptc.quant.walsh import Transform
from adaptc.spectral import Spectral


def factors(emit: Emitter, low: LowRank) -> tuple[str, str]:
    """Return A (in, r) and B (r, out) float32, bit for bit those of `values.in_onnx_order`."""
    if torch.float64 in (low.a.dtype, low.b.dtype):
        a, b = in_onnx_order(low)
        return emit.plain(a), emit.plain(b)
    a_value = _turned(emit, *emit.matrix(low.a))
    if low.core is None:
        return a_value, scaled(emit, _turned(emit, *emit.matrix(low.b)), low.scale)
    b, core = decoded(low.b), decoded(low.core)
    if not exact_product(b, core):
        return a_value, emit.plain(in_onnx_order(low)[1])
    wide = emit.add("Cast", _turned(emit, *emit.matrix(low.b)), to=DOUBLE)
    held = emit.add("Cast", emit.plain(core.mT), to=DOUBLE)
    product = emit.add("MatMul", held, wide)  # core^T b^T; exact, so in whatever order it is summed
    return a_value, _times(emit, product, low.scale)


def matrix(emit: Emitter, delta: BaseFree) -> str:
    """Return dW^T (in, out) float32 of a sparse or spectral delta: gaps, cumulated, scattered into zeros."""
    if isinstance(delta, Sparse):
        out, into = delta.shape
        at, values = _in_order(delta, False)
        flat = _scattered(emit, at, values, delta.scale, out * into)
        return emit.add("Reshape", flat, emit.hold(int64(into, out)))
    if isinstance(delta, Spectral):
        flat = _scattered(emit, decoded(delta.indices), decoded(delta.values), 1.0, delta.shape[0] * delta.width)
        wide = emit.add("Cast", flat, to=DOUBLE)
        rows = emit.add("Mul", wide, emit.hold(np.array(delta.scale, np.float64)))
        found = _inverse(emit, rows, delta.basis(), delta.shape[0])
        return emit.add("Transpose", emit.add("Cast", found, to=FLOAT), perm=[1, 0])
    raise UnsupportedError(f"{delta!r} has no matrix that a graph expands")


def entries(emit: Emitter, delta: Sparse, turned: bool) -> tuple[str, str]:
    """Return (indices, values) of a sparse delta in the flat (out, in) matrix, (in, out) unless `turned`."""
    return _positions(emit, *_in_order(delta, turned), delta.scale)


def _in_order(delta: Sparse, turned: bool) -> tuple[Tensor, Tensor]:
    """Return ascending flat positions in the (in, out) matrix, (out, in) if `turned`, and their values."""
    (out, into), at, values = delta.shape, decoded(delta.indices).long(), decoded(delta.values)
    if turned:
        return at, values
    at = at % into * out + at // into
    order = torch.argsort(at)
    return at[order], values[order]


def scaled(emit: Emitter, value: str, scale: float) -> str:
    """Return float32 value * scale, rounded once: through float64 unless the scale is a power of two."""
    if scale == 1.0:
        return value
    if abs(math.frexp(scale)[0]) == 0.5 and 1e-30 < abs(scale) < 1e30:
        return emit.add("Mul", value, emit.hold(np.array(scale, np.float32)))
    return _times(emit, emit.add("Cast", value, to=DOUBLE), scale)


def exact_product(b: Tensor, core: Tensor) -> bool:
    """Return whether every sum of b @ core is exact in float64, in any order.

    All terms are multiples of u, the product of the lowest set bits, and their sum stays below 2^53 u.
    """
    wide_b, wide_c = b.double().numpy(), core.double().numpy()
    lowest = _lowest_bit(wide_b) + _lowest_bit(wide_c)
    largest = float((np.abs(wide_b).max(initial=0) * np.abs(wide_c).max(initial=0)) * max(b.shape[1], 1))
    return largest == 0 or math.log2(largest) - lowest < 53


def _lowest_bit(x: Array) -> int:
    """Return the exponent of the lowest set bit of any entry."""
    mantissa, exponent = np.frexp(x[x != 0])
    ints = (mantissa * 2.0**53).astype(np.int64)
    if not len(ints):
        return 0
    return int((exponent - 53 + np.log2((ints & -ints).astype(np.float64)).astype(np.int64)).min())


def _times(emit: Emitter, value: str, scale: float) -> str:
    """Return float32 of a float64 value times the scale."""
    product = value if scale == 1.0 else emit.add("Mul", value, emit.hold(np.array(scale, np.float64)))
    return emit.add("Cast", product, to=FLOAT)


def _turned(emit: Emitter, value: str, already: bool) -> str:
    return value if already else emit.add("Transpose", value, perm=[1, 0])


def _scattered(emit: Emitter, at: Tensor, values: Tensor, scale: float, size: int) -> str:
    zero = tensor_proto("", np.zeros(1, np.float32))
    empty = emit.add("ConstantOfShape", emit.hold(int64(size)), value=zero)
    if not len(at):
        return empty
    return emit.add("ScatterElements", empty, *_positions(emit, at, values, scale), axis=0)


def _positions(emit: Emitter, at: Tensor, values: Tensor, scale: float) -> tuple[str, str]:
    """Return ascending positions, stored as gaps, and their values: in 8 or 16 bits, whichever makes fewer bytes.

    A gap too large for its bits is bridged by entries of value zero, at places that hold zero anyway.
    """
    gaps = np.diff(at.numpy(), prepend=0)
    width = 2 if values.dtype in (torch.float16, torch.bfloat16) else 4
    cost = {kind: (len(gaps) + int((gaps // np.iinfo(kind).max).sum())) * (np.dtype(kind).itemsize + width)
            for kind in (np.uint8, np.uint16)}
    kind = min(cost, key=cost.__getitem__)
    most = int(np.iinfo(kind).max)
    bridges = np.maximum(-(-gaps // most) - 1, 0)  # a gap of exactly `most` needs none
    stored = np.full(len(gaps) + int(bridges.sum()), most, kind)
    real = np.cumsum(bridges + 1) - 1
    stored[real] = (gaps - bridges * most).astype(kind)
    padded = torch.zeros(len(stored), dtype=values.dtype)
    padded[torch.from_numpy(real)] = values
    where = emit.add("CumSum", emit.add("Cast", emit.hold(stored), to=INT64), emit.hold(np.array(0, np.int64)))
    return where, scaled(emit, emit.plain(padded), scale)


def _inverse(emit: Emitter, flat: str, transform: Transform, rows: int) -> str:
    """Return float64 x U (rows, n) for x given flat: Sylvester's part as two small products, then Paley's."""
    length, order = transform.length, transform.order
    right = 1 << (length.bit_length() - 1) // 2
    left = length // right
    size = rows * transform.width // length
    x = emit.add("Reshape", flat, emit.hold(int64(size, left, right)))
    x = emit.add("MatMul", x, _signs(emit, right))
    x = emit.add("MatMul", _signs(emit, left), x)
    if transform.paley is not None:
        x = emit.add("Reshape", x, emit.hold(int64(size // order, order, length)))
        eye = torch.eye(order, dtype=torch.float64).reshape(1, order, order)
        paley = transform.paley.times(eye, True)[0].numpy()  # H^T
        x = emit.add("MatMul", emit.add("Cast", emit.hold(paley.astype(np.int8)), to=DOUBLE), x)
    x = emit.add("Mul", x, emit.hold(np.array((order * length) ** -0.5, np.float64)))
    return emit.add("Reshape", x, emit.hold(int64(rows, transform.width)))


def _signs(emit: Emitter, n: int) -> str:
    """Return Sylvester's matrix of order n, float64, stored as bytes."""
    h = np.ones((1, 1), np.int8)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]]).astype(np.int8)
    return emit.add("Cast", emit.hold(h), to=DOUBLE)
