"""SparseSwitch: sparse adapters of a loaded model, put in and taken out by overwriting entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptc.adapter import Adapter
from adaptc.delta import Delta, NeedsBase, Sparse, kind
from adaptc.errors import UnsupportedError, UsageError
from adaptc.kernels.runtime_match import Site, check_fingerprint, check_names, check_shape, site
from adaptc.kernels.runtime_swap import check_replacement, put, tensor_of
from adaptc.kernels.sparse import native

Choice = tuple[tuple[str, float], ...]  # names with multipliers, by name


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What one adapter adds to one weight: flat positions in its storage (k,) int64, and the entries, float64."""

    flat: Tensor
    index: Tensor
    delta: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """One overwrite: `new` goes to `index` (as native.packed has it) of `flat`, `base` is what stood there."""

    flat: Tensor
    index: Tensor
    new: Tensor
    base: Tensor


class SparseSwitch:
    """Sparse adapters of one model: apply some, apply others, restore the base bit for bit.

        switch = SparseSwitch(model, {"style": a, "subject": b})
        switch.apply("style")
        switch.apply("style", "subject", scales=(1.0, 0.5))  # sums of deltas, each entry rounded once
        switch.restore()

    The new values W0[S] + scale * dW[S] are computed when a choice is first applied, and kept: a switch then writes
    k entries of every weight and reads nothing. Adding and subtracting deltas instead would leave rounding behind. The
    weights must not change in between, and one SparseSwitch owns them; for rows of one batch with different adapters
    use `adaptc.attach(sparse="side")`. Memory: 8 bytes of position and two or more values an entry.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter] | None = None) -> None:
        self.model = model
        self.active: tuple[str, ...] = ()
        self._adapters: dict[str, tuple[Adapter, dict[str, Change]]] = {}
        self._writes: dict[Choice, list[Write]] = {}
        self._undo: list[Callable[[], object]] = []
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be applied."""
        return tuple(self._adapters)

    @property
    def nbytes(self) -> int:
        """Bytes held besides the model: positions, entries, new and saved values."""
        held = [t for _, changes in self._adapters.values() for c in changes.values() for t in (c.index, c.delta)]
        held += [t for writes in self._writes.values() for w in writes for t in (w.index, w.new, w.base)]
        return sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values())

    def add(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in under `name`; nothing is applied yet.

        Raises NeedsError for parameters that the model lacks, FormatError for other shapes or another base,
        UnsupportedError for deltas that are not sparse or weights that are not contiguous floats, UsageError for a name
        that is taken.
        """
        if name in self._adapters:
            raise UsageError(f"adapter {name} is there already")
        check_names(self.model, (*adapter.deltas, *adapter.replaced))
        sites = {key: site(self.model, key) for key in adapter.deltas}
        if not self.active:
            check_fingerprint(adapter, sites)
        for key, value in adapter.replaced.items():
            check_replacement(key, value, tensor_of(self.model, key))
        self._adapters[name] = adapter, {k: _change(k, d, sites[k]) for k, d in adapter.deltas.items()}

    def remove(self, name: str) -> None:
        """Forget an adapter, restoring the base first where it is applied."""
        self._known(name)
        if name in self.active:
            self.restore()
        del self._adapters[name]
        self._writes = {choice: w for choice, w in self._writes.items() if name not in dict(choice)}

    def apply(self, *names: str, scales: Sequence[float] | None = None) -> None:
        """Make the model W0 + sum of scale_i dW_i for the named adapters (scales: 1 each), whatever was applied before.

        Raises UsageError for names that are not known or named twice, scales that are not one each, and for two
        adapters that replace one tensor (a head).
        """
        multipliers = tuple(scales) if scales is not None else (1.0,) * len(names)
        if len(multipliers) != len(names):
            raise UsageError(f"{len(multipliers)} scales for {len(names)} adapters")
        if len(set(names)) < len(names):
            raise UsageError(f"adapters {', '.join(names)} are not all different")
        for name in names:
            self._known(name)
        replaced: dict[str, str] = {}
        for name in names:
            for key in self._adapters[name][0].replaced:
                if replaced.setdefault(key, name) != name:
                    raise UsageError(f"{key}: adapters {replaced[key]} and {name} both replace it")
        self.restore()
        choice = tuple(sorted((n, float(s)) for n, s in zip(names, multipliers, strict=True)))
        if choice not in self._writes:
            self._writes[choice] = self._planned(choice)
        for w in self._writes[choice]:
            native.put(w.flat, w.index, w.new)
            self._undo.append(lambda w=w: native.put(w.flat, w.index, w.base))  # type: ignore[misc]
        for key, name in replaced.items():
            self._undo.append(put(self.model, key, self._adapters[name][0].replaced[key]))
        self.active = names

    def restore(self) -> None:
        """Put back what stood in the model before, bit for bit."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.active = ()

    @contextmanager
    def applied(self, *names: str, scales: Sequence[float] | None = None) -> Iterator[nn.Module]:
        """Apply for a while; what was active before is active again after, at scale 1."""
        before = self.active
        self.apply(*names, scales=scales)
        try:
            yield self.model
        finally:
            self.restore()
            if before:
                self.apply(*before)

    def _planned(self, choice: Choice) -> list[Write]:
        """Return the overwrites of a choice; the model holds its base."""
        keys = dict.fromkeys(key for name, _ in choice for key in self._adapters[name][1])
        out = []
        for key in keys:
            parts = [(self._adapters[n][1][key], s) for n, s in choice if key in self._adapters[n][1]]
            flat, index, total = parts[0][0].flat, parts[0][0].index, parts[0][0].delta * parts[0][1]
            if len(parts) > 1:
                index, where = torch.unique(torch.cat([c.index for c, _ in parts]), return_inverse=True)
                total = torch.zeros(len(index), dtype=torch.float64, device=flat.device)
                for (c, s), at in zip(parts, where.split([len(c.index) for c, _ in parts]), strict=True):
                    total[at] += c.delta * s
            base = flat.index_select(0, index)
            new = (base.double() + total).to(flat.dtype)
            out.append(Write(flat, native.packed(flat, index), new, base))
        return out

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise UsageError(f"adapter {name} is not known (known: {', '.join(self._adapters) or 'none'})")

    def __repr__(self) -> str:
        return f"SparseSwitch({len(self._adapters)} adapters, active: {', '.join(self.active) or 'none'})"


def _change(key: str, delta: Delta, where: Site) -> Change:
    """Return a delta as positions in the storage of its weight, rising."""
    logical = where.float_weight
    if logical is None or not key.endswith(".weight") or not where.module.weight.is_contiguous():
        raise UnsupportedError(f"{key}: only entries of contiguous float weights can be overwritten",
                               hint="adaptc.attach(sparse='side') runs beside other weights")
    if isinstance(delta, NeedsBase) and delta.kind == "sparse":
        delta = delta.resolve(logical)
    if not isinstance(delta, Sparse):
        raise UnsupportedError(f"{key}: a {kind(delta)} delta changes every entry, there is nothing to switch",
                               hint="adaptc.attach runs it; adaptc sparsify tells what a sparse one would lose")
    check_shape(key, delta.shape, where.shape)
    w: Tensor = where.module.weight.detach()
    index, values = delta.places().to(w.device), (delta.values.double() * delta.scale).to(w.device)
    if where.kind == "conv1d":  # stored (in, out)
        m, n = where.shape
        index, order = (index % n * m + index // n).sort()
        values = values[order]
    return Change(w.view(-1), index, values)
