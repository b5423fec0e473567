"""One budget over all modules and singular directions: which to keep, and how finely to code each.

Scaled by its singular value, every kept vector of every module is quantized with one common step: noise of variance d^2
a sample then costs the same error wherever it falls, which is reverse water-filling. The step is the only unknown; from
it follow the class (hence the rate) of each vector and, by weighing error removed against bits, which directions pay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adaptc.quant.rd_tables import KMAX, Ints, distortion, halvings, rate, table
from adaptc.quant.trellis import RATE_PRICE

Doubles = npt.NDArray[np.float64]
CLASS_LIMIT = 37  # six raw bits a sample: with ten of the coder, what one window of a stream can serve
_DIRECTION_BITS = 22  # what a direction adds to the index
_CLASS = np.arange(CLASS_LIMIT + 1)
_RATE = rate(_CLASS) / 256
_LOG_DISTORTION = np.log2(distortion(_CLASS))


@dataclass(frozen=True)
class Spectra:
    """Singular values of all modules, module after module, each scaled by its module's weight, with (m, n) repeated."""

    sigma: Doubles
    m: Ints
    n: Ints


@dataclass(frozen=True)
class Allocation:
    """What a step implies: which directions to keep, with the predicted bits and error."""

    step: float
    keep: npt.NDArray[np.bool_]
    bits: float
    error: float  # relative, of the weighted delta


def classes(deviation: Doubles) -> Ints:
    """Return the class for samples of standard deviation `deviation` steps."""
    code = np.rint(4 * np.log2(np.maximum(deviation, 1e-30)) + 1)
    out: Ints = np.clip(code, -1, CLASS_LIMIT).astype(np.int64)
    return out


def at_step(spectra: Spectra, step: float, keep: npt.NDArray[np.bool_] | None = None) -> Allocation:
    """Allocate for one step: keep a direction where the error it removes is worth its bits, or keep those given."""
    u = 4 * np.log2(np.maximum(spectra.sigma / np.sqrt(spectra.m) / step, 1e-9)) + 1
    v = 4 * np.log2(np.maximum(spectra.sigma / np.sqrt(spectra.n) / step, 1e-9)) + 1
    bits = (spectra.m * np.interp(u, _CLASS, _RATE) + spectra.n * np.interp(v, _CLASS, _RATE)) + _DIRECTION_BITS
    energy = spectra.sigma**2
    noise_u, noise_v = (2.0 ** np.interp(c, _CLASS, _LOG_DISTORTION) for c in (u, v))
    removed = energy * (1 - noise_u) * (1 - noise_v)
    if keep is None:
        keep = (removed > RATE_PRICE * step**2 * bits) & (u > -0.5) & (v > -0.5)
    left = energy.sum() - removed[keep].sum()
    return Allocation(step, keep, float(bits[keep].sum()), float(np.sqrt(left / max(energy.sum(), 1e-300))))


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Narrow [low, high] to the point where `holds` changes; return it with the true end first."""
    rising = holds(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) == rising else (middle, high)
    return (high, low) if rising else (low, high)


def _span(spectra: Spectra) -> tuple[float, float]:
    top = float(np.log(max(spectra.sigma.max(initial=0.0), 1e-30)))
    return top - 16.0, top + 1.0


def for_bits(spectra: Spectra, bits: float) -> Allocation:
    """Allocate a bit budget: the step that fills it exactly, for the better of the two sets of directions around it.

    Bits as a function of the step jump where a direction comes in, so each set is solved for its own step.
    """
    pair = _bisect(lambda x: at_step(spectra, float(np.exp(x))).bits <= bits, *_span(spectra))
    best = at_step(spectra, float(np.exp(pair[0])))
    for x in pair:
        keep = at_step(spectra, float(np.exp(x))).keep
        inside, _ = _bisect(lambda y: at_step(spectra, float(np.exp(y)), keep).bits <= bits, x - 2.0, x + 2.0)  # noqa: B023
        found = at_step(spectra, float(np.exp(inside)), keep)
        if found.bits <= bits and found.error < best.error:
            best = found
    return best


def for_error(spectra: Spectra, error: float) -> Allocation:
    """Allocate for a relative error: the coarsest step predicted to meet it."""
    inside, _ = _bisect(lambda x: at_step(spectra, float(np.exp(x))).error <= error, *_span(spectra))
    return at_step(spectra, float(np.exp(inside)))


def fit_classes(x: npt.NDArray[np.floating]) -> Ints:
    """Choose the class of each column of `x` (samples, lanes), in steps: by deviation, coarser where outliers need it.

    A class costs its mismatch (Kullback-Leibler divergence of two Gaussians) and the squared reach that outliers miss.
    """
    size = np.abs(x)
    deviation = np.sqrt(np.mean(np.square(size, dtype=np.float64), axis=0))
    base = np.maximum(classes(deviation), 0)
    costs = []
    for extra in range(9):
        code = np.minimum(base + extra, CLASS_LIMIT)
        ratio = np.minimum((deviation / 2.0 ** ((code - 1) / 4)) ** 2, 1.0)
        mismatch = len(x) * (ratio - 1 - np.log(np.maximum(ratio, 1e-12))) / (2 * np.log(2))
        reach = 2.0 * KMAX[table(code)] * 2.0 ** halvings(code)
        missed = np.square(np.maximum(size - reach, 0), dtype=np.float64).sum(axis=0)
        costs.append(mismatch + missed / RATE_PRICE)
    best: Ints = np.minimum(base + np.argmin(costs, axis=0), CLASS_LIMIT)
    return best
