"""The linear nodes of a graph: MatMul, Gemm, FusedMatMul and MatMulNBits with a constant weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.formats.onnx.model import Model
from adaptc.formats.onnx.names import paths

FLOAT, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16
FLOATS = (FLOAT, FLOAT16, DOUBLE, BFLOAT16)


@dataclass(frozen=True, eq=False)
class Linear:
    """One node y = x W (+ bias). `turned` says that the weight is stored (out, in) and used as its transpose.

    `direct` says that the node (or the one Transpose before it) reads the float initializer `weight` itself; codes are
    not. `dtype` is ONNX's number for that of x. `names`: module path -> how it is known.
    """

    node: Any
    weight: str
    turned: bool
    direct: bool
    shape: tuple[int, int]  # (out, in)
    dtype: int
    names: Mapping[str, str]

    @property
    def x(self) -> str:
        """Name of the input."""
        return str(self.node.input[0])

    @property
    def y(self) -> str:
        """Name of the output."""
        return str(self.node.output[0])

    @property
    def label(self) -> str:
        """The node as error messages call it."""
        return self.node.name or f"{self.node.op_type} of {self.y}"


def linear_nodes(model: Model) -> list[Linear]:
    """Return every linear node of the main graph, in its order."""
    producers = {o: n for n in model.graph.node for o in n.output}
    out = []
    model = Model(model.proto, model.path)  # initializers and inputs may have changed since they were looked at
    for node in model.graph.node:
        read = _READERS.get(node.op_type)
        found = read(model, producers, node) if read is not None else None
        if found is not None:
            out.append(found)
    return out


def attribute(node: Any, name: str, default: float = 0) -> float:
    """Return a number among the attributes of a node."""
    for a in node.attribute:
        if a.name == name:
            return float(a.f) if a.type == 1 else int(a.i)
    return default


def _matmul(model: Model, producers: Mapping[str, Any], node: Any) -> Linear | None:
    if attribute(node, "transA") or len(node.input) < 2:
        return None
    turned = bool(attribute(node, "transB"))
    weight, direct, scale = node.input[1], True, ""
    while weight in producers:
        step = producers[weight]
        if step.op_type == "Transpose" and len(step.output) == 1:
            turned = not turned
        elif step.op_type == "DequantizeLinear":
            direct, scale = False, step.input[1]
        elif step.op_type not in ("Identity", "Cast"):
            return None
        else:
            direct = direct and step.op_type == "Identity"
        weight = step.input[0]
    tensor = model.initializers.get(weight)
    if tensor is None or len(tensor.dims) != 2 or weight in model.inputs:  # a slot is no weight
        return None
    typed = model.initializers.get(scale, tensor)
    if typed.data_type not in FLOATS:
        return None
    shape = (tensor.dims[0], tensor.dims[1]) if turned else (tensor.dims[1], tensor.dims[0])
    return Linear(node, weight, turned, direct, shape, typed.data_type, _names(model, node, node.input[1], weight))


def _nbits(model: Model, producers: Mapping[str, Any], node: Any) -> Linear | None:
    scales = model.initializers.get(node.input[2])
    if scales is None or scales.data_type not in FLOATS:
        return None
    shape = (int(attribute(node, "N")), int(attribute(node, "K")))
    return Linear(node, node.input[1], True, False, shape, scales.data_type, _names(model, node, node.input[1]))


def _names(model: Model, node: Any, *weights: str) -> dict[str, str]:
    """Return module path -> how it is known, the surest way first."""
    out: dict[str, str] = {}
    for weight in weights:
        for path, how in paths(node, weight, model.value_info):
            out.setdefault(path, how)
    return out


_READERS = {"MatMul": _matmul, "Gemm": _matmul, "FusedMatMul": _matmul, "MatMulNBits": _nbits}
