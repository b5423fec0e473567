"""Codes that slots may hold instead of floats: a few levels a value, several values a byte, a small core between.

dW^T = Qa^T core Qb with Qa (ra, in), Qb (rb, out) of levels; a byte holds `per_byte` of them, the first in the lowest
digit. The graph decodes by one pattern for all kinds, Cast -> Gather(table (256, per_byte)) -> Reshape, as the function
adaptc::Decode; "int8" by DequantizeLinear, for runtimes that have it in hardware. Levels are stored times 2^-6 (2^-13
for int8), so that a float16 core covers 1.5e-8 to 16 in dW's own units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.formats.onnx.edit import DOMAIN
from adaptc.formats.onnx.model import Array, onnx_module
from adaptc.quant.bitplane import bit_planes
from adaptc.quant.nf4 import LEVELS
from adaptc.squeeze.factored import truncate

UNIT = 2.0**-6
_TRIES = 24  # scales tried for every row
_RIDGE = 1e-9


@dataclass(frozen=True)
class Code:
    """Levels, ascending, and how many of them a byte holds."""

    levels: tuple[float, ...]
    per_byte: int
    dtype: Any = np.uint8

    @property
    def dequantized(self) -> bool:
        """Whether codes are the levels themselves, signed, and take no table."""
        return self.dtype is np.int8

    @property
    def unit(self) -> float:
        """What a level of 1 is worth."""
        return UNIT / 128 if self.dequantized else UNIT

    def table(self) -> Array:
        """Return (256, per_byte) float32: the levels a byte stands for, times `unit`; the unit alone for int8."""
        if self.dequantized:
            return np.array(self.unit, np.float32)
        digits = np.arange(256)[:, None] // len(self.levels) ** np.arange(self.per_byte) % len(self.levels)
        table: Array = np.array(self.levels, np.float32)[digits] * np.float32(self.unit)
        return table

    def pack(self, index: Array) -> Array:
        """Return level numbers (rows, n) as bytes (rows, ceil(n / per_byte)); padding is the first level."""
        rows, n = index.shape
        if self.dequantized:
            return np.array(self.levels, np.int8)[index]
        padded = np.pad(index.astype(np.int64), ((0, 0), (0, -n % self.per_byte)))
        groups = padded.reshape(rows, -1, self.per_byte)
        packed: Array = (groups * len(self.levels) ** np.arange(self.per_byte)).sum(-1).astype(np.uint8)
        return packed

    def unpack(self, packed: Array, n: int) -> Array:
        """Return the levels times `unit` (rows, n) that `pack` stored: what the graph decodes."""
        if self.dequantized:
            return packed.astype(np.float32) * np.float32(self.unit)
        values: Array = self.table()[packed.astype(np.int64)].reshape(len(packed), -1)[:, :n]
        return values

    def nbytes(self, n: int) -> int:
        """Return the bytes of a row of n values."""
        return -(-n // self.per_byte)


CODES = {"sign": Code((-1.0, 1.0), 8), "ternary": Code((-1.0, 0.0, 1.0), 5),
         "2bit": Code((-3.0, -1.0, 1.0, 3.0), 4), "nf4": Code(LEVELS, 2),
         "int8": Code(tuple(map(float, range(-127, 128))), 1, np.int8)}


def encode(store: str, b: Tensor, a: Tensor, bits: float = 1.0) -> tuple[Array, Array, Array]:
    """Return codes of a (ra, bytes; int8: (in, ra)), of b (rb, bytes) and the core (ra, rb) float16 for dW = b @ a.

    "sign" spends `bits` a parameter on sign planes (adaptc.quant.bitplane); the others keep the rank, code the singular
    vectors level by level, and refit the core by least squares. Raises UnsupportedError for a core beyond float16.
    """
    code = CODES[store]
    if store == "sign":
        qa, qb, core = _planes(b, a, bits)
    else:
        qa, qb, core = _levels(code, b, a)
    scaled = core / code.unit**2
    if float(np.abs(scaled).max(initial=0)) > 65504:
        raise UnsupportedError(f"a core of {np.abs(core).max():.3g} is beyond float16", hint="--store float16 holds it")
    codes_a = code.pack(qa)
    return codes_a.T.copy() if code.dequantized else codes_a, code.pack(qb), scaled.astype(np.float16)


def decode(store: str, codes_a: Array, codes_b: Array, core: Array, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return float64 (b (out, r), a (r, in)) that the graph computes with, up to its own rounding."""
    code = CODES[store]
    codes_a = codes_a.T if code.dequantized else codes_a
    qa, qb = code.unpack(codes_a, shape[1]).astype(np.float64), code.unpack(codes_b, shape[0]).astype(np.float64)
    return torch.from_numpy(qb.T @ core.astype(np.float64).T), torch.from_numpy(qa)


