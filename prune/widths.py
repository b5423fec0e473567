"""How much to keep: the widths that remove a share of the parameters, the cubic schedule, and the config they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from adaptc.errors import UnsupportedError, UsageError
from adaptc.prune.groups import Architecture, Coupling, Kind

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Keep:
    """Units that stay of every coupled group of a kind, and what was rounded away on the way there."""

    units: Mapping[Kind, int]
    notes: tuple[str, ...] = ()


def cubic(progress: float, final: float, initial: float = 0.0, *, start: float = 0.1, end: float = 0.9) -> float:
    """Return the ratio at `progress` (0 to 1) of a run: final + (initial - final) (1 - u)^3 between start and end.

    u = (progress - start) / (end - start), so the first steps remove most. Sanh et al. use the same rule.
    """
    u = min(max((progress - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - u) ** 3


def unit_size(coupling: Coupling, shapes: Shapes) -> int:
    """Return how many parameters one unit of a coupled group has."""
    return sum(p.size * prod(shapes[p.key]) // shapes[p.key][p.axis] for p in coupling.parts)


def widths(arch: Architecture, groups: Sequence[Coupling], shapes: Shapes, ratio: float, *, multiple: int = 8,
           masked: bool = False, heads: bool = True, ffn: bool = True) -> Keep:
    """Return what stays of each group so that `ratio` of the parameters of all `groups` goes.

    Heads are coarse: the whole number of units below the ratio goes (and, where the family's config wants it, one that
    leaves heads that divide the hidden width), and channels, in multiples of `multiple`, make up for the rest. Raises
    UsageError for a ratio that is not 0 <= ratio < 1 or leaves nothing.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"ratio is {ratio:g}, must be 0 (keep all) or more and below 1")
    if not heads and not ffn:
        raise UsageError("neither heads nor channels are to be pruned", hint="give one of --heads-only, --ffn-only")
    kinds = {g.kind: g for g in groups}
    whole = {kind: g.units for kind, g in kinds.items()}
    notes = []
    if heads and not arch.family.heads and not masked:
        if not ffn:
            raise UnsupportedError(f"a {arch.model} config has no head size of its own: heads cannot be removed",
                                   hint="--ffn-only, or --masked to zero heads in place")
        heads = False
        notes.append(f"a {arch.model} config has no head size of its own: heads stay, channels are pruned")
    chosen = [k for k, on in (("heads", heads), ("ffn", ffn)) if on]
    if not ratio:
        return Keep(whole, tuple(notes))
    size = {kind: unit_size(g, shapes) for kind, g in kinds.items()}
    target = ratio * sum(size[k] * whole[k] for k in kinds if k in chosen)
    keep = dict(whole)
    if heads:
        room = size["ffn"] * whole["ffn"] if ffn else None
        keep["heads"] = _heads(arch, kinds["heads"], ratio, masked, target, size["heads"], room)
        target -= size["heads"] * (whole["heads"] - keep["heads"])
        if not ffn and keep["heads"] == whole["heads"]:
            raise UsageError(f"ratio {ratio:g} removes none of {whole['heads'] // kinds['heads'].blocks} head units",
                             hint="a higher --ratio, or channels too")
    if ffn:
        step = gcd(multiple, whole["ffn"])
        gone = round(target / size["ffn"] / step) * step
        keep["ffn"] = min(max(whole["ffn"] - gone, step), whole["ffn"])
    return Keep(keep, tuple(notes))


def _heads(arch: Architecture, group: Coupling, ratio: float, masked: bool, target: float, size: int, room: int | None
           ) -> int:
    """Return the head units that stay: floor(units ratio) go of every run, fewer where the config would be refused.

    More go where the `room` parameters of the channels would otherwise lose more than halfway from `ratio` to all.
    """
    run, per_unit = group.units // group.blocks, arch.heads // group.units

    def allowed(gone: int) -> bool:
        return masked or not arch.family.divides or arch.hidden % ((run - gone) * group.blocks * per_unit) == 0

    choices = [g for g in range(run) if allowed(g)]
    gone = max(g for g in choices if g <= run * ratio + 1e-9)
    for more in choices[choices.index(gone) + 1 :]:
        if room is None or target - size * gone * group.blocks <= room * (1 + ratio) / 2:
            break
        gone = more
    return (run - gone) * group.blocks


def pruned_config(config: Mapping[str, Any], arch: Architecture, group: Coupling, keep: Mapping[Kind, int]
                  ) -> dict[str, Any]:
    """Return config.json with the new widths; the head size, which most configs leave to be divided out, is written."""
    made, words = dict(config), arch.family.words
    if "ffn" in keep:
        made[words["ffn"]] = keep["ffn"]
    if arch.family.heads and "heads" in keep:
        kept = keep["heads"] * (arch.heads // group.units)
        made |= {words["heads"]: kept, "head_dim": arch.head_dim}
        if "kv" in words:
            made[words["kv"]] = arch.kv if group.blocks > 1 or group.units != arch.kv else keep["heads"]
    return made
