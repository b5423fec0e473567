"""The modules of LyCORIS files: LoHa, LoKr, full differences and norms to deltas, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from adaptc.delta import BaseFree, Delta, Dense, Hadamard, Kron, LowRank
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import decoded
from adaptc.formats import tucker
from adaptc.formats.kohya_modules import (
    DORA,
    Module,
    check_inner,
    check_known,
    pair,
    read_lora,
    scale,
    scaled,
    stored,
    with_dora,
    without_core,
)

_LORA = frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
_LOKR = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"})
_FULL = frozenset({"diff", "w_norm"})
_BIAS = frozenset({"diff_b", "b_norm"})
KNOWN = _LORA | _LOHA | _LOKR | _FULL | _BIAS | {"alpha", DORA}
# Parameters of algorithms that multiply the base weight instead of adding to it.
REFUSED = {
    "oft_blocks": "OFT rotates the base weight", "oft_diag": "OFT rotates the base weight",
    "rescale": "OFT with rescale rotates the base weight", "on_input": "IA3 scales the base weight",
    "a1.weight": "GLoRA multiplies the base weight", "b1.weight": "GLoRA multiplies the base weight",
    "bias_indices": "a sparse part in bias_indices is added to the weight",
}


def read_module(stem: str, tensors: Mapping[str, Tensor]) -> Module:
    """Return what the tensors of one stem mean. Raises UnsupportedError for algorithms that need the base weight."""
    for name, why in REFUSED.items():
        if name in tensors:
            raise UnsupportedError(f"{stem}: {why}, which LyCORIS files of this kind are not read for")
    check_known(stem, tensors, KNOWN, "LyCORIS")
    kinds = [name for name, keys in (("lora", _LORA), ("hada", _LOHA), ("lokr", _LOKR), ("diff", frozenset({"diff"})),
                                     ("norm", frozenset({"w_norm"}))) if keys & set(tensors)]
    if len(kinds) > 1:
        raise FormatError(f"{stem}: tensors of {' and '.join(kinds)} on one module")
    bias = next((tensors[k] for k in ("diff_b", "b_norm") if k in tensors), None)
    norm = "w_norm" in tensors or "b_norm" in tensors
    if (norm and ("diff" in kinds or "diff_b" in tensors)) or (norm and kinds not in ([], ["norm"])):
        raise FormatError(f"{stem}: tensors of norm and {kinds[0] if kinds else 'diff'} on one module")
    change = None if bias is None else _difference(f"{stem}.diff_b", bias)
    if not kinds:
        if bias is None:
            raise FormatError(f"{stem}: {', '.join(tensors)} without any factors, half an adapter")
        return Module(None, change, norm)
    readers: dict[str, Callable[[str, Mapping[str, Tensor]], BaseFree]] = {
        "lora": read_lora, "hada": _read_loha, "lokr": _read_lokr, "diff": _read_diff, "norm": _read_diff}
    weight = readers[kinds[0]](stem, tensors)
    return Module(with_dora(stem, weight, tensors.get(DORA)), change, norm)


def _read_diff(stem: str, tensors: Mapping[str, Tensor]) -> Dense:
    """Full difference: W' = W0 + diff, for norms too."""
    name = "diff" if "diff" in tensors else "w_norm"
    return _difference(f"{stem}.{name}", tensors[name])


def _difference(name: str, t: Tensor) -> Dense:
    if not t.numel() or not t.dtype.is_floating_point:
        raise FormatError(f"{name}: shape {tuple(t.shape)} and dtype {str(t.dtype)[6:]}, no difference of weights")
    return Dense(t, 1.0, tuple(t.shape))


def _read_loha(stem: str, tensors: Mapping[str, Tensor]) -> Hadamard:
    """LoHa: dW = s (w1_a w1_b) o (w2_a w2_b). w_a: (out, r), w_b: (r, in k...); Tucker: t (r, r, k..), w_a (r, out)."""
    left, right = (_factored(stem, tensors, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
    check_inner(stem, "hada_w1", left.rank, "hada_w2", right.rank)
    if left.shape != right.shape:
        raise FormatError(f"{stem}: hada_w1 makes shape {left.shape}, hada_w2 {right.shape}")
    return Hadamard(left, right, scale(stem, tensors, left.rank), left.shape)


def _read_lokr(stem: str, tensors: Mapping[str, Tensor]) -> Kron:
    """LoKr: dW = s kron(w1, w2), one formula for the layouts with the kernel in w2 and flat over both sides.

    Either side is full or a pair; s = alpha / r of the pairs, and 1 when both sides are full.
    """
    left, right = (_side(stem, tensors, f"lokr_w{i}") for i in (1, 2))
    if len(left.shape) != 2:
        raise FormatError(f"{stem}: lokr_w1 has shape {left.shape}, it must be a matrix")
    ranks = [side.rank for side in (left, right) if isinstance(side, LowRank)]
    if len(ranks) == 2:
        check_inner(stem, "lokr_w1", ranks[0], "lokr_w2", ranks[1])
    shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1], *right.shape[2:])
    return Kron(left, right, scale(stem, tensors, ranks[0]) if ranks else 1.0, shape)