def functions(opset: int, dtype: int, cut_a: bool, cut_b: bool, dequantized: bool = False) -> tuple[str, list[Any]]:
    """Return the name of the function a module calls, and the model-local functions it takes.

    adaptc::Decode(codes (r, bytes) uint8, table (256, k), shape [0, n]) -> levels (r, n), by Cast, Gather, Reshape;
    adaptc::Branch(x, a, core, b, table, shape_a, shape_b[, n_a][, n_b]) -> x Qa^T core Qb, with levels beyond n_a or
    n_b, which only fill their byte, cut off. `dtype` is ONNX's number for that of x and the table. Where codes are
    `dequantized` the table is their unit, and there are no shapes.
    """
    helper = onnx_module().helper
    own, default = helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("", opset)
    decode = helper.make_function(DOMAIN, "Decode", ["codes", "table", "shape"], ["values"], [
        helper.make_node("Cast", ["codes"], ["index"], to=6), helper.make_node("Gather", ["table", "index"], ["v"]),
        helper.make_node("Reshape", ["v", "shape"], ["values"])], [default])
    inputs = ["x", "a", "core", "b", "table", *([] if dequantized else ["shape_a", "shape_b"])]
    nodes = [helper.make_node("Cast", ["core"], ["c"], to=dtype)]
    if dequantized:
        zero = onnx_module().numpy_helper.from_array(np.zeros((), np.int8))
        nodes.append(helper.make_node("Constant", [], ["zero_point"], value=zero))
    if cut_a or cut_b:
        nodes.append(helper.make_node("Constant", [], ["zero"], value_ints=[0]))
        nodes.append(helper.make_node("Constant", [], ["one"], value_ints=[1]))
    for side, cut in (("a", cut_a), ("b", cut_b)):
        levels = f"q{side}"
        if dequantized:
            nodes.append(helper.make_node("DequantizeLinear", [side, "table", "zero_point"], [levels]))
            continue
        nodes.append(helper.make_node("Decode", [side, "table", f"shape_{side}"], ["w" + side if cut else levels],
                                      domain=DOMAIN))
        if cut:
            inputs.append(f"n_{side}")
            nodes.append(helper.make_node("Slice", ["w" + side, "zero", f"n_{side}", "one"], [levels]))
    # int8 codes lie (in, ra) already: ONNX Runtime 1.32 quantises around a Transpose, with types that disagree.
    turned = [] if dequantized else [helper.make_node("Transpose", ["qa"], ["qat"], perm=[1, 0])]
    nodes += [*turned, helper.make_node("MatMul", ["x", "qa" if dequantized else "qat"], ["h"]),
              helper.make_node("MatMul", ["h", "c"], ["hc"]), helper.make_node("MatMul", ["hc", "qb"], ["y"])]
    name = "Branch" + "8" * dequantized + "A" * cut_a + "B" * cut_b + (f"_{dtype}" if dtype != 1 else "")
    branch = helper.make_function(DOMAIN, name, inputs, ["y"], nodes, [default, own])
    return name, [branch] if dequantized else [decode, branch]


def _planes(b: Tensor, a: Tensor, bits: float) -> tuple[Array, Array, Array]:
    """Return sign planes of both sides as level numbers, and the core between them."""
    planes = bit_planes(b, a, 1.0, bits)
    where = [(k, j) for k, width in enumerate(planes.bits) for j in range(width)]
    spread = np.zeros((len(where), len(planes.bits)))
    for row, (k, j) in enumerate(where):
        spread[row, k] = 2.0**j

    def signs(codes: Array) -> Array:
        u = [(codes[k].astype(np.int64) + (1 << planes.bits[k]) - 1) // 2 for k in range(len(codes))]
        return np.stack([(u[k] >> j) & 1 for k, j in where])

    core = spread @ planes.core.double().numpy().T @ spread.T
    return signs(planes.q_codes.numpy()), signs(planes.p_codes.T.numpy()), core


def _levels(code: Code, b: Tensor, a: Tensor) -> tuple[Array, Array, Array]:
    cut = truncate(b, a, min(a.shape[0], *b.shape, *a.shape), scale=1.0, dtype=torch.float64)
    left, right = cut.b.numpy().T, cut.a.numpy()
    levels = np.array(code.levels)
    index_a, index_b = _nearest(right, levels), _nearest(left, levels)
    qa, qb = levels[index_a], levels[index_b]
    # core = (Qa Qa^T)^-1 Qa a^T b^T Qb^T (Qb Qb^T)^-1, the least squares one for these codes.
    cross = (qa @ right.T) @ (left @ qb.T)
    core = np.linalg.solve(_regular(qa @ qa.T), cross)
    return index_a, index_b, np.linalg.solve(_regular(qb @ qb.T), core.T).T


def _regular(gram: Array) -> Array:
    ridge: Array = gram + _RIDGE * max(float(np.trace(gram)) / max(len(gram), 1), 1e-30) * np.eye(len(gram))
    return ridge


def _nearest(w: Array, levels: Array) -> Array:
    """Return level numbers of every row of w at the scale, among a few, that leaves the least error of the row."""
    edges = (levels[:-1] + levels[1:]) / 2
    top = np.abs(w).max(1, keepdims=True).clip(1e-300) / np.abs(levels).max()
    best, lowest = np.zeros(w.shape, np.int64), np.full(len(w), np.inf)
    for share in np.linspace(0.1, 1.0, _TRIES):
        index = np.searchsorted(edges, w / (top * share))
        q = levels[index]
        energy = np.square(q).sum(1)
        gain = (q * w).sum(1) / np.where(energy > 0, energy, 1)
        error = np.square(w - gain[:, None] * q).sum(1)
        better = error < lowest
        best[better], lowest[better] = index[better], error[better]
    return best
