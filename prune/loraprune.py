"""LoRAPrune: whole heads and channels removed from a model and its adapter together, by importance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.base import Base
from adaptc.calibration import Calibration, Split
from adaptc.errors import NeedsError, UsageError
from adaptc.formats.atomic import staged
from adaptc.prune.cuts import Cut, cuts_of, shape_of
from adaptc.prune.groups import Architecture, Coupling, Kind, Unit, architecture, couplings
from adaptc.prune.importance import Criterion, Merged, choose, importance, merged
from adaptc.prune.index_map import NAME, write_map
from adaptc.prune.refit import Loss, removal
from adaptc.prune.slice import Edit, rebased, shard_files, slice_adapter, write_model
from adaptc.prune.widths import Keep, Shapes, pruned_config, widths
from adaptc.spec import print_spec
from adaptc.tensorfile import TensorFile

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to prune and by which rule; the fields are the options of the command line.

    `ratio` is the share of the parameters in all heads and channels that goes. `keep_first` and `keep_last` layers
    stay whole, which no config can say, so that they go with `masked`: zeros in place, every shape as it was.
    """

    ratio: float
    criterion: Criterion = "loraprune"
    unit: Unit = "auto"
    heads: bool = True
    ffn: bool = True
    multiple: int = 8
    keep_first: int = 0
    keep_last: int = 0
    masked: bool = False
    squared: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise UsageError(f"ratio is {self.ratio:g}, must be 0 (keep all) or more and below 1")
        if (self.keep_first or self.keep_last) and not self.masked:
            raise UsageError("a config has one width for all layers: layers cannot be kept whole in a smaller model",
                             hint="--masked zeroes what goes and keeps every shape")

    def __str__(self) -> str:
        values = asdict(self)
        return print_spec("loraprune", {k: v for k, v in values.items() if k == "ratio" or v != _DEFAULTS[k]})


_DEFAULTS = asdict(Options(ratio=0.0))


@dataclass(frozen=True, eq=False)
class Model:
    """A base opened for pruning: logical shapes and dtypes of its parameters, its architecture and coupled groups."""

    base: Base
    shapes: Shapes
    itemsize: Mapping[str, int]
    arch: Architecture
    groups: tuple[Coupling, ...]

    def group(self, kind: Kind) -> Coupling:
        """Return the first layer's group of a kind."""
        return next(g for g in self.groups if g.kind == kind)


