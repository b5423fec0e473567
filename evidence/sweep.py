"""Quality against bytes: points made by the passes of `compress` and `quantize`, measured, and cached by content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adaptc import __version__
from adaptc.adapter import Adapter, Rows, tensors
from adaptc.errors import UsageError
from adaptc.evidence.bootstrap import estimate
from adaptc.evidence.cache import Cache, digest
from adaptc.evidence.curve import Bound, Point
from adaptc.evidence.evaluate import Settings, evaluate
from adaptc.evidence.metrics import available
from adaptc.evidence.model import Loaded
from adaptc.evidence.ready import fitted, ready
from adaptc.evidence.rows import Row
from adaptc.formats.format import Format
from adaptc.lowrank import plain
from adaptc.passes import Context, Outcome
from adaptc.report import rank_of
from adaptc.spec import parse

_TOGETHER = 4  # points that share one run of the reference; a kill repeats at most these
_OCTAVE = 16  # steps of --until between a bit rate and its double: files 4.4 % apart
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """A point to be made: what people call it, the pass, and the setting it has in its kind."""

    label: str
    goal: str
    setting: float | None
    spec: str


def by_rank(rank: int) -> Recipe:
    """Return the recipe of `adaptc compress --rank`."""
    return Recipe(f"rank {rank}", "rank", rank, f"truncate{{rank={rank}}}")


def by_bits(bits: float) -> Recipe:
    """Return the recipe of `adaptc quantize --bits`."""
    return Recipe(f"{bits:g} bit", "bits", bits, f"quantize{{bits={bits:g}}}")


def by_size(label: str, nbytes: int) -> Recipe:
    """Return the recipe of `adaptc quantize --size`."""
    return Recipe(label, "size", nbytes, f"quantize{{size={nbytes}}}")


@dataclass
class Bench:
    """One adapter on one data set: makes points, measures them beside the source, remembers them.

    `identity` is all that the measurements depend on besides the recipe: digests of adapter, base and data. The model
    is loaded when the first point has to be measured.
    """

    base: str
    source: Adapter
    source_nbytes: int
    donor: Adapter | None
    rows: Sequence[Row]
    settings: Settings
    cache: Cache
    identity: Mapping[str, Any]
    bootstrap: int = 1000
    seed: int = 0
    jobs: int = 0
    reused: int = 0
    _loaded: Loaded | None = None

    def points(self, recipes: Sequence[Recipe], progress: Progress | None = None) -> list[Point]:
        """Return the points of `recipes` in order, from the cache where they are there."""
        found: dict[str, Point] = {}
        for recipe in recipes:
            stored = self.cache.get(self.key(recipe.spec))
            if stored is not None:
                found[recipe.spec] = Point(**stored["point"])
        self.reused += len(found)
        missing = [r for r in {r.spec: r for r in recipes}.values() if r.spec not in found]
        for at in range(0, len(missing), _TOGETHER):
            for point in self._measure(missing[at : at + _TOGETHER], progress):
                self.cache.put(self.key(point.spec), {"point": asdict(point), "identity": dict(self.identity)})
                found[point.spec] = point
        return [replace(found[r.spec], label=r.label, goal=r.goal, setting=r.setting) for r in recipes]

    def key(self, spec: str) -> str:
        """Return the content hash of a point: identity, recipe, data settings, resampling, version."""
        return digest({**self.identity, "spec": spec, "settings": asdict(self.settings), "bootstrap": self.bootstrap,
                       "seed": self.seed, "version": __version__})

    def make(self, spec: str) -> Outcome:
        """Return the adapter that a spec makes of the source, with its measured error."""
        fmt = self.format_of(spec)
        return parse(spec)[0](self.source, Context(jobs=self.jobs, size_of=lambda a: nbytes_of(fmt, a)))

    def format_of(self, spec: str) -> Format:
        """Return the dialect that the commands write what a spec makes in."""
        from adaptc.formats import writer

        return writer(self.source, parse(spec)[0].container or None)

    def _measure(self, recipes: Sequence[Recipe], progress: Progress | None) -> list[Point]:
        outcomes = {}
        for i, recipe in enumerate(recipes, 1):
            outcomes[recipe.spec] = self.make(recipe.spec) if recipe.spec else None
            if progress:
                progress("points", i, len(recipes))
        adapters = {"": self.source} | {s: o.adapter for s, o in outcomes.items() if o is not None}
        if self._loaded is None:
            self._loaded, each = ready(self.base, self.settings.task, adapters, self.donor)
        else:
            each = fitted(self._loaded, self.settings.task, adapters, self.donor)
        observed = evaluate(self._loaded, self.rows, each, "", self.settings, progress)
        names = available(observed[""])
        points = []
        for recipe in recipes:
            outcome = outcomes[recipe.spec]
            base = observed[""] if outcome is not None else None
            metrics = {e.metric: e.data() for e in estimate(names, observed[recipe.spec], base,
                                                            resamples=self.bootstrap, seed=self.seed)}
            if outcome is None:
                points.append(Point(recipe.label, "", "source", None, self.source_nbytes, 0.0, metrics))
                continue
            nbytes = nbytes_of(self.format_of(recipe.spec), outcome.adapter)
            points.append(Point(recipe.label, recipe.spec, recipe.goal, recipe.setting, nbytes, outcome.error, metrics))
        return points

    def search(self, bound: Bound, by: str, most: int, progress: Progress | None = None) -> list[Point]:
        """Return the points looked at on the way to the smallest file that keeps `bound`.

        Bisection over bit rates 2^(k/16) from 1/32 to 8 (`by` "bits"), or over ranks 1..`most`: ceil(log2) steps, on
        the assumption that a larger file is no worse. Raises UsageError if not even the largest keeps the bound.
        """
        low, high = (-5 * _OCTAVE, 3 * _OCTAVE) if by == "bits" else (1, most)
        recipe = (lambda k: by_bits(2.0 ** (k / _OCTAVE))) if by == "bits" else by_rank
        tried = self.points([recipe(high)], progress)
        if not bound.met(tried[0]):
            raise UsageError(f"{bound} is not met at {tried[0].label}: {bound.metric} is {bound.of(tried[0]):.4g}")
        while low < high:
            middle = (low + high) // 2
            (point,) = self.points([recipe(middle)], progress)
            tried.append(point)
            low, high = (low, middle) if bound.met(point) else (middle + 1, high)
        return tried


SOURCE = Recipe("source", "source", None, "")


def nbytes_of(fmt: Format, adapter: Adapter) -> int:
    """Return the bytes of all files that the commands write: a container is one file, PEFT a folder."""
    return fmt.size(fmt.storable(adapter), folder=fmt.writes == "folder" and fmt.id != "adaptc")


def without_head(adapter: Adapter) -> Adapter:
    """Return the deltas alone: no carried tensors, a config that promises none, and no mark of torch's file format."""
    config, metadata = {**adapter.origin.config}, {**adapter.origin.metadata}
    if config.get("modules_to_save"):
        config["modules_to_save"] = None
    if metadata.get("format") == "pt":
        del metadata["format"]
    return replace(adapter, replaced={}, extra={}, origin=replace(adapter.origin, config=config, metadata=metadata))


def rank_of_all(adapter: Adapter) -> int:
    """Return the largest rank stored, 0 where no delta has one."""
    return max((rank_of(d) or 0 for d in adapter.deltas.values()), default=0)


def float32_nbytes(adapter: Adapter) -> int:
    """Return the bytes of the deltas' floating-point tensors in float32, and of carried tensors as they are."""
    deltas = sum(4 * t.numel() for d in adapter.deltas.values() for t in tensors(plain(d)).values()
                 if t.is_floating_point())
    carried = sum((t.values if isinstance(t, Rows) else t).nbytes for t in adapter.replaced.values())
    return deltas + carried + sum(t.nbytes for t in adapter.extra.values())
