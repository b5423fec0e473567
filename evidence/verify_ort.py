"""ONNX Runtime: adapters in the slots of a model, expanders, and merged models, against torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import NeedsError, UsageError
from adaptc.evidence.ort_session import OrtModel, run_expander
from adaptc.evidence.verdict import Runs, Verdict, compare_source, judge
from adaptc.evidence.verify_torch import Reference, fitting, open_reference
from adaptc.formats.onnx.adapter_file import read_adapter_file
from adaptc.formats.onnx.codes import decode
from adaptc.formats.onnx.model import Array, Model, open_model
from adaptc.formats.onnx.names import distance
from adaptc.formats.onnx.slots import STORE, Slot, replaced_slots, required, slots_of
from adaptc.formats.onnx.values import nothing

# Of the adapter's effect, and of the outputs without one: float bases, and bases whose weights are quantized.
TOLERANCE, BASE, BASE_ROUNDED = 2e-3, 1e-3, 0.7
ROUNDED_OPS = frozenset({"MatMulNBits", "DequantizeLinear", "GatherBlockQuantized", "DynamicQuantizeMatMul"})


@dataclass(frozen=True)
class Parts:
    """What an artefact is made of: the model to run, what is put into it, or the merged model itself."""

    model: Path
    adapter: Path | None = None
    merged: Path | None = None
    reference: Path | None = None


def verify(artefact: Path, base: Path, source: Adapter | None, reference: Path | None, prompts: Sequence[str]
           ) -> tuple[Verdict, ...]:
    """Run an `.onnx_adapter`, an expander, a merged model or a folder of adaptc export --onnx, and compare with torch.

    `base` is the ONNX model, or the HF folder where the artefact's folder holds the model. Raises NeedsError where the
    model in torch or, for a merged model, the adapter is not known.
    """
    parts = parts_of(artefact, base)
    folder = reference or parts.reference
    if folder is None:
        raise NeedsError("the base model in torch is not known", hint="--reference takes its folder")
    torch_model = open_reference(folder, source)
    inputs = torch_model.ids(4, 24, prompts)
    if parts.merged is not None:
        if source is None:
            raise NeedsError("a merged model does not tell its adapter", hint="--adapter takes what it was made from")
        fitted = fitting(source, torch_model)
        without = (OrtModel(parts.model).outputs(inputs) if parts.model != parts.merged
                   else torch_model.outputs(inputs))
        return (_judged(torch_model, inputs, fitted, without, OrtModel(parts.merged).outputs(inputs),
                        open_model(parts.merged)),)
    model = open_model(parts.model)
    assert parts.adapter is not None
    expander = parts.adapter.suffix == ".onnx"
    arrays = run_expander(parts.adapter) if expander else read_adapter_file(parts.adapter)
    unknown = sorted(set(arrays) - set(model.inputs))
    if unknown:
        return (Verdict("wrong base", f"{parts.model.name} has no input {unknown[0]}, as {len(unknown)} of the "
                        f"{len(arrays)} that the artefact gives"),)
    made = held(arrays, model, torch_model, source)
    found = [] if source is None else [compare_source(made, _linear(fitting(source, torch_model), made))]
    fed, off = required(model), OrtModel(parts.model)
    heads = _settled(torch_model, made, model, arrays)
    without = off.outputs(inputs, {**(_nothing(model, torch_model) if fed else {}), **heads})
    given = (off.outputs(inputs, arrays) if fed or expander else off.outputs(inputs, None, parts.adapter))
    return (*found, _judged(torch_model, inputs, made, without, given, model))


def parts_of(artefact: Path, base: Path) -> Parts:
    """Return the parts of an artefact. Raises UsageError where they cannot be told."""
    hf = base if (base / "config.json").is_file() else None
    models = [base] if base.suffix == ".onnx" else sorted(base.glob("*.onnx")) if hf is None else []
    if artefact.is_dir():
        fed = [*sorted(artefact.glob("*.onnx_adapter")), *sorted(artefact.glob("expander.onnx"))]
        inside = [p for p in sorted(artefact.glob("*.onnx")) if p.name != "expander.onnx"]
        if not fed and len(inside) == 1:
            return Parts(models[0] if models else inside[0], merged=inside[0], reference=hf)
        if len(fed) != 1:
            raise UsageError(f"{artefact} holds {len(fed)} adapters", hint="name the .onnx_adapter or expander.onnx")
        models = inside or models
        artefact = fed[0]
    elif artefact.suffix == ".onnx" and open_model(artefact).inputs:
        return Parts(models[0] if models else artefact, merged=artefact, reference=hf)
    models = models or [p for p in sorted(artefact.parent.glob("*.onnx")) if p.name != "expander.onnx"]
    if len(models) != 1:
        raise UsageError(f"{base} and {artefact.parent} tell {len(models)} models to run", hint="--base model.onnx")
    return Parts(models[0], artefact, reference=hf)


def held(arrays: Mapping[str, Array], model: Model, reference: Reference, source: Adapter | None) -> Adapter:
    """Return what arrays say in the slots of a model, under the names of the reference's parameters.

    A slot with gains is DoRA, whose magnitude only `source` tells: its delta is taken from there.
    """
    store = model.metadata().get(STORE, "float32")
    modules = {n.removesuffix(".weight"): p for n, p in reference.model.named_parameters() if n.endswith(".weight")}
    theirs = fitting(source, reference) if source is not None else None
    deltas: dict[str, Delta] = {}
    for stem, slot in slots_of(model).items():
        if not any(n in arrays and arrays[n].size for n in slot.names):
            continue
        near = {m: d for m in modules if (d := distance(stem, m)) is not None}
        if not near:
            raise UsageError(f"{stem}: the reference model has no such module", hint="--reference is another model")
        name = min(near, key=lambda m: near[m])
        key = f"{name}.weight"
        mine = theirs.deltas.get(key) if theirs is not None else None
        if isinstance(mine, NeedsBase):
            deltas[key] = mine
        else:
            weight = modules[name]
            conv1d = type(reference.model.get_submodule(name)).__name__ == "Conv1D"
            deltas[key] = _delta(slot, arrays, store, tuple(weight.shape[::-1] if conv1d else weight.shape))
    replaced: dict[str, Replacement] = {}
    for key, name in replaced_slots(model).items():
        if name in arrays:
            value, near_key = torch.from_numpy(np.array(arrays[name])), _parameter(key, reference)
            shape = reference.model.get_parameter(near_key).shape
            replaced[near_key] = value.reshape(shape) if value.shape == shape else value.mT
    origin = source.origin if source is not None else Origin("onnx")
    return Adapter(deltas, replaced, replace(origin, fingerprint=None, layout={}))


def _parameter(key: str, reference: Reference) -> str:
    names = [n for n, _ in reference.model.named_parameters()]
    return next((n for n in names if n == key or n.endswith("." + key) or key.endswith("." + n)), key)


def _delta(slot: Slot, arrays: Mapping[str, Array], store: str, shape: tuple[int, ...]) -> Delta:
    if slot.delta:
        return Dense(_tensor(arrays[slot.delta]).mT, 1.0, (shape[0], shape[1]))
    if slot.core:
        b, a = decode(store, arrays[slot.a], arrays[slot.b], arrays[slot.core], (shape[0], shape[1]))
        return LowRank(a, b, None, 1.0, (shape[0], shape[1]))
    return LowRank(_tensor(arrays[slot.a]).mT, _tensor(arrays[slot.b]).mT, None, 1.0, (shape[0], shape[1]))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _linear(source: Adapter, made: Adapter) -> Adapter:
    """Return the source without what is not in slots as factors: DoRA, which is taken over as it is."""
    return replace(source, deltas={k: d for k, d in source.deltas.items() if not isinstance(d, NeedsBase)})


def _settled(reference: Reference, made: Adapter, model: Model, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Give the reference the adapter's tensors for parameters that its base has not; return what to feed for the same.

    A head that the base's files lack is random, and another one in every process: without an adapter there is nothing
    to compare until both sides have the adapter's.
    """
    fed: dict[str, Array] = {}
    for key, name in replaced_slots(model).items():
        near = _parameter(key, reference)
        value = made.replaced.get(near)
        if near in reference.missing and isinstance(value, Tensor) and name in arrays:
            reference.model.get_parameter(near).data = value.float().contiguous()
            fed[name] = arrays[name]
    return fed


def _nothing(model: Model, reference: Reference) -> dict[str, Array]:
    """Return what required inputs are fed for no adapter: rank 0, and the base's own tensors where it replaces some."""
    store = model.metadata().get(STORE, "float32")
    fed: dict[str, Array] = {}
    for slot in slots_of(model).values():
        fed |= nothing(slot, store)
    for key, name in replaced_slots(model).items():
        own = reference.model.get_parameter(_parameter(key, reference)).float()
        dims = [int(d.dim_value) for d in model.inputs[name].type.tensor_type.shape.dim]
        fed[name] = (own if list(own.shape) == dims else own.mT).contiguous().numpy()
    return fed


def _judged(reference: Reference, inputs: Sequence[Tensor], adapter: Adapter, without: Tensor, given: Tensor,
            model: Model) -> Verdict:
    rounded = any(n.op_type in ROUNDED_OPS for n in model.graph.node)
    return judge(Runs(without, given, reference.outputs(inputs),
                      lambda _, scale: reference.outputs(inputs, adapter, scale), TOLERANCE,
                      BASE_ROUNDED if rounded else BASE))
