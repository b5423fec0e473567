"""Resolve: base-dependent deltas as the plain ones they amount to on given base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.delta import Delta, NeedsBase
from adaptc.passes import Change, Context, Need, Pass


@dataclass(frozen=True, kw_only=True)
class Resolve(Pass):
    """Replace every base-dependent delta (DoRA, IA3, OFT, ...) by W' - W0 on the base weights.

    Exact, and then bound to that base. The result is as large as the weights where the change has no low rank: follow
    it with truncate. Do not use it to keep a DoRA adapter trainable, its magnitude is gone afterwards.
    """

    name: ClassVar[str] = "resolve"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})
    done: ClassVar[str] = "resolved on the base weights"

    def handles(self, delta: Delta) -> bool:
        """Return whether `delta` depends on the base."""
        return isinstance(delta, NeedsBase)

    def plan(self, adapter: Adapter, ctx: Context) -> Mapping[str, Base]:
        """Return the base for every delta to resolve."""
        assert ctx.base is not None
        return dict.fromkeys(self.selected(adapter), ctx.base)

    def delta(self, key: str, delta: Delta, setting: Base) -> Change:
        """Return the plain delta; its error is 0 by definition."""
        assert isinstance(delta, NeedsBase)
        return Change(delta.resolve(setting.weight(key, delta.shape)), 0.0, self.done)
