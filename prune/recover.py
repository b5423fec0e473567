"""Recovery: an adapter trained on a pruned model, spread back over the full one (LoRAM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adaptc import __version__
from adaptc.adapter import Adapter, Step
from adaptc.delta import Delta
from adaptc.errors import FormatError, UnsupportedError
from adaptc.prune.cuts import Cut, spread_delta


def recover(adapter: Adapter, cuts: Mapping[str, Cut]) -> Adapter:
    """Return an adapter of a pruned model as one of the whole: its rows of B and columns of A in their old places.

    dW is zero on everything that was pruned, so the full model with it computes what training changed and nothing
    else; exact, ranks and multipliers stay. Zhang et al., LoRAM, arXiv 2502.13533. Raises FormatError when the adapter
    is not one of the model the map describes.
    """
    named = _names(cuts)
    deltas: dict[str, Delta] = {}
    for key, delta in adapter.deltas.items():
        cut = named.get(key) or named.get(_tail(key))
        deltas[key] = delta if cut is None else spread_delta(key, delta, cut)
    if not any((named.get(k) or named.get(_tail(k))) for k in adapter.deltas) and cuts:
        raise FormatError(f"no module of the adapter is in the map, which has {next(iter(cuts))}",
                          hint="the map of another model, or an adapter whose modules were not pruned")
    for key in adapter.replaced:
        cut = named.get(key) or named.get(_tail(key))
        if cut is not None and not cut.whole:
            raise UnsupportedError(f"{key}: the adapter carries it whole, and the map does not hold the pruned part",
                                   hint="train without bias and modules_to_save on pruned parameters")
    after = replace(adapter, deltas=deltas)
    step = Step("recover", __version__, adapter.nbytes, after.nbytes, 0.0)
    return after.with_deltas(after.deltas, step)


def _tail(key: str) -> str:
    return key.split(".", 1)[-1]


def _names(cuts: Mapping[str, Cut]) -> dict[str, Cut]:
    """Return the cuts by full name, and by the name without a leading component where that is unambiguous."""
    out = dict(cuts)
    tails: dict[str, list[str]] = {}
    for key in cuts:
        tails.setdefault(_tail(key), []).append(key)
    return out | {t: cuts[keys[0]] for t, keys in tails.items() if len(keys) == 1 and t not in out}
