"""Run adapters beside a model without merging: attach, select, detach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.adapter import Adapter, Replacement
from adaptc.delta import Sparse
from adaptc.errors import FormatError, UnsupportedError, UsageError
from adaptc.kernels.runtime_build import build
from adaptc.kernels.runtime_layer import Layer, Selection
from adaptc.kernels.runtime_match import Site, check_fingerprint, check_names, check_shape, site
from adaptc.kernels.runtime_paged import Paged
from adaptc.kernels.runtime_swap import check_replacement, put, switch, tensor_of

_MARK = "_adaptc_runtime"


@dataclass(frozen=True, eq=False)
class Attached:
    """One adapter of a model: its own multiplier, the tensors it puts in place of others, and what it switches."""

    name: str
    scale: float
    layers: tuple[str, ...]
    replaced: Mapping[str, Replacement]
    switched: Mapping[str, Sparse]
    nbytes: int


class Runtime:
    """The adapters of one model. `attach` makes it, `detach` takes it away."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, Layer] = {}
        self.adapters: dict[str, Attached] = {}
        self.selection = Selection()
        self._paged: Paged | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held for all adapters."""
        return sum(a.nbytes for a in self.adapters.values())

    def __repr__(self) -> str:
        return f"Runtime({len(self.adapters)} adapters on {len(self.layers)} layers, {self.nbytes} B)"

    def add(self, adapter: Adapter, name: str, scale: float, switching: bool) -> None:
        """Build every branch first, then install: a refused adapter leaves the model as it was."""
        check_names(self.model, adapter.deltas)
        check_names(self.model, adapter.replaced)
        sites = {key: site(self.model, key) for key in adapter.deltas}
        if not self.layers:
            check_fingerprint(adapter, sites)
        switched = {k: d for k, d in adapter.deltas.items() if switching and isinstance(d, Sparse)}
        for key, delta in switched.items():
            check_shape(key, delta.shape, sites[key].shape)
            if sites[key].float_weight is None:
                raise UnsupportedError(f"{key}: a 4-bit weight cannot be switched", hint="sparse='side' runs beside it")
        for key, value in adapter.replaced.items():
            check_replacement(key, value, tensor_of(self.model, key))
        built = {k: build(adapter, k, d, sites[k]) for k, d in adapter.deltas.items() if k not in switched}
        names = []
        for key, (branches, gain) in built.items():
            layer = self._layer(sites[key])
            layer.branches[name] = (*layer.branches.get(name, ()), *branches)
            if gain is not None:
                layer.gains[name] = gain
            names.append(sites[key].name)
        nbytes = sum(b.nbytes for branches, _ in built.values() for b in branches)
        nbytes += sum(g.nbytes for _, g in built.values() if g is not None)
        nbytes += sum(d.nbytes for d in (*switched.values(), *adapter.replaced.values()))
        layers = tuple(dict.fromkeys(names))
        self.adapters[name] = Attached(name, scale, layers, dict(adapter.replaced), switched, nbytes)
        self._paged = None

    def remove(self, name: str) -> None:
        """Forget one adapter; layers that have none left get their own forward back."""
        each = self.selection.groups or ()
        if any(name == a for a, *_ in (*self.selection.active, *each)):
            kept = tuple((a, s) for a, s in self.selection.active if a != name)
            groups = tuple(g for g in each if g[0] != name)
            self.select(Selection(kept, groups or None, self.selection.rows if groups else 0))
        for layer_name in self.adapters.pop(name).layers:
            layer = self.layers[layer_name]
            layer.branches.pop(name, None)
            layer.gains.pop(name, None)
            if not layer.branches:
                self._restore(self.layers.pop(layer_name))
        self._paged = None

    def select(self, selection: Selection) -> None:
        """Make a selection current: switch out what the last one switched in, then its own."""
        wanted = dict(selection.active)
        if selection.groups is not None:
            for name, *_ in selection.groups:
                if self.adapters[name].replaced or self.adapters[name].switched:
                    key = next(iter((*self.adapters[name].replaced, *self.adapters[name].switched)))
                    raise UsageError(f"{key}: adapter {name} changes this tensor itself, which rows of one batch share",
                                     hint="give every row the same adapter, or attach with sparse='side'")
        owner: dict[str, str] = {}
        for name in wanted:
            for key in self.adapters[name].replaced:
                if owner.setdefault(key, name) != name:
                    raise UsageError(f"{key}: adapters {owner[key]} and {name} both replace it")
        while self._undo:
            self._undo.pop()()
        self.selection = selection
        for name, scale in wanted.items():
            for key, value in self.adapters[name].replaced.items():
                self._undo.append(put(self.model, key, value))
            for key, delta in self.adapters[name].switched.items():
                self._undo.append(switch(site(self.model, key), delta, scale))

    def paged(self, layer: Layer, groups: list[tuple[str, float, Tensor]], x: Tensor) -> tuple[Any, Any] | None:
        """Return the pool and the batch of a layer, None where its adapters do not fit a pool."""
        if self._paged is None or self._paged.device != x.device:
            self._paged = Paged(self.layers.values(), x.device)
        rows = x.numel() // x.shape[-1]
        batch = self._paged.rows(layer, groups, self.selection, rows)
        return None if batch is None else (self._paged.pool, batch)

    def _layer(self, at: Site) -> Layer:
        if at.name not in self.layers:
            layer = self.layers[at.name] = Layer(at, self)
            layer.hidden = at.module.__dict__.get("forward")
            at.module.forward = layer
        return self.layers[at.name]

    def _restore(self, layer: Layer) -> None:
        if layer.hidden is None:
            del layer.module.forward
        else:
            layer.module.forward = layer.hidden


class Selecting:
    """What `set_active` returns: as a context manager it brings the former selection back at the end."""

    def __init__(self, runtime: Runtime, before: Selection) -> None:
        self.runtime, self.before = runtime, before

    def __enter__(self) -> Runtime:
        return self.runtime

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        have, before = self.runtime.adapters, self.before
        groups = None if before.groups is None else tuple(g for g in before.groups if g[0] in have)
        kept = tuple((name, scale) for name, scale in before.active if name in have)
        with torch.no_grad():
            self.runtime.select(before if kept == before.active and groups == before.groups
                                else Selection(kept, groups, before.rows))


def attach(model: nn.Module, adapter: Adapter | str | Path, name: str = "default", *, scale: float = 1.0,
           prefix: str = "", sparse: str = "side") -> Runtime:
    """Run `model` with an adapter beside every layer it changes, and make it the active one; return the runtime.

    Nothing is merged: y = W0 x + scale * dW x, dW never formed, sign codes kept as codes. `scale` multiplies the
    adapter's own. Parameter names must match the model's exactly; with `prefix` only those that carry it are taken,
    without it. `sparse`: "side" runs sparse deltas beside the weight, "switch" writes them into it while active.
    Raises NeedsError for a parameter that the model lacks, FormatError for another shape or base, UnsupportedError for
    a layer or delta that cannot run; the model is then unchanged.
    """
    if sparse not in ("side", "switch"):
        raise UsageError(f"sparse is {sparse!r}, not 'side' or 'switch'")
    if not isinstance(adapter, Adapter):
        from adaptc.formats import load

        adapter = load(adapter)
    if prefix:
        adapter = _under(adapter, prefix)
    if not adapter.deltas and not adapter.replaced:
        raise FormatError(f"adapter changes no parameter{f' under {prefix!r}' if prefix else ''}")
    runtime: Runtime = model.__dict__.get(_MARK) or Runtime(model)
    if name in runtime.adapters:
        raise UsageError(f"an adapter {name} is attached already")
    before = runtime.selection
    with torch.no_grad():
        runtime.add(adapter, name, scale, sparse == "switch")
        model.__dict__[_MARK] = runtime
        try:
            runtime.select(Selection(((name, scale),)))
        except BaseException:
            runtime.remove(name)
            runtime.select(before)
            raise
    return runtime


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off a model, or all of them; the model is then what it was, bit for bit."""
    runtime = _runtime(model)
    names = list(runtime.adapters) if name is None else [_known(runtime, name)]
    with torch.no_grad():
        if len(names) == len(runtime.adapters):
            runtime.select(Selection())
        for each in names:
            runtime.remove(each)
    if not runtime.adapters:
        del model.__dict__[_MARK]


