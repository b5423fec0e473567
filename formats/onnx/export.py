"""The four ways to put an adapter into ONNX: slots and a file for them, an expander, or folded into the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.delta import NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.fingerprint import fingerprint
from adaptc.formats.format import history_steps
from adaptc.formats.onnx.adapter_file import write_adapter_file
from adaptc.formats.onnx.expander import check, expander, reference
from adaptc.formats.onnx.linear import FLOAT16, linear_nodes
from adaptc.formats.onnx.match import Site, float_weight, match, match_some
from adaptc.formats.onnx.merge import merge_at_load, merge_on_disk
from adaptc.formats.onnx.model import Array, Model, onnx_module, set_metadata, write_model
from adaptc.formats.onnx.names import distance
from adaptc.formats.onnx.patch import patch
from adaptc.formats.onnx.places import Place, find_places, turned
from adaptc.formats.onnx.slots import FLOAT_STORES, STORE, assign, replaced_slots, required, slots_of
from adaptc.formats.onnx.values import carried, factors, fed, inner, is_full, nothing
from adaptc.formats.parts import joined
from adaptc.measure import norm2
from adaptc.resolve import resolved


@dataclass(frozen=True)
class Plan:
    """What to make. `slots`: "", "optional" or "required"; `merge`: "", "load" or "disk"; `store`: see slots, codes."""

    slots: str = ""
    adapter_only: bool = False
    expander: bool = False
    merge: str = ""
    store: str = ""
    bits: float = 1.0
    inlined: bool = False  # without model-local functions
    name: str = "adapter"
    base: str = ""

    def __post_init__(self) -> None:
        if self.merge and (self.slots or self.adapter_only or self.expander):
            raise UsageError("a merged model has no slots: --merge stands alone")
        if self.adapter_only and (self.slots or self.expander):
            raise UsageError("--adapter-only writes one file for a base that has slots: it stands alone")
        if self.expander and self.store and self.store not in FLOAT_STORES:
            raise UsageError(f"an expander feeds floats, not --store {self.store}",
                             hint="quantize the adapter itself: adaptc quantize")


@dataclass
class Made:
    """What was written: files with bytes, how modules were found, the error of what slots hold, remarks."""

    files: dict[str, int] = field(default_factory=dict)
    modules: list[tuple[str, str, str]] = field(default_factory=list)  # parameter, node, how it is known
    error: float | None = None
    notes: list[str] = field(default_factory=list)


def export(adapter: Adapter, model: Model, out: Path, plan: Plan, weights: Base | None = None) -> Made:
    """Write what `plan` asks for into the folder `out`; the base model is changed in memory only.

    Raises NeedsError, FormatError or UnsupportedError naming the first module or node that stands in the way.
    """
    made = Made()
    adapter = _base_free(joined(adapter), weights, bool(plan.merge))
    weight = _Weights(model, weights)
    if plan.merge:
        _merge(adapter, model, plan, weight, weights, made)
    elif plan.slots:
        _patch(adapter, model, plan, weights, made)
    if plan.merge or plan.slots:
        _finish(adapter, model, plan)
        write_model(model, out / model.path.name)
        _check(out / model.path.name)
    if not plan.merge:
        _feed(adapter, model, out, plan, weight, made)
    made.files = {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    return made


def _base_free(adapter: Adapter, weights: Base | None, merging: bool) -> Adapter:
    """Return the adapter with changes of base weights as deltas, where the base is at hand; DoRA stays."""
    if any(isinstance(d, NeedsBase) and d.kind != "dora" for d in adapter.deltas.values()):
        if weights is None:
            key, kind = next((k, d.kind) for k, d in adapter.deltas.items() if isinstance(d, NeedsBase))
            raise NeedsError(f"{key}: {kind} is only defined on base weights",
                             hint="pass --weights with the folder of the base's safetensors")
        adapter = resolved(adapter, weights, keep=("dora",))
    for key, delta in adapter.deltas.items():
        if not merging and len(delta.shape) != 2:
            raise UnsupportedError(f"{key}: a change of shape {tuple(delta.shape)} takes no slot",
                                   hint="--merge disk folds it into the weight")
    return adapter


def _merge(adapter: Adapter, model: Model, plan: Plan, weight: _Weights, weights: Base | None, made: Made) -> None:
    shapes = {k: d.shape for k, d in adapter.deltas.items()}
    linear = {k: s for k, s in shapes.items() if len(s) == 2 and k.endswith(".weight")}
    sites = match_some(model, linear, weights)
    try:
        places = find_places(model, {k: tuple(s) for k, s in shapes.items() if k not in sites})
    except NeedsError:
        match(model, linear, weights)  # says more
        raise
    replaced = carried(adapter)
    places |= find_places(model, {k: tuple(t.shape) for k, t in replaced.items()})
    _same_base(adapter, model, sites)
    _told(made, sites, places)
    if plan.merge == "disk":
        merge_on_disk(model, adapter.deltas, sites, places, replaced)
    else:
        merge_at_load(model, adapter.deltas, sites, places, replaced, weight)


def _patch(adapter: Adapter, model: Model, plan: Plan, weights: Base | None, made: Made) -> None:
    if slots_of(model):
        first = next(iter(slots_of(model).values())).names[0]
        raise UsageError(f"{model.path.name} has slots already, such as {first}",
                         hint="--adapter-only or --expander makes what they are fed")
    full = [k for k, d in adapter.deltas.items() if is_full(d)]
    if full and not plan.expander:
        raise UnsupportedError(f"{full[0]}: a sparse change fed as a matrix takes as much as the weight",
                               hint="--merge load scatters it into the weight; --expander makes the matrix at load")
    for key, delta in adapter.deltas.items():
        if key not in full:
            factors(key, delta)  # raises for what no slot holds, before anything is changed
    dora = [k for k, d in adapter.deltas.items() if isinstance(d, NeedsBase)]
    sites = match(model, {k: d.shape for k, d in adapter.deltas.items()}, weights)
    places = find_places(model, {k: tuple(t.shape) for k, t in carried(adapter).items()})
    _same_base(adapter, model, sites)
    _told(made, sites, places)
    half = all(s.linears[0].dtype == FLOAT16 for s in sites.values())
    store = plan.store or ("float16" if half else "float32")
    patch(model, sites, store=store, required=plan.slots == "required", dora=dora, full=full, places=places)


def _feed(adapter: Adapter, model: Model, out: Path, plan: Plan, weight: _Weights, made: Made) -> None:
    """Write the adapter file, or the expander, for the slots that the model has now."""
    slots = assign(model, adapter.deltas)
    store = model.metadata().get(STORE, "float32")
    have = replaced_slots(model)
    for key in carried(adapter):
        if key not in have:
            raise NeedsError(f"{key}: the adapter replaces it, and {model.path.name} has no input for that",
                             hint="--slots patches the original base for this adapter")
        whole = key.removesuffix(".bias") + ".weight"
        if key.endswith(".bias") and whole in have and whole not in carried(adapter):
            raise UnsupportedError(f"{key}: replaced without {whole}, which the input {have[whole]} goes with")
    must = required(model)
    rest = {s: slot for s, slot in slots_of(model).items() if must and slot not in slots.values()}
    places = {k: (have[k], _turned(model, have[k], t)) for k, t in carried(adapter).items()}
    if plan.expander:
        made_graph = expander(adapter, slots, weight, rest=rest, replaced=places)
        _finish(adapter, made_graph, plan)
        onnx_module().checker.check_model(made_graph.proto, full_check=True)
        worst = check(made_graph, reference(adapter, slots))
        made.notes.append("the expander's outputs, run in ONNX Runtime, are the decoder's " +
                          ("to the last bit" if worst == 0 else f"to {worst:.2g}"))
        write_model(made_graph, out / "expander.onnx")
        return
    arrays: dict[str, Array] = {}
    lost = total = 0.0
    for key, slot in slots.items():
        each = fed(key, adapter.deltas[key], slot, store, bits=plan.bits, weight=weight)
        arrays |= each.arrays
        energy = norm2(inner(adapter.deltas[key]))
        lost, total = lost + each.error**2 * energy, total + energy
    for slot in rest.values():
        arrays |= nothing(slot, store)
    for key, (name, transposed) in places.items():
        value = carried(adapter)[key]
        arrays[name] = (value.T if transposed else value).float().contiguous().numpy()
    made.error = (lost / total) ** 0.5 if total else 0.0
    write_adapter_file(out / f"{plan.name}.onnx_adapter", arrays)


def _turned(model: Model, name: str, value: Tensor) -> bool:
    """Return whether the input of a replaced parameter takes it transposed."""
    found = model.inputs[name].type.tensor_type.shape.dim
    dims = tuple(int(d.dim_value) for d in found)
    if len(dims) == 2 == value.dim() and found[0].dim_param:  # the weight of a product, (in or 0, out)
        if dims[1] != value.shape[0]:
            raise FormatError(f"{name} has {dims[1]} outputs, the adapter's tensor {tuple(value.shape)}")
        return True
    return turned(next(n for n in model.graph.node if name in n.input), dims, tuple(value.shape))


def _same_base(adapter: Adapter, model: Model, sites: Mapping[str, Site]) -> None:
    """Hold the graph's float weights against the fingerprint of the base the adapter was made for."""
    stored = adapter.origin.fingerprint
    plain = all(s.rows is None and s.linears[0].direct and s.linears[0].dtype in (1, 16) for s in sites.values())
    if stored is None or not plain or set(sites) != set(adapter.deltas):
        return
    found = fingerprint(_Graph(model, sites), adapter)
    if found != stored:
        first = next(iter(sites.values())).linears[0].label
        raise FormatError(f"weights of {model.path.name} (from node {first} on) have fingerprint {found}, the adapter "
                          f"was made for {stored}", hint="pass the base it was trained on")


