"""What base-dependent deltas mean on given base weights: kind -> (delta, w0) -> W' - W0."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from adaptc import resolve_rotation, resolve_scaled, resolve_shape, resolve_spectral
from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.delta import BaseFree, Delta, NeedsBase
from adaptc.errors import AdaptcError, FormatError

Resolver = Callable[[NeedsBase, Tensor], BaseFree]

RESOLVERS: dict[str, Resolver] = {
    "dora": resolve_scaled.dora, "ia3": resolve_scaled.ia3, "hira": resolve_scaled.hira, "glora": resolve_scaled.glora,
    "peanut": resolve_scaled.peanut, "miss_bat": resolve_scaled.miss_bat,
    "oft": resolve_rotation.oft, "boft": resolve_rotation.boft, "hra": resolve_rotation.hra,
    "road": resolve_rotation.road,
    "pissa": resolve_spectral.pissa, "olora": resolve_spectral.olora, "kasa": resolve_spectral.kasa,
    "osf": resolve_spectral.osf, "psoft": resolve_spectral.psoft, "deft": resolve_spectral.deft,
    "frod": resolve_spectral.frod,
    "vera": resolve_shape.vera, "randlora": resolve_shape.randlora, "fourierft": resolve_shape.fourierft,
    "waveft": resolve_shape.waveft, "sparse": resolve_shape.sparse, "paca": resolve_shape.paca,
    "miss": resolve_shape.miss,
    "qhft": resolve_shape.qhft,
}
# Kinds that need W0 for nothing but its shape.
SHAPE_ONLY = frozenset({"vera", "randlora", "fourierft", "waveft", "sparse", "miss", "qhft"})
# Kinds that change the module's bias too, if it has one: (delta, w0, b0) -> b' - b0, or None.
BIASED: dict[str, Callable[[NeedsBase, Tensor, Tensor], BaseFree | None]] = {
    "ia3": resolve_scaled.ia3_bias, "glora": resolve_scaled.glora_bias, "road": resolve_rotation.road_bias,
}


def bound(adapter: Adapter, delta: NeedsBase) -> NeedsBase:
    """Return `delta` with the tensors it shares with other modules (config "shared": name -> key in extra) beside its
    own, which is the form that resolvers take. Raises FormatError when the adapter lost one.
    """
    shared = delta.config.get("shared", {})
    missing = [key for key in shared.values() if key not in adapter.extra]
    if missing:
        raise FormatError(f"shared tensor {missing[0]} is missing")
    return replace(delta, tensors={**delta.tensors, **{n: adapter.extra[key] for n, key in shared.items()}})


def resolved(adapter: Adapter, base: Base, keep: Collection[str] = ()) -> Adapter:
    """Return `adapter` with every base-dependent delta turned into W' - W0, except the kinds in `keep`.

    Kinds that act on outputs change the bias too where the base has one, which only the base can tell. Shared tensors
    that nothing needs any more are dropped. Raises NeedsError for parameters that the base does not have, FormatError
    for shapes that do not fit, each naming the parameter.
    """
    deltas: dict[str, Delta] = {}
    used: set[str] = set()
    for key, delta in adapter.deltas.items():
        if not isinstance(delta, NeedsBase) or delta.kind in keep:
            deltas[key] = delta
            continue
        used |= set(delta.config.get("shared", {}).values())
        try:
            whole, w0 = bound(adapter, delta), base.weight(key, delta.shape)
            deltas[key] = whole.resolve(w0)
            bias = f"{key.removesuffix('.weight')}.bias"
            if delta.kind in BIASED and base.name_of(bias) is not None:
                change = BIASED[delta.kind](whole, w0, base[bias])
                if change is not None:
                    deltas[bias] = change
        except AdaptcError as e:
            raise type(e)(str(e) if key in str(e) else f"{key}: {e}", hint=e.hint) from e
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:  # settings or tensors that lie
            raise FormatError(f"{key}: {delta.kind} is malformed ({type(e).__name__}: {str(e)[:80]})") from e
        except RuntimeError as e:  # what torch raises for shapes that do not go together
            raise FormatError(f"{key}: tensors of {delta.kind} do not fit the weight ({str(e)[:120]})") from e
    for delta in deltas.values():
        if isinstance(delta, NeedsBase):
            used -= set(delta.config.get("shared", {}).values())
    extra = {k: t for k, t in adapter.extra.items() if k not in used}
    return replace(adapter, deltas=deltas, extra=extra)