def set_active(model: nn.Module, names: str | Sequence[str] | Mapping[str, float] | None = None, *,
               each: Sequence[str | None] | None = None) -> Selecting:
    """Choose what runs: one adapter, the sum of several, several with multipliers, or none; or one for each row.

    `each` lists an adapter, or None for the base alone, for every row of the batch (dimension 0 of the input). The
    choice holds until the next one, or with `with`, to the end of the block. Raises UsageError for unknown names.
    """
    runtime = _runtime(model)
    if each is not None and names is not None:
        raise UsageError("names and each exclude one another")
    before = runtime.selection
    if each is not None:
        made = _grouped(runtime, each)
    else:
        listed = [names] if isinstance(names, str) else list(names or ())
        scales = names if isinstance(names, Mapping) else {}
        if len(set(listed)) != len(listed):
            raise UsageError(f"adapters {', '.join(listed)} are not all different")
        chosen = [runtime.adapters[_known(runtime, n)] for n in listed]
        made = Selection(tuple((a.name, float(scales.get(a.name, a.scale))) for a in chosen))
    with torch.no_grad():
        runtime.select(made)
    return Selecting(runtime, before)


def _grouped(runtime: Runtime, each: Sequence[str | None]) -> Selection:
    distinct = dict.fromkeys(each)
    for name in distinct:
        if name is not None:
            _known(runtime, name)
    if len(distinct) == 1:
        (only,) = distinct
        return Selection() if only is None else Selection(((only, runtime.adapters[only].scale),))
    groups = tuple((name, runtime.adapters[name].scale, torch.tensor([i for i, e in enumerate(each) if e == name]))
                   for name in distinct if name is not None)
    return Selection((), groups, len(each))


def _runtime(model: nn.Module) -> Runtime:
    runtime: Runtime | None = model.__dict__.get(_MARK)
    if runtime is None:
        raise UsageError("no adapter is attached to this model")
    return runtime


def _known(runtime: Runtime, name: str) -> str:
    if name not in runtime.adapters:
        raise UsageError(f"no adapter {name} is attached (attached: {', '.join(runtime.adapters)})")
    return name


def _under(adapter: Adapter, prefix: str) -> Adapter:
    deltas = {k[len(prefix) :]: d for k, d in adapter.deltas.items() if k.startswith(prefix)}
    replaced = {k[len(prefix) :]: t for k, t in adapter.replaced.items() if k.startswith(prefix)}
    return replace(adapter, deltas=deltas, replaced=replaced)
