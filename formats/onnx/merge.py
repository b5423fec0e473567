"""Adapters folded into the float weights of a graph: on disk, or by constant nodes that a session folds at load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.delta import BaseFree, Delta, LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError
from adaptc.formats.onnx.edit import Edit, int64
from adaptc.formats.onnx.emit import FLOAT, Emitter
from adaptc.formats.onnx.emit_delta import entries
from adaptc.formats.onnx.emit_delta import factors as emit_factors
from adaptc.formats.onnx.emit_delta import matrix as emit_matrix
from adaptc.formats.onnx.linear import Linear, attribute
from adaptc.formats.onnx.match import Site, float_weight
from adaptc.formats.onnx.model import Model
from adaptc.formats.onnx.places import Place
from adaptc.formats.onnx.values import Weight, factors, gains, inner, is_full


def merge_on_disk(model: Model, deltas: Mapping[str, Delta], sites: Mapping[str, Site], places: Mapping[str, Place],
                  replaced: Mapping[str, Tensor]) -> None:
    """Write W + dW (float64, cast once) in the place of every weight, and carried tensors in theirs."""
    edit = Edit(model)
    for linear, parts in _by_node(sites):
        w = torch.from_numpy(np.ascontiguousarray(float_weight(model, linear)).astype(np.float64))
        for site in parts:
            start, stop = site.rows or (0, w.shape[0])
            w[start:stop] += _change(deltas[site.key], w[start:stop])
        dtype = model.values(linear.weight).dtype
        name = edit.initializer(f"{linear.weight}/merged/{linear.y}", _oriented(w, linear).numpy().astype(dtype))
        linear.node.input[1] = name
    for key, place in places.items():
        old = model.values(place.initializer)
        if key in replaced:
            value = replaced[key].double()
        else:
            value = torch.from_numpy(old.astype(np.float64))
            value = value.mT if place.turned else value
            value = value + _change(deltas[key], value).reshape(value.shape)
        value = value.mT if place.turned else value
        if tuple(value.shape) != old.shape:
            raise FormatError(f"{key}: adapter has shape {tuple(value.shape)}, the model {old.shape}")
        name = edit.initializer(f"{place.initializer}/merged", value.numpy().astype(old.dtype))
        for node, at in place.uses:
            node.input[at] = name
    edit.finish()


def merge_at_load(model: Model, deltas: Mapping[str, Delta], sites: Mapping[str, Site], places: Mapping[str, Place],
                  replaced: Mapping[str, Tensor], weight: Weight) -> None:
    """Put nodes before every weight that compute W + dW from codes: constants, which a session folds when it is made.

    Sparse changes are scattered into W. The file grows by the codes; nothing is left to compute for a token.
    """
    edit = Edit(model)
    emit = Emitter(edit)
    for linear, parts in _by_node(sites):
        if not linear.direct:
            float_weight(model, linear)  # raises
        value = linear.node.input[1]
        for site in parts:
            value = _folded(emit, linear, site, deltas[site.key], value, weight)
        linear.node.input[1] = value
    for key, place in places.items():
        if key not in replaced:
            raise NeedsError(f"{key} is no linear layer, --merge load folds only those", hint="--merge disk")
        value = replaced[key].mT if place.turned else replaced[key]
        held = emit.add("Cast", emit.plain(value), to=int(model.initializers[place.initializer].data_type))
        for node, at in place.uses:
            node.input[at] = held
    edit.first(*_makers(model, emit), *emit.nodes)
    edit.finish()


def _makers(model: Model, emit: Emitter) -> list[Any]:
    """Return the nodes (Transpose, Identity) between initializers and the weights that are read, to go before all.

    Raises FormatError for a weight that is made of more than constants.
    """
    made = {o for n in emit.nodes for o in n.output}
    wanted = {i for n in emit.nodes for i in n.input} - made
    moved = [n for n in model.graph.node if wanted & set(n.output)]
    for node in moved:
        if any(i not in model.initializers for i in node.input):
            raise FormatError(f"node {node.name or node.op_type} makes a weight out of more than constants")
    return moved


def _by_node(sites: Mapping[str, Site]) -> list[tuple[Linear, list[Site]]]:
    """Return every node with the sites it runs, several for a fused product."""
    out: dict[int, tuple[Linear, list[Site]]] = {}
    for site in sites.values():
        for linear in site.linears:
            out.setdefault(id(linear.node), (linear, []))[1].append(site)
    return list(out.values())


def _change(delta: Delta, w: Tensor) -> Tensor:
    """Return dW float64 for base weight w (out, in), the full form of any delta."""
    plain = delta.resolve(w) if isinstance(delta, NeedsBase) else delta
    return plain.dense()


def _oriented(w: Tensor, linear: Linear) -> Tensor:
    """Return a weight (out, in) as input 1 of the node reads it."""
    return w if attribute(linear.node, "transB") or linear.node.op_type == "MatMulNBits" else w.mT.contiguous()


def _folded(emit: Emitter, linear: Linear, site: Site, delta: Delta, value: str, weight: Weight) -> str:
    """Return the name of W + dW in the orientation of `value`."""
    turned = bool(attribute(linear.node, "transB"))  # (out, in)
    part = inner(delta)
    if isinstance(part, Sparse) and site.rows is None and not isinstance(delta, NeedsBase):
        return _scattered(emit, linear, part, value, turned)
    dw = _product(emit, site.key, part, turned)
    if site.rows is not None:
        dw = _placed(emit, dw, site.rows, linear.shape[0], turned)
    total = emit.add("Add", value, _as(emit, dw, linear.dtype))
    if not isinstance(delta, NeedsBase):
        return total
    if site.rows is not None:
        raise NeedsError(f"{site.key}: DoRA inside a fused product", hint="--merge disk")
    gain = gains(site.key, delta, weight)
    held = emit.hold((gain[:, None] if turned else gain[None]).contiguous().numpy())
    return emit.add("Mul", total, _as(emit, held, linear.dtype))


def _product(emit: Emitter, key: str, part: BaseFree, turned: bool) -> str:
    """Return dW (out, in) if `turned`, else dW^T, float32."""
    if is_full(part):
        whole = emit_matrix(emit, part)
        return emit.add("Transpose", whole, perm=[1, 0]) if turned else whole
    low: LowRank = factors(key, part)
    a, b = emit_factors(emit, low)
    dw = emit.add("MatMul", a, b)
    return emit.add("Transpose", dw, perm=[1, 0]) if turned else dw


def _placed(emit: Emitter, dw: str, rows: Sequence[int], total: int, turned: bool) -> str:
    """Return dW of a part among zeros for the other outputs of a fused product."""
    before, after = rows[0], total - rows[1]
    pads = (before, 0, after, 0) if turned else (0, before, 0, after)
    return emit.add("Pad", dw, emit.hold(int64(*pads)))


def _scattered(emit: Emitter, linear: Linear, delta: Sparse, value: str, turned: bool) -> str:
    """Return W with the changed entries written into it."""
    where, change = entries(emit, delta, turned)
    flat = emit.add("Reshape", value, emit.hold(int64(-1)))
    changed = emit.add("Add", emit.add("Gather", flat, where), _as(emit, change, linear.dtype))
    written = emit.add("ScatterElements", flat, where, changed, axis=0)
    shape = linear.shape if turned else linear.shape[::-1]
    return emit.add("Reshape", written, emit.hold(int64(*shape)))


def _as(emit: Emitter, value: str, dtype: int) -> str:
    return value if dtype == FLOAT else emit.add("Cast", value, to=dtype)
