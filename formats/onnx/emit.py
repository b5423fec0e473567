"""Factors and sparse matrices as nodes that compute exactly the decoder's float32 values from their stored codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.factor import Encoded, Factor
from adaptc.formats.onnx.edit import DOMAIN, Edit, int64
from adaptc.formats.onnx.emit_functions import levels_function, rice_function
from adaptc.formats.onnx.integers import Rows, integer_rows, radix
from adaptc.formats.onnx.model import Array, onnx_module
from adaptc.quant.bilora import codebook
from adaptc.quant.nf4 import BLOCK, LEVELS, OUTER, dynamic_map
from adaptc.quant.pack import unpack_codes
from adaptc.registry import CODECS

FLOAT, FLOAT16, BFLOAT16, INT32, INT64, DOUBLE = 1, 10, 16, 6, 7, 11
Add = Callable[..., str]


class Emitter:
    """Adds nodes to an edit; every method returns the name of the value it computes."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.nodes: list[Any] = []
        self._opset = edit.model.opset
        self._shared: dict[tuple[Any, ...], str] = {}
        self._count = 0

    def add(self, op: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node and return its output."""
        node, made = self.edit.node(op, inputs, output, domain, **attributes)
        self.nodes.append(node)
        return made

    def hold(self, array: Array) -> str:
        """Add an initializer under a short name; equal small ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 256 else None
        if key is not None and key in self._shared:
            return self._shared[key]
        self._count += 1
        while f"@{self._count}" in self.edit.model.initializers:  # of an adapter put in before
            self._count += 1
        name = self.edit.initializer(f"@{self._count}", array)
        if key is not None:
            self._shared[key] = name
        return name

    def plain(self, t: Tensor) -> str:
        """Return t as float32, stored in 16 bits where that loses nothing."""
        array = t.float().contiguous().numpy()
        half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            return self.add("Cast", self.hold(half), to=FLOAT)
        bf16 = t.bfloat16()
        if bool((bf16.float() == t.float()).all()):
            bits = bf16.contiguous().view(torch.uint16).numpy()
            return self.add("Cast", self.hold(bits.view(_numpy(BFLOAT16))), to=FLOAT)
        return self.hold(array)

    def matrix(self, factor: Factor) -> tuple[str, bool]:
        """Return a factor's float32 values, and whether they come out transposed."""
        if isinstance(factor, Encoded):
            made = self._codes(factor)
            if made is not None:
                return self._rounded(made[0], factor.dtype), made[1]
            factor = factor.decode()
        wide = factor.float()
        for turned in (factor.shape[0] > factor.shape[1], factor.shape[0] <= factor.shape[1]):
            array = (wide.T if turned else wide).contiguous().numpy()
            made_of = integer_rows(array)
            if made_of is not None and sum(g.nbytes for g in made_of) < 2 * array.size:
                return self._integers(made_of), turned
        return self.plain(wide), False

    def levels(self, digits: Array, base: int, table: Array, scale: Array, group: int, low: Array | None = None) -> str:
        """Return table[digits] * scale (+ low), digits (rows, n), scale and low (rows or 1, groups)."""
        code = radix(base)
        name = "Levels" if low is None else "LevelsLow"
        self.edit.function(levels_function(self._opset, name, low is not None))
        inputs = [self.hold(code.pack(digits.reshape(-1))), self.hold(256 ** np.arange(code.nbytes, dtype=np.int32)),
                  self.hold(code.powers.astype(np.int32)), self.hold(np.array(base, np.int32)),
                  self.hold(int64(*digits.shape)), self.hold(table.astype(np.float32)), self._wide(scale),
                  self.hold(int64(group))]
        inputs += [] if low is None else [self._wide(low)]
        return self.add(name, *inputs, domain=DOMAIN)

    def _wide(self, scale: Array | str) -> str:
        """Return scales as float32; they may be the name of a value that is computed."""
        if isinstance(scale, str):
            return scale
        held = self.hold(scale)
        return self.add("Cast", held, to=FLOAT) if scale.dtype == np.float16 else held

    def _rounded(self, value: str, dtype: torch.dtype) -> str:
        """Round to the dtype that the codec decodes to, where it is narrower than float32."""
        to = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}.get(dtype)
        return value if to is None else self.add("Cast", self.add("Cast", value, to=to), to=FLOAT)

    def _integers(self, groups: list[Rows]) -> str:
        parts = [self._digits(g) if g.base else self._rice(g) for g in groups]
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([g.where for g in groups]), kind="stable")
        return self.add("Gather", self.add("Concat", *parts, axis=0), self.hold(order.astype(np.int64)), axis=0)

    def _digits(self, g: Rows) -> str:
        table = np.arange(g.base) * g.step + g.start
        return self.levels(g.numbers, g.base, table, g.scale[:, None], g.numbers.shape[1])

    def _rice(self, g: Rows) -> str:
        unary, low = g.rice()
        zero = self.hold(np.zeros((1, 1), np.float32))
        if g.low:
            one = np.ones((1, 1), np.float32)
            zero = self.levels(low, 2**g.low, np.arange(2**g.low), one, low.shape[1])
        self.edit.function(rice_function(self._opset))
        whole = [self.hold(np.array(v, np.int64)) for v in (2**g.low, g.step, g.start)]
        shape, scale = self.hold(int64(*g.numbers.shape)), self.hold(g.scale[:, None])
        return self.add("Rice", self.hold(unary), zero, *whole, shape, scale, domain=DOMAIN)

    def _codes(self, factor: Encoded) -> tuple[str, bool] | None:
        """Return the values of a factor codec before their cast, None for a codec without a form here."""
        made = CODECS.get(factor.codec)(**factor.config)
        turned = bool(getattr(made, "transpose", False))
        shape = tuple(factor.shape)[::-1] if turned else tuple(factor.shape)
        if factor.codec not in ("affine", "nf4", "fp8", "bilora") or len(shape) != 2:
            return None
        s, (rows, n) = factor.streams, (shape[0], shape[1])
        made.check(s, tuple(factor.shape))
        if factor.codec == "affine":
            digits = unpack_codes(s["codes"], made.width, rows * n).reshape(rows, n).numpy()
            step, low = (s[k].reshape(rows, -1).numpy() for k in ("step", "low"))
            return self.levels(digits, 2**made.width, np.arange(2**made.width), step, made.group, low), turned
        if factor.codec == "fp8":
            table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num().numpy()
            digits = s["codes"].reshape(rows, n).numpy()
            return self.levels(digits, 256, table, s["scale"][:, None].numpy(), n), turned
        if factor.codec == "bilora":
            digits = unpack_codes(s["codes"], made.width, rows * n).reshape(rows, n).numpy()
            mean, std = (v.reshape(1, 1).numpy() for v in s["moments"])
            return self.levels(digits, 2**made.width, codebook(made.width).numpy(), std, n, mean), turned
        return self._nf4(s, rows, n), turned

    def _nf4(self, s: Any, rows: int, n: int) -> str:
        """Blocks run over the flattened matrix; their scales are codes themselves."""
        count = len(s["absmax"])
        block = self.levels(s["absmax"].reshape(1, -1).numpy(), 256, dynamic_map().numpy(),
                            s["scale"].reshape(1, -1).numpy(), OUTER, s["offset"].reshape(1, 1).numpy()
                            .repeat(-(-count // OUTER), 1))
        code = torch.stack([s["codes"] >> 4, s["codes"] & 15], -1).reshape(1, -1)[:, : rows * n].numpy()
        flat = self.levels(code, 16, np.array(LEVELS, np.float32), block, BLOCK)  # type: ignore[arg-type]
        return self.add("Reshape", flat, self.hold(int64(rows, n)))


def _numpy(dtype: int) -> Any:
    return onnx_module().helper.tensor_dtype_to_np_dtype(dtype)
