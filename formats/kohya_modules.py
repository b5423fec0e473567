"""The modules of kohya files: lora_down, lora_up, lora_mid and dora_scale to deltas, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptc.coded import Coded
from adaptc.delta import BaseFree, Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sum
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import Factor, decoded
from adaptc.formats import tucker
from adaptc.formats.alpha import alpha_value, scale_of
from adaptc.lowrank import low_rank

DORA = "dora_scale"


@dataclass(frozen=True)
class Module:
    """What the tensors of one stem mean: a change of the weight, of the bias, or of both; `norm` for w_norm, b_norm."""

    weight: Delta | None = None
    bias: Dense | None = None
    norm: bool = False


def is_lycoris_parameter(name: str) -> bool:
    """Return whether only LyCORIS writes a parameter of this name."""
    return name.startswith(("hada_", "lokr_", "lora_mid", "oft_", "diff", "w_norm", "b_norm", "a1.", "on_input"))


def check_known(stem: str, tensors: Mapping[str, Tensor], known: frozenset[str], dialect: str) -> None:
    """Raise UnsupportedError for a parameter that `known` does not list."""
    for name in tensors:
        if name not in known:
            raise UnsupportedError(f"{stem}.{name}: not a known {dialect} parameter")


def scale(stem: str, tensors: Mapping[str, Tensor], rank: int) -> float:
    """Return the multiplier alpha / rank of one module, 1 without an alpha."""
    alpha = tensors.get("alpha")
    return scale_of(None if alpha is None else alpha_value(stem, alpha), rank)


def read_lora(stem: str, tensors: Mapping[str, Tensor], *, mid: str = "lora_mid.weight") -> LowRank:
    """Return dW = s up down, or s up mid down with a Tucker core. down: (r, in, k...), up: (out, r, 1...).

    mid: (r, r, k...) between down (r, in, 1...) and up; it stays in the factor as it is stored. Raises FormatError for
    half pairs and shapes that disagree.
    """
    if mid in tensors and "lora_down.weight" not in tensors:
        raise FormatError(f"{stem}: {mid} has no lora_down.weight")
    down, up = pair(stem, tensors, "lora_down.weight", "lora_up.weight")
    rank = down.shape[0]
    core = tensors.get(mid)
    check_inner(stem, "lora_up", up.shape[1], "lora_down" if core is None else "lora_mid",
                rank if core is None else core.shape[0])
    if math.prod(up.shape[2:]) != 1:
        raise FormatError(f"{stem}: lora_up has shape {tuple(up.shape)}, its kernel must be 1")
    s = scale(stem, tensors, rank)
    if core is None:
        return LowRank(down.flatten(1), up.flatten(1), None, s, (up.shape[0], *down.shape[1:]))
    if core.dim() < 3 or core.shape[1] != rank or math.prod(down.shape[2:]) != 1:
        raise FormatError(f"{stem}: lora_mid has shape {tuple(core.shape)}, lora_down {tuple(down.shape)}")
    return LowRank(tucker.fold(core, down.flatten(1)), up.flatten(1), None, s,
                   (up.shape[0], down.shape[1], *core.shape[2:]))


def pair(stem: str, tensors: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    """Return both halves of a pair. Raises FormatError for half a pair, empty tensors and tensors of whole numbers."""
    for have, miss in ((first, second), (second, first)):
        if have in tensors and miss not in tensors:
            raise FormatError(f"{stem}: {have} has no {miss}, half an adapter")
    if first not in tensors:
        raise FormatError(f"{stem}: {first} is missing, {', '.join(tensors)} alone say nothing")
    for name in (first, second):
        t = tensors[name]
        if t.numel() == 0 or t.dim() < 2:
            raise FormatError(f"{stem}.{name}: shape {tuple(t.shape)} holds no factor")
        if not t.dtype.is_floating_point:
            raise FormatError(f"{stem}.{name}: dtype {str(t.dtype)[6:]} holds codes, not factors")
    return tensors[first], tensors[second]


def check_inner(stem: str, left: str, left_rank: int, right: str, right_rank: int) -> None:
    """Raise FormatError unless the inner dimensions of a pair agree."""
    if left_rank != right_rank:
        raise FormatError(f"{stem}: {left} has rank {left_rank}, {right} has rank {right_rank}")


def with_dora(stem: str, delta: BaseFree, dora_scale: Tensor | None) -> Delta:
    """Return `delta` under a DoRA magnitude, or as it is without one.

    (out, 1...) scales rows (norm over the inputs), the older (1, in, 1...) scales columns; the shape tells. Where the
    delta is stored flat, columns of a (1, in, 1, 1) magnitude tell the kernel too.
    """
    if dora_scale is None:
        return delta
    n, first = dora_scale.numel(), dora_scale.shape[0] if dora_scale.dim() else 0
    config: dict[str, Any] = {"axis": 0, "dora_shape": list(dora_scale.shape)}
    if first == n == delta.shape[0]:
        return NeedsBase("dora", {"magnitude": dora_scale.reshape(-1)}, config, delta.shape, delta)
    columns = math.prod(delta.shape[1:])
    if dora_scale.dim() < 2 or dora_scale.shape[1] != n or n == 0 or (n != delta.shape[1] and columns % n):
        raise FormatError(f"{stem}: dora_scale has shape {tuple(dora_scale.shape)} for a weight of shape {delta.shape}")
    if n != delta.shape[1]:
        side = math.isqrt(columns // n)
        delta = reshaped(delta, (delta.shape[0], n, *((side, side) if side * side * n == columns else (columns // n,))))
    return NeedsBase("dora", {"magnitude": dora_scale.reshape(-1)}, config | {"axis": 1}, delta.shape, delta)


def reshaped(delta: Delta, shape: tuple[int, ...]) -> Any:
    """Return the delta with another logical shape of the same rows and columns."""
    parts = {n: reshaped(getattr(delta, n), shape) for n in ("left", "right")
             if type(delta).__name__ == "Hadamard"}
    if isinstance(delta, NeedsBase) and delta.inner is not None:
        parts["inner"] = reshaped(delta.inner, shape)
    return replace(delta, shape=shape, **parts)


def write_dora(delta: NeedsBase) -> Tensor:
    """Return the dora_scale tensor: the shape it was read in, else (out, 1...) or (1, in, 1...)."""
    m = delta.tensors["magnitude"]
    axis = int(delta.config.get("axis", 0))
    shape = delta.config.get("dora_shape") or [-1 if d == axis else 1 for d in range(len(delta.shape))]
    return m.reshape(shape)


def stored(factor: Factor) -> Tensor:
    """Return a factor as it lies in the file: its tensor; codes decoded, to float32 where they decode to float64."""
    if isinstance(factor, Tensor):
        return factor
    t = decoded(factor)
    return t.float() if t.dtype == torch.float64 else t


def as_lora(delta: BaseFree) -> LowRank | None:
    """Return `delta` as a pair without a core, None where it has none; factors that are computed become float32.

    Products of two half-precision numbers fit float32, so LoHa and LoKr in float16 or bfloat16 expand without rounding.
    """
    made = low_rank(delta)
    if made is None:
        return None
    if made is not delta:
        return replace(made, a=stored(made.a).float(), b=stored(made.b).float())
    return without_core(made)


def has_factors(delta: BaseFree) -> bool:
    """Return whether `delta` has exact low-rank factors, without computing them."""
    if isinstance(delta, Sum):
        return all(has_factors(t) for t in delta.terms)
    return isinstance(delta, (LowRank, Kron, Hadamard, Coded))


def without_core(delta: LowRank) -> LowRank:
    """Return the delta with its core multiplied into b in float64."""
    if delta.core is None:
        return delta
    b = stored(delta.b)
    return replace(delta, b=(b.double() @ decoded(delta.core).double()).to(b.dtype), core=None)


def scaled(t: Tensor, s: float) -> Tensor:
    """Return s * t computed in float64, in the dtype of t; t itself for s = 1."""
    return t if s == 1.0 else (t.double() * s).to(t.dtype)


def write_lora(delta: LowRank, *, keep_mid: bool) -> dict[str, Tensor]:
    """Return the tensors of one pair without a core, scale left out: the inverse of `read_lora`."""
    b, kernel = stored(delta.b), delta.shape[2:]
    ones = [1] * len(kernel)
    core = tucker.unfold(delta.a) if keep_mid else None
    up = b.reshape(*b.shape, *ones)
    if core is not None:
        mid, down = core
        return {"lora_down.weight": down.reshape(*down.shape, *ones), "lora_mid.weight": mid, "lora_up.weight": up}
    a = stored(delta.a)
    return {"lora_down.weight": a.reshape(a.shape[0], *delta.shape[1:]), "lora_up.weight": up}
