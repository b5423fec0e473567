"""Whether a runtime does with an adapter what torch does, and if not, which of the usual mistakes explains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import UsageError
from adaptc.measure import distance2, norm2

NO_EFFECT = 1e-3  # of the expected change of the outputs
_STEPS = 8


@dataclass(frozen=True)
class Verdict:
    """`cause` is "" where everything agrees, else what is wrong, in three words; `figures` are what was measured."""

    cause: str
    said: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.cause


@dataclass(frozen=True, eq=False)
class Runs:
    """Outputs (inputs, outputs) of a runtime and of torch on the same inputs.

    `expected(guess, scale)` runs torch with the adapter as one of `guesses` (id -> clause) would have it, "" as it is,
    multiplied by `scale`. `tolerance` is of the adapter's effect, `base_tolerance` of the outputs without it.
    """

    without: Tensor
    given: Tensor
    base: Tensor
    expected: Callable[[str, float], Tensor]
    tolerance: float
    base_tolerance: float
    guesses: Mapping[str, str] = field(default_factory=dict)


def judge(runs: Runs) -> Verdict:
    """Compare the change y(with) - y(without) of the runtime with torch's; name the mistake where they differ.

    Wrong base: the outputs differ before any adapter. No effect: less than a thousandth of the expected change. Wrong
    scale: some multiple c of the adapter explains the change; c is found by iterating the least squares fit, because
    outputs are not linear in it. Wrong permutation: one of `guesses` explains it.
    """
    base, got = runs.base.double(), runs.given.double() - runs.without.double()
    off = _ratio(runs.without.double() - base, base)
    want = runs.expected("", 1.0).double() - base
    if not float(want.norm()):
        raise UsageError("adapter changes no output in torch, nothing can be compared")
    figures = {"base_error": off, "effect": _ratio(want, base), "error": _ratio(got - want, want),
               "largest": float((runs.given.double() - runs.without.double() - want).abs().max())}
    if not off <= runs.base_tolerance:
        return Verdict("wrong base", f"without an adapter the outputs differ from torch's by {off:.2g} of their size",
                       figures)
    if not _ratio(got, want) > NO_EFFECT:
        return Verdict("no effect", f"outputs change by {_ratio(got, want):.2g} of what they should", figures)
    fit = float((got * want).sum() / want.square().sum())
    figures["scale"] = fit
    # Where the base itself is another rounding of the reference, its adapter cannot agree better than it does.
    allowed = max(runs.tolerance, 1.5 * figures["base_error"] / figures["effect"])
    figures["allowed"] = allowed
    if figures["error"] <= allowed and abs(fit - 1) <= max(0.1, runs.tolerance):
        return Verdict("", "the runtime's outputs are those of torch", figures)
    scale, left = _scale(runs, got, base, fit)
    if left <= 2 * allowed and abs(scale - 1) > runs.tolerance:
        return Verdict("wrong scale", f"the adapter acts {scale:.4g} times as strongly as it should",
                       figures | {"scale": scale, "left": left})
    for guess, clause in runs.guesses.items():
        left = _ratio(got - (runs.expected(guess, 1.0).double() - base), want)
        if left <= 2 * allowed:
            return Verdict("wrong permutation", clause, figures | {"left": left})
    return Verdict("other outputs", f"the change differs from torch's by {figures['error']:.2g} of its size, "
                   f"{allowed:.2g} is allowed, and no scale or permutation explains it", figures)


def _scale(runs: Runs, got: Tensor, base: Tensor, start: float) -> tuple[float, float]:
    """Return the multiple of the adapter that explains the change best, and what it leaves of the change.

    From the best of the linear fit and powers of two of both signs, c is multiplied by its own least squares fit.
    """
    def tried(scale: float) -> tuple[float, float, float]:
        change = runs.expected("", scale).double() - base
        square = float(change.square().sum())
        return _ratio(got - change, got), scale, float((got * change).sum()) / square if square else math.nan

    first = [start, *(sign * 2.0**k for k in range(-6, 7) for sign in (1, -1))]
    best = min(tried(c) for c in first if math.isfinite(c) and 1e-4 < abs(c) < 1e4)
    now = best
    for _ in range(_STEPS):
        if not (math.isfinite(now[2]) and now[2]):
            break
        now = tried(now[1] * now[2])
        best = min(best, now)
    return best[1], best[0]


def _ratio(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else math.inf


def compare_source(made: Adapter, source: Adapter, guesses: Sequence[tuple[str, Adapter]] = ()) -> Verdict:
    """Compare what an artefact holds with the adapter it was made from, from factors; `made` may be quantized.

    The factor c = <dW, dW^> / ||dW^||^2 is 1 for every rounding that is a least squares fit, however coarse, so that a
    wrong scale shows beside any loss of bits. `guesses`: clauses with the artefact as it would be without a mistake.
    """
    keys = [k for k, d in source.deltas.items() if d.nbytes]
    missing = [k for k in keys if k not in made.deltas]
    figures = {"modules": float(len(keys)), "missing": float(len(missing))}
    if missing:
        return Verdict("modules are missing", f"{len(missing)} of {len(keys)} modules are not in the artefact "
                       f"({missing[0]})", figures)
    error, factor, cosine = _against(made, source, keys)
    figures |= {"weight_error": error, "scale": 1 / factor if factor else math.inf}
    for clause, fixed in guesses:
        if error > 0.1 and _against(fixed, source, keys)[0] < 0.7 * error:
            return Verdict("wrong permutation", clause, figures)
    if cosine < 0.3:
        return Verdict("another adapter", f"the artefact holds something else (cosine {cosine:.2g})", figures)
    if error > 0.02 and abs(factor - 1) > 0.02 and abs(factor) > 1e-3 and not _explained(error, factor):
        return Verdict("wrong scale", f"the artefact holds {1 / factor:.4g} times the adapter", figures)
    return Verdict("", f"it holds the adapter to {error:.2g} of its size", figures)


def _explained(error: float, factor: float) -> bool:
    """Return whether a factor this near to 1 is a matter of rounding: its own share of the error is small."""
    return (factor - 1) ** 2 < 0.05 * error**2


def _against(made: Adapter, source: Adapter, keys: Sequence[str]) -> tuple[float, float, float]:
    """Return ||dW - dW^|| / ||dW||, <dW, dW^> / ||dW^||^2 and the size of the cosine between them, over all modules."""
    total = left = own = 0.0
    for key in keys:
        x, y = _plain(source.deltas[key]), _plain(made.deltas[key])
        total, own, left = total + norm2(x), own + norm2(y), left + distance2(x, y)
    inner = (total + own - left) / 2
    if not total or not own:
        return (1.0 if total else 0.0), 0.0, 0.0
    return math.sqrt(left / total), inner / own, abs(inner) / math.sqrt(own * total)


def _plain(delta: Delta) -> Delta:
    return delta.inner if isinstance(delta, NeedsBase) and delta.inner is not None else delta
