"""Pruning in steps: a little, calibrate on what is left, a little more (the cubic schedule of LoRAPrune)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaptc.adapter import Adapter
from adaptc.calibration import Calibration
from adaptc.errors import UsageError
from adaptc.prune.cuts import Cut
from adaptc.prune.loraprune import Options, Progress, Pruned, open_model, prune, shares_of, target_widths
from adaptc.prune.widths import cubic

Calibrate = Callable[[Path, Adapter | None, Path], object]


def ratios(final: float, steps: int) -> list[float]:
    """Return the share that is gone after each of `steps` prunings, even steps along the cubic schedule."""
    return [cubic(0.1 + 0.8 * (i + 1) / steps, final) for i in range(steps)]


def in_steps(folder: Path, adapter: Adapter | None, options: Options, steps: int, calibrate: Calibrate, *,
             out: Path | None = None, about: Mapping[str, Any] | None = None, force: bool = False,
             inputs: tuple[Path, ...] = (), progress: Progress | None = None) -> Pruned:
    """Prune in `steps`, calling calibrate(model folder, adapter, statistics file) before each.

    Every step slices the model that the one before it wrote, which computes what masking would and costs less to
    calibrate. Widths are those that each ratio asks of the first model; maps are composed, so that the last one leads
    back to it. Raises UsageError for masking, which would let a later step count zeros again.
    """
    if options.masked:
        raise UsageError("a schedule slices between its steps and does not go with masking")
    first = open_model(folder, options.unit)
    if options.unit == "auto":  # settled once: a model that a step left with one key-value head would say otherwise
        options = replace(options, unit="kv" if first.arch.kv > 1 else "query")
    cuts: dict[str, Cut] = {}
    here, tuned, done = folder, adapter, None
    final = target_widths(first, options)
    with TemporaryDirectory(prefix="adaptc-") as work:
        for i, ratio in enumerate(ratios(options.ratio, steps)):
            last, statistics = i == steps - 1, Path(work) / f"{i}.safetensors"
            asked = target_widths(first, replace(options, ratio=ratio))
            # Whole heads go in leaps, and channels make up for them: no step may remove what the last one would keep.
            keep = replace(asked, units={kind: max(n, final.units[kind]) for kind, n in asked.units.items()})
            calibrate(here, tuned, statistics)
            place = out if last else Path(work) / f"step-{i}"
            done = prune(open_model(here, options.unit), tuned, options, Calibration(statistics), out=place,
                         keep=keep, earlier=cuts, about={**(about or {}), "steps": steps}, force=force and last,
                         inputs=(folder, *inputs), progress=progress)
            cuts = {**cuts, **{k: c.after(cuts[k]) if k in cuts else c for k, c in done.cuts.items()}}
            here, tuned = place or here, done.adapter
    assert done is not None
    return replace(done, cuts=cuts, shares=shares_of(first, cuts, final, options))
