"""The model-local functions (domain adaptc) that decode codes inside a graph."""

from __future__ import annotations

from typing import Any

from adaptc.formats.onnx.edit import DOMAIN
from adaptc.formats.onnx.model import onnx_module

FLOAT, INT32, INT64 = 1, 6, 7


def levels_function(opset: int, name: str, low: bool) -> Any:
    """Return Levels(codes, weights, powers, base, shape, table, scale, group) or, with `low` at the end, LevelsLow.

    table[digit] * scale[row, g] [+ low[row, g]] (rows, columns), g = column // group: bytes summed to words with
    `weights`, words split into digits below `base` by its `powers`, as many as `shape` has entries.
    """
    helper = onnx_module().helper
    n = helper.make_node
    nodes = [
        n("Constant", [], ["minus"], value_ints=[-1]), n("Constant", [], ["one"], value_ints=[1]),
        n("Constant", [], ["zero"], value_ints=[0]), n("Constant", [], ["z"], value_int=0),
        n("Constant", [], ["u"], value_int=1),
        n("Shape", ["weights"], ["width"]), n("Concat", ["minus", "width"], ["words"], axis=0),
        n("Reshape", ["codes", "words"], ["bytes"]), n("Cast", ["bytes"], ["ints"], to=INT32),
        n("Mul", ["ints", "weights"], ["placed"]), n("ReduceSum", ["placed", "one"], ["word"], keepdims=1),
        n("Div", ["word", "powers"], ["shifted"]), n("Mod", ["shifted", "base"], ["digits"]),
        n("Reshape", ["digits", "minus"], ["flat"]), n("ReduceProd", ["shape"], ["count"], keepdims=1),
        n("Slice", ["flat", "zero", "count"], ["used"]), n("Reshape", ["used", "shape"], ["index"]),
        n("Gather", ["table", "index"], ["level"]),
        n("Gather", ["shape", "u"], ["columns"]), n("Range", ["z", "columns", "u"], ["column"]),
        n("Div", ["column", "group"], ["of"]),
        n("Gather", ["scale", "of"], ["each"], axis=1),
        n("Mul", ["level", "each"], ["scaled" if low else "values"]),
    ]
    if low:
        nodes += [n("Gather", ["low", "of"], ["start"], axis=1), n("Add", ["scaled", "start"], ["values"])]
    inputs = ["codes", "weights", "powers", "base", "shape", "table", "scale", "group", *(["low"] if low else [])]
    return helper.make_function(DOMAIN, name, inputs, ["values"], nodes, [helper.make_opsetid("", opset)])


def rice_function(opset: int) -> Any:
    """Return Rice(codes, low, base, step, start, shape, scale) -> scale * (start + step * number) (rows, columns).

    The ones among the bits of `codes` end the numbers: distances between them, times `base`, plus `low`, in zigzag.
    """
    helper = onnx_module().helper
    n = helper.make_node
    nodes = [
        n("Constant", [], ["powers"], value_ints=[1, 2, 4, 8, 16, 32, 64, 128]),
        n("Constant", [], ["two"], value_int=2), n("Constant", [], ["one"], value_int=1),
        n("Constant", [], ["minus"], value_ints=[-1]), n("Constant", [], ["zero"], value_ints=[0]),
        n("Cast", ["codes"], ["wide"], to=INT64), n("Unsqueeze", ["wide", "minus"], ["bytes"]),
        n("Div", ["bytes", "powers"], ["shifted"]), n("Mod", ["shifted", "two"], ["bits"]),
        n("Reshape", ["bits", "minus"], ["string"]), n("NonZero", ["string"], ["where"]),
        n("Reshape", ["where", "minus"], ["ends"]), n("Slice", ["ends", "zero", "minus"], ["others"]),
        n("Concat", ["minus", "others"], ["before"], axis=0), n("Sub", ["ends", "before"], ["apart"]),
        n("Sub", ["apart", "one"], ["high"]), n("Reshape", ["high", "shape"], ["rest"]),
        n("Mul", ["rest", "base"], ["placed"]), n("Cast", ["low"], ["least"], to=INT64),
        n("Add", ["placed", "least"], ["zigzag"]),
        # 2h -> h and 2h + 1 -> -h - 1
        n("Div", ["zigzag", "two"], ["half"]), n("Mod", ["zigzag", "two"], ["odd"]),
        n("Add", ["half", "half"], ["even"]), n("Add", ["even", "one"], ["mirror"]),
        n("Mul", ["odd", "mirror"], ["drop"]),
        n("Sub", ["half", "drop"], ["number"]),
        n("Mul", ["number", "step"], ["stepped"]), n("Add", ["stepped", "start"], ["level"]),
        n("Cast", ["level"], ["float"], to=FLOAT), n("Mul", ["float", "scale"], ["values"]),
    ]
    return helper.make_function(DOMAIN, "Rice", ["codes", "low", "base", "step", "start", "shape", "scale"], ["values"],
                                nodes, [helper.make_opsetid("", opset)])
