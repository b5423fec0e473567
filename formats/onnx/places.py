"""Where a graph reads a parameter that an adapter replaces whole: a head, a norm, a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptc.errors import FormatError, NeedsError
from adaptc.formats.onnx.linear import attribute
from adaptc.formats.onnx.model import Model, tensor_proto
from adaptc.formats.onnx.names import SCOPES, distance, strings_of

# Operator -> the inputs that hold its weight and its bias.
_INPUTS = {"MatMul": (1, None), "Gemm": (1, 2), "LayerNormalization": (1, 2), "Conv": (1, 2), "Gather": (0, None),
           "Add": (None, 1), "Mul": (1, None), "FusedMatMul": (1, None)}


@dataclass(frozen=True, eq=False)
class Place:
    """An initializer and the nodes (with the number of the input) that read it as this parameter.

    `turned` says that a matrix lies transposed there: (in, out).
    """

    initializer: str
    uses: tuple[tuple[Any, int], ...]
    turned: bool


def find_places(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return where each parameter of `shapes` is read. Raises NeedsError for the first that is nowhere."""
    out = {}
    for key, shape in shapes.items():
        place = _by_scope(model, key, shape) or _by_initializer(model, key, shape) or _dropped(model, key, shape)
        if place is None:
            raise NeedsError(f"{key} {tuple(shape)} is replaced by the adapter, and {model.path.name} has no such "
                             "parameter", hint="export the base from its folder: --base HF-DIR")
        out[key] = place
    return out


def _by_scope(model: Model, key: str, shape: tuple[int, ...]) -> Place | None:
    module, _, leaf = key.rpartition(".")
    hits: dict[str, list[tuple[Any, int]]] = {}
    for node in model.graph.node:
        scopes = strings_of({p.key: p.value for p in node.metadata_props}.get(SCOPES, ""))
        if len(scopes) < 2 or distance(scopes[-2], module) is None:
            continue
        at = _INPUTS.get(node.op_type, (None, None))[leaf == "bias"]
        candidates = (0, 1) if node.op_type in ("Add", "Mul") and at is not None else (at,)
        for i in candidates:
            if i is not None and i < len(node.input) and _fits(model, node.input[i], shape):
                hits.setdefault(node.input[i], []).append((node, i))
    return _place(model, hits, shape)


def _by_initializer(model: Model, key: str, shape: tuple[int, ...]) -> Place | None:
    hits: dict[str, list[tuple[Any, int]]] = {}
    for name in model.initializers:
        if distance(name, key) is not None and _fits(model, name, shape):
            hits[name] = [(n, i) for n in model.graph.node for i, read in enumerate(n.input) if read == name]
    return _place(model, hits, shape)


def _dropped(model: Model, key: str, shape: tuple[int, ...]) -> Place | None:
    """Return the place of a bias of zeros that an exporter left out of a Gemm, put back there."""
    module, _, leaf = key.rpartition(".")
    for node in model.graph.node if leaf == "bias" else ():
        weight = model.initializers.get(node.input[1]) if node.op_type == "Gemm" and len(node.input) == 2 else None
        scopes = strings_of({p.key: p.value for p in node.metadata_props}.get(SCOPES, ""))
        names = [*scopes[-2:-1], node.input[1].removesuffix(".weight")] if weight is not None else []
        if weight is None or all(distance(name, module) is None for name in names):
            continue
        if weight.data_type != 1 or weight.dims[0 if attribute(node, "transB") else 1] != shape[0]:
            continue
        model.graph.initializer.append(tensor_proto(key, np.zeros(shape, np.float32)))
        model.__dict__.pop("initializers", None)
        node.input.append(key)
        return Place(key, ((node, 2),), False)
    return None


def _fits(model: Model, name: str, shape: tuple[int, ...]) -> bool:
    tensor = model.initializers.get(name)
    return tensor is not None and tuple(tensor.dims) in (tuple(shape), tuple(shape)[::-1])


def _place(model: Model, hits: Mapping[str, list[tuple[Any, int]]], shape: tuple[int, ...]) -> Place | None:
    if len(hits) != 1:
        return None
    (name, uses), = hits.items()
    return Place(name, tuple(uses), turned(uses[0][0], tuple(model.initializers[name].dims), shape))


def turned(node: Any, dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a parameter of `shape` lies transposed in the `dims` that a node reads; a square one by the node.

    Raises FormatError for dims that are neither.
    """
    if dims not in (shape, shape[::-1]):
        raise FormatError(f"node {node.name or node.op_type} reads {dims}, the adapter's tensor is {shape}")
    if len(shape) != 2 or dims[0] != dims[1]:
        return dims != shape
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB"))
