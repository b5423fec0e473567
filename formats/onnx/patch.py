"""Slots put into a graph: y = x W becomes y + (x A) B with A and B fed, or decoded from what is fed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adaptc.errors import UnsupportedError
from adaptc.formats.onnx.codes import CODES, functions
from adaptc.formats.onnx.edit import DOMAIN, Edit, int64
from adaptc.formats.onnx.linear import FLOAT, FLOAT16, Linear, attribute
from adaptc.formats.onnx.match import Site
from adaptc.formats.onnx.model import IR, Model, onnx_module, set_metadata
from adaptc.formats.onnx.places import Place
from adaptc.formats.onnx.slots import FLOAT_STORES, STORE, Slot, replaced_name, slot_for

_UINT8, _INT8 = 2, 3


def patch(model: Model, sites: Mapping[str, Site], *, store: str, required: bool = False,
          dora: Iterable[str] = (), full: Iterable[str] = (), places: Mapping[str, Place] | None = None
          ) -> dict[str, Slot]:
    """Give every site a slot, in place, and every place an input; return the slots by parameter.

    Optional slots have rank-0 defaults (gains of one, the old values of what is replaced), with which the model
    computes what it did before, bit for bit; required ones have to be fed.
    """
    edit, made = Edit(model), {}
    magnitudes, dense = set(dora), set(full)
    groups: dict[int, list[tuple[Slot, Site]]] = {}
    nodes: dict[int, Linear] = {}
    for key, site in sites.items():
        slot = slot_for(site, store, dora=key in magnitudes, full=key in dense)
        made[key] = slot
        _declare(edit, slot, store, site.linears[0].dtype, required)
        for linear in site.linears:
            nodes[id(linear)] = linear
            groups.setdefault(id(linear), []).append((slot, site))
    for number, parts in groups.items():
        _branch(edit, nodes[number], parts, store)
    heads = {k: p for k, p in (places or {}).items() if _is_head(p)}
    whole = {id(node) for p in heads.values() for node, _ in p.uses if node.op_type == "Gemm"}
    biases: dict[int, str] = {}  # of a Gemm that is replaced as a whole
    for key, place in (places or {}).items():
        if key not in heads:
            _replaceable(edit, key, place, required, whole, biases)
    for key, place in heads.items():
        _head(edit, key, place, required, biases)
    edit.finish()
    model.proto.ir_version = max(model.proto.ir_version, min(8, IR))
    set_metadata(model, {STORE: store})
    return made


def _declare(edit: Edit, slot: Slot, store: str, dtype: int, required: bool) -> None:
    """Add the inputs of a slot, and their defaults."""
    out, into = slot.shape
    if slot.delta:
        inputs: list[tuple[str, int, list[int | str], tuple[int, ...]]] = [(slot.delta, dtype, ["k", out], (0, out))]
    elif slot.core:
        code = CODES[store]
        byte = _INT8 if code.dequantized else _UINT8
        first: tuple[list[int | str], tuple[int, int]] = (["ra", code.nbytes(into)], (0, code.nbytes(into)))
        if code.dequantized:
            first = ([into, "ra"], (into, 0))
        inputs = [(slot.a, byte, *first),
                  (slot.b, byte, ["rb", code.nbytes(out)], (0, code.nbytes(out))),
                  (slot.core, FLOAT16, ["ra", "rb"], (0, 0))]
    else:
        held = FLOAT_STORES[store]
        inputs = [(slot.a, held, [into, "r"], (into, 0)), (slot.b, held, ["r", out], (0, out))]
    number = len(edit.model.graph.input)
    for i, (name, held, dims, default) in enumerate(inputs):
        named = [f"{d}{number}" if isinstance(d, str) else d for d in dims]  # ranks of modules are independent
        edit.input(name, held, named)
        if not required:
            edit.initializer(name, np.zeros(default, _numpy(inputs[i][1])))
    if slot.gain:
        edit.input(slot.gain, dtype, [out])
        if not required:
            edit.initializer(slot.gain, np.ones(out, _numpy(dtype)))


def _numpy(dtype: int) -> Any:
    return onnx_module().helper.tensor_dtype_to_np_dtype(dtype)


def _branch(edit: Edit, linear: Linear, parts: Sequence[tuple[Slot, Site]], store: str) -> None:
    """Add to the output of a node what its slots make of its input."""
    nodes: list[Any] = []

    def add(op: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        node, made = edit.node(op, inputs, output, domain, **attributes)
        nodes.append(node)
        return made

    base, y = edit.replace_output(linear.node)
    if any(site.rows is not None for _, site in parts):
        branch = _concatenated(edit, add, linear, parts, store)
    else:
        if len(parts) > 1:
            raise UnsupportedError(f"node {linear.label} runs both {parts[0][1].key} and {parts[1][1].key}")
        branch = _product(edit, add, linear, parts[0][0], store)
    gains = [slot.gain for slot, _ in parts if slot.gain]
    if not gains:
        add("Add", base, branch, output=y)
    elif len(parts) > 1:
        raise UnsupportedError(f"{parts[0][1].key}: DoRA inside the fused product of node {linear.label}",
                               hint="--merge folds it into the weight")
    else:
        _scaled(add, linear, base, branch, gains[0], y)
    edit.after(linear.node, *nodes)


def _product(edit: Edit, add: Any, linear: Linear, slot: Slot, store: str) -> str:
    """Return x A B for one slot."""
    if slot.delta:
        edit.constant("adaptc.zero", int64(0))
        edit.constant("adaptc.last", int64(-1))
        rows = add("Shape", slot.delta, start=0, end=1)
        whole: str = add("MatMul", add("Slice", linear.x, "adaptc.zero", rows, "adaptc.last"), slot.delta)
        return whole
    if slot.core:
        return _decoded(edit, add, linear, slot, store)
    same = FLOAT_STORES[store] == linear.dtype
    a, b = (n if same else add("Cast", n, to=linear.dtype) for n in (slot.a, slot.b))
    product: str = add("MatMul", add("MatMul", linear.x, a), b)
    return product


def _decoded(edit: Edit, add: Any, linear: Linear, slot: Slot, store: str) -> str:
    """Return x Qa^T core Qb of a slot that holds codes."""
    code, sizes = CODES[store], {"a": slot.shape[1], "b": slot.shape[0]}
    wide = {side: code.nbytes(n) * code.per_byte for side, n in sizes.items()}
    name, local = functions(edit.model.opset, linear.dtype, wide["a"] != sizes["a"], wide["b"] != sizes["b"],
                            code.dequantized)
    for function in local:
        edit.function(function)
    suffix = "" if linear.dtype == FLOAT else f".{linear.dtype}"
    table = edit.constant(f"adaptc.{store}{suffix}", code.table().astype(_numpy(linear.dtype)))
    # [0, n] rather than [0, -1]: with rank 0 there is nothing to infer a size from.
    shapes = [edit.constant(f"adaptc.0x{w}", int64(0, w)) for w in wide.values() if not code.dequantized]
    ends = [edit.constant(f"adaptc.n{n}", int64(n)) for side, n in sizes.items() if wide[side] != n]
    made: str = add(name, linear.x, slot.a, slot.core, slot.b, table, *shapes, *ends, domain=DOMAIN)
    return made


def _concatenated(edit: Edit, add: Any, linear: Linear, parts: Sequence[tuple[Slot, Site]], store: str) -> str:
    """Return the branches of the parts of a fused product side by side: B is block-diagonal, its zeros not stored."""
    out, into = linear.shape
    pieces, at = [], 0
    for slot, site in sorted(parts, key=lambda p: p[1].rows or (0, 0)):
        start, stop = site.rows or (0, out)
        if start > at:
            pieces.append(_nothing(edit, add, linear, into, start - at))
        pieces.append(_product(edit, add, linear, slot, store))
        at = stop
    if at < out:
        pieces.append(_nothing(edit, add, linear, into, out - at))
    whole: str = add("Concat", *pieces, axis=-1)
    return whole


def _nothing(edit: Edit, add: Any, linear: Linear, into: int, width: int) -> str:
    """Return zeros for the outputs of a part that no slot changes: a product of rank 0."""
    a = edit.constant(f"adaptc.{into}x0.{linear.dtype}", np.zeros((into, 0), _numpy(linear.dtype)))
    b = edit.constant(f"adaptc.0x{width}.{linear.dtype}", np.zeros((0, width), _numpy(linear.dtype)))
    zeros: str = add("MatMul", add("MatMul", linear.x, a), b)
    return zeros


def _scaled(add: Any, linear: Linear, base: str, branch: str, gain: str, y: str) -> None:
    """Multiply what DoRA multiplies, x (W + A B), by its gains; a bias inside the node is left alone."""
    bias = linear.node.input[2] if linear.node.op_type == "Gemm" and len(linear.node.input) > 2 else ""
    if linear.node.op_type == "MatMulNBits" and len(linear.node.input) > 5:
        bias = linear.node.input[5]
    if not bias:
        add("Mul", add("Add", base, branch), gain, output=y)
        return
    if attribute(linear.node, "beta", 1.0) != 1.0:
        raise UnsupportedError(f"node {linear.label} scales its bias, DoRA beside it is not supported")
    # y = gain (base + branch) + (bias - gain bias): with a gain of one the last term is exactly zero.
    rest = add("Sub", bias, add("Mul", gain, bias))
    add("Add", add("Mul", add("Add", base, branch), gain), rest, output=y)


def _is_head(place: Place) -> bool:
    return all(node.op_type in ("MatMul", "Gemm") and at == 1 for node, at in place.uses)


def _head(edit: Edit, key: str, place: Place, required: bool, biases: Mapping[int, str]) -> None:
    """Compute a product twice, with its constant weight and with the one that is fed, and take the latter if there is.

    A weight that is no constant is multiplied by another kernel, whose last bits differ: so the constant stays.
    """
    name, tensor = replaced_name(key), edit.model.initializers[place.initializer]
    out = int(tensor.dims[1 if place.turned else 0])
    edit.input(name, int(tensor.data_type), [f"k{len(edit.model.graph.input)}", out])
    if not required:
        edit.initializer(name, np.zeros((0, out), _numpy(int(tensor.data_type))))
    zero, last = edit.constant("adaptc.zero", int64(0)), edit.constant("adaptc.last", int64(-1))
    for node, _ in place.uses:
        base, y = edit.replace_output(node)
        rows, n_rows = edit.node("Shape", [name], start=0, end=1)
        part, x = edit.node("Slice", [node.input[0], zero, n_rows, last])
        product, z = edit.node("MatMul", [x, name])
        made = [rows, part, product]
        bias = biases.get(id(node), node.input[2] if len(node.input) > 2 else "")
        if bias:
            shifted, z = edit.node("Add", [z, bias])
            made.append(shifted)
        there, fed = edit.node("Cast", [n_rows], to=9)
        chosen, _name = edit.node("Where", [fed, z, base], y)
        edit.after(node, *made, there, chosen)


def _replaceable(edit: Edit, key: str, place: Place, required: bool, whole: Collection[int],
                 biases: dict[int, str]) -> None:
    """Let an input take the place of a constant of one node."""
    name = replaced_name(key)
    tensor = edit.model.initializers[place.initializer]
    edit.input(name, int(tensor.data_type), [int(d) for d in tensor.dims])
    if not required:
        copy = type(tensor)()
        copy.CopyFrom(tensor)
        copy.name = name
        edit.model.graph.initializer.append(copy)
    for node, at in place.uses:
        if id(node) in whole:
            biases[id(node)] = name
        else:
            node.input[at] = name