@dataclass(frozen=True, slots=True)
class Share:
    """Parameters and bytes of one kind of parameters before and after, and its units in a layer (0: no units)."""

    kind: str
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    units: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a pruning did: the cut of every parameter, the sliced adapter, sizes, and losses on calibration tokens."""

    cuts: Mapping[str, Cut]
    adapter: Adapter | None
    shares: tuple[Share, ...]
    kinds: Mapping[str, Kind]
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()

    def removed(self, *kinds: str) -> float:
        """Return the share of the parameters of `kinds` (all for none) that is gone."""
        some = [s for s in self.shares if not kinds or s.kind in kinds]
        before = sum(s.parameters[0] for s in some)
        return 1 - sum(s.parameters[1] for s in some) / before if before else 0.0

    def error(self, kind: Kind, split: Split) -> float | None:
        """Return the relative output error of the layers that lost inputs of a kind, None where nothing tells."""
        some = [x for x in self.losses if x.split == split and self.kinds[x.key] == kind]
        total = math.fsum(x.total for x in some)
        return math.sqrt(math.fsum(x.lost for x in some) / total) if total else None


def open_model(path: Path, unit: Unit = "auto") -> Model:
    """Open a model folder for pruning. Raises NeedsError for no folder, UnsupportedError for an unknown model."""
    if not (path / "config.json").is_file():
        raise NeedsError(f"{path} holds no config.json", hint="--base wants a model folder as transformers writes it")
    base = Base(path)
    stored: dict[str, tuple[int, ...]] = {}
    itemsize = {}
    for file in map(TensorFile, shard_files(path)):
        for name in file:
            stored[name] = file.info[name][1]
            itemsize[name] = file.nbytes(name) // max(math.prod(stored[name]), 1)
    arch = architecture(base.config, stored)
    groups = couplings(arch, stored, unit)
    turned = {p.key for g in groups for p in g.parts} if arch.family.transposed else set()
    return Model(base, {k: shape_of(s, k in turned) for k, s in stored.items()}, itemsize, arch, tuple(groups))


def target_widths(model: Model, options: Options) -> Keep:
    """Return how many units of each group stay under `options`."""
    return widths(model.arch, model.groups, model.shapes, options.ratio, multiple=options.multiple,
                  masked=options.masked, heads=options.heads, ffn=options.ffn)


def plan(model: Model, weights: Merged, options: Options, keep: Keep, calibration: Calibration | None,
         progress: Progress | None = None) -> dict[str, Cut]:
    """Return the cut of every parameter: of each group the `keep` most important units stay."""
    chosen: list[tuple[Coupling, Tensor]] = []
    last = model.arch.layers - options.keep_last
    todo = [g for g in model.groups if keep.units[g.kind] < g.units and options.keep_first <= g.layer < last]
    for i, group in enumerate(todo, 1):
        scores = importance(group, options.criterion, weights, calibration, squared=options.squared)
        chosen.append((group, choose(scores, keep.units[group.kind], group.blocks)))
        if progress:
            progress("scoring", i, len(todo))
    return cuts_of(chosen, model.shapes)


def prune(model: Model, adapter: Adapter | None, options: Options, calibration: Calibration | None = None, *,
          out: Path | None = None, keep: Keep | None = None, earlier: Mapping[str, Cut] | None = None,
          about: Mapping[str, Any] | None = None, measure: bool = True, force: bool = False,
          inputs: tuple[Path, ...] = (), progress: Progress | None = None) -> Pruned:
    """Prune a model and its adapter; with `out` write the model folder, its adapter/ and the index map into it.

    `keep` overrides the widths that `options.ratio` asks for (a schedule counts from the first model); `earlier` are
    the cuts that led to this model, which the map then contains too. `measure` says whether output losses are measured
    on the moments of `calibration`, which costs as much as a repair. Raises AdaptcError for an adapter of another
    base, statistics that are missing, an output that exists.
    """
    weights = merged(model.base, adapter, model.shapes)
    keep = keep or target_widths(model, options)
    keep = replace(keep, units={g.kind: min(keep.units[g.kind], g.units) for g in model.groups})
    cuts = plan(model, weights, options, keep, calibration, progress)
    sliced = None if adapter is None else slice_adapter(adapter, model.base, cuts, masked=options.masked)
    if sliced is not None and adapter is not None and cuts:
        step = Step(str(options), __version__, adapter.nbytes, sliced.nbytes, None)
        sliced = rebased(sliced.with_deltas(sliced.deltas, step), None if out is None else str(out))
    losses: list[Loss] = []
    repairs = [k for k, c in cuts.items() if c.cols is not None and not c.whole] if calibration is not None else []
    if options.refit and calibration is None:
        raise NeedsError("--refit needs calibration statistics", hint="adaptc calibrate, then --calibration S")
    known = [k for k in repairs if options.refit or (
        measure and calibration is not None and calibration.moment(k) is not None)]

    def measured(key: str) -> Tensor | None:
        assert calibration is not None
        made, found = removal(weights, calibration, key, cuts[key], refit=options.refit)
        losses.extend(found)
        if progress:
            progress("measuring", len({x.key for x in losses}), len(known))
        return made

    edits: dict[str, Edit] = {k: partial(_repaired, measured, k) for k in known} if options.refit else {}
    if out is None or not options.refit:
        for key in known:
            measured(key)
    if out is not None:
        config = dict(model.base.config) if options.masked else pruned_config(
            model.base.config, model.arch, model.group("heads"), keep.units)
        composed = {k: c.after(earlier[k]) if earlier and k in earlier else c for k, c in cuts.items()}
        composed = {**(earlier or {}), **composed}
        with staged(out, force=force, folder=True, inputs=(model.base.path, *inputs)) as temp:
            write_model(model.base, temp, cuts, config, transposed=model.arch.family.transposed, masked=options.masked,
                        edits=edits)
            _write_adapter(sliced, adapter, temp)
            write_map(temp / NAME, composed, {"spec": str(options), "version": __version__, "masked": options.masked,
                                              "model_type": model.arch.model, **(about or {})})
    return Pruned(cuts, sliced, shares_of(model, cuts, keep, options),
                  {p.key: g.kind for g in model.groups for p in g.parts}, tuple(losses), _notes(model, keep, options))


def _repaired(measured: Callable[[str], Tensor | None], key: str) -> Tensor:
    made = measured(key)
    assert made is not None
    return made


def _write_adapter(sliced: Adapter | None, adapter: Adapter | None, folder: Path) -> None:
    from adaptc.formats import save

    if sliced is not None and adapter is not None:
        save(sliced, folder / "adapter", dialect="peft")


def shares_of(model: Model, cuts: Mapping[str, Cut], keep: Keep, options: Options) -> tuple[Share, ...]:
    """Return sizes before and after of heads, channels and everything else; masked zeros count as gone parameters."""
    kind_of = {p.key: g.kind for g in model.groups for p in g.parts}
    totals: dict[str, list[int]] = {kind: [0, 0, 0, 0] for kind in ("heads", "ffn", "other")}
    for key, shape in model.shapes.items():
        before = math.prod(shape)
        after = math.prod(cuts[key].kept) if key in cuts else before
        for i, n in enumerate((before, after, before * model.itemsize[key],
                               (before if options.masked else after) * model.itemsize[key])):
            totals[kind_of.get(key, "other")][i] += n
    units: dict[str, tuple[int, int]] = {g.kind: (g.units, keep.units[g.kind]) for g in model.groups}
    return tuple(Share(k, (t[0], t[1]), (t[2], t[3]), units.get(k, (0, 0))) for k, t in totals.items())


def _notes(model: Model, keep: Keep, options: Options) -> tuple[str, ...]:
    notes = list(keep.notes)
    heads = model.group("heads")
    asked = int(heads.units / heads.blocks * options.ratio + 1e-9) * heads.blocks
    if options.heads and model.arch.family.divides and not options.masked and heads.units - keep.units["heads"] < asked:
        notes.append(f"a {model.arch.model} config wants heads that divide the hidden width {model.arch.hidden}: "
                     f"{keep.units['heads']} of {heads.units} head units stay, channels make up for it")
    return tuple(notes)

