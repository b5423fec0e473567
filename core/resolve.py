"""What base-dependent deltas mean on given base weights: kind -> (delta, w0) -> W' - W0."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from adaptc import resolve_rotation, resolve_scaled, resolve_shape, resolve_spectral
from adaptc.adapter import Adapter
from adaptc.base import Base
from adaptc.delta import BaseFree, Delta, NeedsBase
from adaptc.errors import AdaptcError

Resolver = Callable[[NeedsBase, Tensor], BaseFree]

RESOLVERS: dict[str, Resolver] = {
    "dora": resolve_scaled.dora, "ia3": resolve_scaled.ia3, "hira": resolve_scaled.hira, "glora": resolve_scaled.glora,
    "glora_bias": resolve_scaled.glora_bias, "peanut": resolve_scaled.peanut, "miss_bat": resolve_scaled.miss_bat,
    "oft": resolve_rotation.oft, "boft": resolve_rotation.boft, "hra": resolve_rotation.hra,
    "road": resolve_rotation.road,
    "pissa": resolve_spectral.pissa, "olora": resolve_spectral.olora, "kasa": resolve_spectral.kasa,
    "osf": resolve_spectral.osf, "psoft": resolve_spectral.psoft, "deft": resolve_spectral.deft,
    "frod": resolve_spectral.frod,
    "vera": resolve_shape.vera, "randlora": resolve_shape.randlora, "fourierft": resolve_shape.fourierft,
    "waveft": resolve_shape.waveft, "sparse": resolve_shape.sparse, "miss": resolve_shape.miss,
}
# Kinds that need W0 for nothing but its shape.
SHAPE_ONLY = frozenset({"vera", "randlora", "fourierft", "waveft", "sparse", "miss"})


def resolved(adapter: Adapter, base: Base, keep: Collection[str] = ()) -> Adapter:
    """Return `adapter` with every base-dependent delta turned into W' - W0, except the kinds in `keep`.

    A delta whose config says optional (the bias of a module that may have none) is dropped where the base lacks the
    parameter; config "with" names other base parameters a resolver reads. Raises NeedsError for parameters the base
    does not have, FormatError for shapes that do not fit, each naming the parameter.
    """
    deltas: dict[str, Delta] = {}
    for key, delta in adapter.deltas.items():
        if not isinstance(delta, NeedsBase) or delta.kind in keep:
            deltas[key] = delta
        elif not delta.config.get("optional") or base.name_of(key) is not None:
            try:
                others = {name: base[param] for name, param in delta.config.get("with", {}).items()}
                bound = replace(delta, tensors={**delta.tensors, **others})
                deltas[key] = bound.resolve(base.weight(key, delta.shape))
            except AdaptcError as e:
                raise type(e)(str(e) if key in str(e) else f"{key}: {e}", hint=e.hint) from e
    return adapter.with_deltas(deltas)
