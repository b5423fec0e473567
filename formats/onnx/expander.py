"""The expander: a graph without inputs that decodes an adapter's codes into the tensors of slots, once at load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adaptc.adapter import Adapter
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.onnx.edit import Edit
from adaptc.formats.onnx.emit import FLOAT, Emitter
from adaptc.formats.onnx.emit_delta import factors as emit_factors
from adaptc.formats.onnx.emit_delta import matrix as emit_matrix
from adaptc.formats.onnx.model import IR, OPSET, Array, Model, onnx_module, onnxruntime_module
from adaptc.formats.onnx.slots import Slot
from adaptc.formats.onnx.values import Weight, carried, cast, factors, full_matrix, gains, in_onnx_order, inner, nothing


def expander(adapter: Adapter, slots: Mapping[str, Slot], weight: Weight, *, rest: Mapping[str, Slot] | None = None,
             replaced: Mapping[str, tuple[str, bool]] | None = None) -> Model:
    """Return the graph whose outputs are named as the inputs of `slots` (parameter -> slot) and hold their values.

    `rest`: slots that have to be fed although the adapter changes nothing there. `replaced`: parameter -> (input,
    transposed) of tensors carried whole. Raises UnsupportedError for slots that hold codes themselves.
    """
    helper = onnx_module().helper
    graph = helper.make_graph([], "adaptc expander", [], [])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR,
                              producer_name="adaptc")
    model = Model(proto, Path("expander.onnx"))
    emit = Emitter(Edit(model))
    for key, slot in slots.items():
        _module(emit, key, adapter, slot, weight)
    for slot in (rest or {}).values():
        for name, array in nothing(slot, "").items():
            _constant(emit, name, array)
    for key, value in carried(adapter).items():
        if replaced and key in replaced:
            name, turned = replaced[key]
            value = value.T if turned else value
            _output(emit, name, emit.plain(value), FLOAT, list(value.shape))
    emit.edit.first(*emit.nodes)
    emit.edit.finish()
    return model


def reference(adapter: Adapter, slots: Mapping[str, Slot]) -> dict[str, Array]:
    """Return what the outputs have to be, from adaptc's own decoder."""
    out: dict[str, Array] = {}
    for key, slot in slots.items():
        delta = adapter.deltas[key]
        if slot.delta:
            out[slot.delta] = cast(full_matrix(inner(delta)), slot.dtype)
        else:
            a, b = in_onnx_order(factors(key, delta))
            out |= {slot.a: cast(a, slot.dtype), slot.b: cast(b, slot.dtype)}
    return out


def expand(model: Model) -> dict[str, Array]:
    """Run an expander in ONNX Runtime and return its outputs."""
    ort = onnxruntime_module()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {}), strict=True))


def check(model: Model, wanted: Mapping[str, Array]) -> float:
    """Run the expander and compare with our decoder; return the largest difference, 0 where all bits agree.

    Only spectral changes, sums of many terms, may round differently, by one unit in the last place.
    """
    found, worst = expand(model), 0.0
    for name, array in wanted.items():
        if found[name].shape != array.shape or found[name].dtype != array.dtype:
            raise FormatError(f"{name}: expands to {found[name].shape}, decodes to {array.shape}")
        gap = np.abs(found[name].astype(np.float64) - array.astype(np.float64)).max(initial=0)
        if gap > 1e-6 * np.abs(array.astype(np.float64)).max(initial=0):
            raise FormatError(f"{name}: expands to values {gap:.3g} from the decoder's")
        worst = max(worst, float(gap))
    return worst


def _module(emit: Emitter, key: str, adapter: Adapter, slot: Slot, weight: Weight) -> None:
    delta = adapter.deltas[key]
    if slot.core:
        raise UnsupportedError(f"{key}: input {slot.a} takes codes, an expander feeds floats",
                               hint="--slots required --store float32 makes slots for it")
    if slot.delta:
        out, into = delta.shape
        if slot.shape[0] not in (0, out):
            raise FormatError(f"{key}: adapter is for shape {(out, into)}, input {slot.delta} for {slot.shape[0]} rows")
        _output(emit, slot.delta, emit_matrix(emit, inner(delta)), slot.dtype, [into, out])
    else:
        low = factors(key, delta)
        if slot.rank not in (None, low.rank):
            raise FormatError(f"{key}: rank {low.rank}, input {slot.a} takes {slot.rank}")
        a, b = emit_factors(emit, low)
        _output(emit, slot.a, a, slot.dtype, [low.a.shape[1], low.a.shape[0]])
        inside = low.b.shape[1] if low.core is None else low.core.shape[1]
        _output(emit, slot.b, b, slot.dtype, [inside, low.b.shape[0]])
    if slot.gain:
        _constant(emit, slot.gain, cast(gains(key, delta, weight), slot.gain_dtype))


def _output(emit: Emitter, name: str, value: str, dtype: int, dims: list[int]) -> None:
    if dtype == FLOAT:
        emit.add("Identity", value, output=name)
    else:
        emit.add("Cast", value, output=name, to=dtype)
    emit.edit.model.graph.output.append(onnx_module().helper.make_tensor_value_info(name, dtype, dims))


def _constant(emit: Emitter, name: str, array: Array) -> None:
    onnx = onnx_module()
    emit.add("Identity", emit.hold(array), output=name)
    dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    emit.edit.model.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, list(array.shape)))
