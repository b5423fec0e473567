"""Resolve: base-dependent deltas as the plain ones they amount to on given base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adaptc.adapter import Adapter
from adaptc.delta import Delta, NeedsBase
from adaptc.passes import Change, Context, Need, Outcome, Pass
from adaptc.resolve import resolved


@dataclass(frozen=True, kw_only=True)
class Resolve(Pass):
    """Replace every base-dependent delta (DoRA, IA3, OFT, ...) by W' - W0 on the base weights.

    Exact, and then bound to that base. The result is as large as the weights where the change has no low rank: follow
    it with truncate. Do not use it to keep a DoRA adapter trainable, its magnitude is gone afterwards.
    """

    name: ClassVar[str] = "resolve"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    done: ClassVar[str] = "resolved on the base weights"

    keep: tuple[str, ...] = ()

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` depends on the base and is of no kind in `keep`."""
        return isinstance(delta, NeedsBase) and delta.kind not in self.keep

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        """Return the resolved delta that planning has made; its error is 0 by definition."""
        return Change(setting, 0.0, self.done)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Delta]:
        """Return what each selected delta amounts to on the base."""
        return {k: d for k, d in self._made(adapter, ctx).deltas.items() if k in adapter.deltas}

    def _made(self, adapter: Adapter, ctx: Context) -> Adapter:
        assert ctx.base is not None
        chosen = {k: adapter.deltas[k] for k in self.selected(adapter)}
        return resolved(adapter.with_deltas(chosen), ctx.base)

    def __call__(self, adapter: Adapter, ctx: Context | None = None) -> Outcome:
        """Run; changes of biases that only the base can tell are added, shared tensors nothing needs are dropped."""
        outcome = super().__call__(adapter, ctx)
        assert ctx is not None
        made, after = self._made(adapter, ctx), outcome.adapter
        biases = {k: d for k, d in made.deltas.items() if k not in adapter.deltas}
        needed = any(isinstance(d, NeedsBase) for d in after.deltas.values())
        after = after.with_deltas({**after.deltas, **biases})
        return replace(outcome, adapter=after if needed else replace(after, extra=made.extra))