class _Graph:
    """Weights of the matched nodes, as `fingerprint` reads them."""

    def __init__(self, model: Model, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites

    def weight(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return the weight (out, in) of a parameter."""
        return torch.tensor(float_weight(self._model, self._sites[key].linears[0]))


class _Weights:
    """Base weights for DoRA's norms: of the folder where one is given, else of the graph as it was opened."""

    def __init__(self, model: Model, weights: Base | None) -> None:
        self._model, self._weights = model, weights

    def __call__(self, key: str) -> Tensor:
        if self._weights is not None:
            return self._weights.weight(key, (0, 0))
        site = match(self._model, {key: self._shape(key)})[key]
        w = float_weight(self._model, site.linears[0])
        return torch.tensor(w if site.rows is None else w[site.rows[0] : site.rows[1]])

    def _shape(self, key: str) -> tuple[int, ...]:
        for linear in linear_nodes(self._model):
            if any(distance(p, key.removesuffix(".weight")) is not None for p in linear.names):
                return linear.shape
        raise NeedsError(f"{key}: no node of {self._model.path.name} holds its weight, which DoRA's norm takes",
                         hint="pass --weights with the folder of the base's safetensors")


def _told(made: Made, sites: Mapping[str, Site], places: Mapping[str, Place]) -> None:
    made.modules = [(k, ", ".join(x.label for x in s.linears), s.how) for k, s in sites.items()]
    made.modules += [(k, ", ".join(n.name or n.op_type for n, _ in p.uses), "replaced or folded whole")
                     for k, p in places.items()]


def _finish(adapter: Adapter, model: Model, plan: Plan) -> None:
    """Say in the file's metadata what is in it."""
    set_metadata(model, {"adaptc.adapter": plan.name, "adaptc.base": adapter.origin.base_model or plan.base,
                         "adaptc.history": json.dumps(history_steps(adapter), separators=(",", ":"))})
    if plan.inlined and len(model.proto.functions):
        import onnx.inliner

        inlined: Any = onnx.inliner.inline_local_functions(model.proto)
        model.proto.CopyFrom(inlined)


def _check(path: Path) -> None:
    onnx = onnx_module()
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as e:
        if "No Op registered for" in str(e):  # ONNX Runtime's own operators, which ORT GenAI's builder leaves unnamed
            return
        raise FormatError(f"{path.name}: {' '.join(str(e).split())[:200]}") from e