def _side(stem: str, tensors: Mapping[str, Tensor], name: str) -> LowRank | Dense:
    if name in tensors:
        if f"{name}_a" in tensors or f"{name}_b" in tensors:
            raise FormatError(f"{stem}: {name} is there whole and as a pair")
        if tensors[name].dim() < 2:
            raise FormatError(f"{stem}: {name} has shape {tuple(tensors[name].shape)}, it must be a matrix")
        return _difference(f"{stem}.{name}", tensors[name])
    return _factored(stem, tensors, name, "lokr_t2" if name.endswith("2") else "")


def _factored(stem: str, tensors: Mapping[str, Tensor], name: str, core_name: str) -> LowRank:
    """Return w_a w_b, or with a Tucker core t (r, r, k...) the sum over i, j of t[i, j, k] w_a[i, out] w_b[j, in]."""
    a, b = pair(stem, tensors, f"{name}_a", f"{name}_b")
    core = tensors.get(core_name)
    if a.dim() != 2 or b.dim() != 2:
        raise FormatError(f"{stem}: {name}_a has shape {tuple(a.shape)}, {name}_b {tuple(b.shape)}, not two matrices")
    if core is None:
        check_inner(stem, f"{name}_a", a.shape[1], f"{name}_b", b.shape[0])
        return LowRank(b, a, None, 1.0, (a.shape[0], b.shape[1]))
    if core.dim() < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise FormatError(f"{stem}: {core_name} has shape {tuple(core.shape)} between {tuple(a.shape)} "
                          f"and {tuple(b.shape)}")
    return LowRank(tucker.fold(core, b), a.mT.contiguous(), None, 1.0, (a.shape[1], b.shape[1], *core.shape[2:]))


def write_delta(delta: Delta, norm: bool) -> tuple[dict[str, Tensor], float, int]:
    """Return (tensors, scale, rank) of a Kron, Hadamard or dense delta; rank 0 where alpha has no meaning."""
    match delta:
        case Hadamard():
            left, right = without_core(delta.left), without_core(delta.right)
            tucked = tucker.unfold(left.a) is not None and tucker.unfold(right.a) is not None
            made = _write_pair(left, "hada_w1", "hada_t1" if tucked else "")
            made |= _write_pair(right, "hada_w2", "hada_t2" if tucked else "")
            return made, delta.scale * left.scale * right.scale, left.rank
        case Kron():
            return _write_lokr(delta)
        case _:
            assert not isinstance(delta, LowRank)
            exact = isinstance(delta, Dense) and delta.scale == 1.0 and isinstance(delta.weight, Tensor)
            t = delta.weight if isinstance(delta, Dense) and exact else delta.dense().float()
            return {"w_norm" if norm else "diff": decoded(t).reshape(delta.shape)}, 1.0, 0


def _write_lokr(delta: Kron) -> tuple[dict[str, Tensor], float, int]:
    left, right = (without_core(s) if isinstance(s, LowRank) else s for s in (delta.left, delta.right))
    if isinstance(left, LowRank) and isinstance(right, LowRank) and left.rank != right.rank:
        left = Dense(left.dense().float(), 1.0, left.shape)  # one alpha serves both pairs, so their ranks must agree
    s = delta.scale * left.scale * right.scale
    ranks = [side.rank for side in (left, right) if isinstance(side, LowRank)]
    made: dict[str, Tensor] = {}
    for side, name, core in ((left, "lokr_w1", ""), (right, "lokr_w2", "lokr_t2")):
        if isinstance(side, LowRank):
            made |= _write_pair(side, name, core)
        else:
            # Both sides whole: LyCORIS ignores alpha, so the scale goes into the small one.
            made[name] = scaled(stored(side.weight).reshape(side.shape), s if not ranks and name == "lokr_w1" else 1.0)
    return made, s if ranks else 1.0, ranks[0] if ranks else 0


def _write_pair(side: LowRank, name: str, core_name: str) -> dict[str, Tensor]:
    core = tucker.unfold(side.a) if core_name else None
    if core is not None:
        mid, down = core
        return {core_name: mid, f"{name}_a": stored(side.b).mT, f"{name}_b": down}
    return {f"{name}_a": stored(side.b), f"{name}_b": stored(side.a)}
