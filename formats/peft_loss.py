"""What a PEFT LoRA cannot say, listed before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.delta import Delta, Hadamard, Kron, LowRank, NeedsBase, Sum
from adaptc.formats import peft_scale, peft_shira
from adaptc.formats.peft_config import MOVED, module_of, own_config

# Types that only replace parameters: written back as they came.
VERBATIM = ("LN_TUNING", "TRAINABLE_TOKENS")


def losses(adapter: Adapter) -> list[str]:
    """Return what a PEFT LoRA, or SHIRA where all deltas fit one, cannot say of `adapter`, one clause each."""
    if verbatim(adapter):
        return []
    if peft_shira.rank_of(adapter) is not None:
        return peft_shira.losses(adapter)
    lost = [why for key, d in adapter.deltas.items() if (why := loss(adapter, key, d))]
    kept = {k: d for k, d in adapter.deltas.items() if d.nbytes and not is_bias(k, adapter.deltas)}
    kinds = Counter(d.kind for d in kept.values() if isinstance(d, NeedsBase) and d.kind in ("dora", *MOVED))
    for kind, count in kinds.items():
        if count < len(kept):
            lost.append(f"{kind} on {count} modules but not on {len(kept) - count}: PEFT has one switch for all")
    if "dora" in kinds and any(is_bias(k, adapter.deltas) for k in adapter.deltas):
        lost.append("DoRA beside bias changes: PEFT takes one or the other")
    if not any(_lora_shaped(d) for d in kept.values()):
        lost.append("no module has factors: PEFT has no LoRA without any")
    bound = [d.config.get("shared", {}).values() for d in adapter.deltas.values() if isinstance(d, NeedsBase)]
    gone = len(adapter.extra.keys() - set().union(*bound) - state_of(adapter).keys())
    if gone:
        lost.append(f"{gone} carried tensors that change no weight, or fit only the ranks of before")
    return lost


def loss(adapter: Adapter, key: str, delta: Delta) -> str:
    """Return why one delta cannot be written, "" when it can."""
    if isinstance(delta, NeedsBase) and delta.kind != "dora":
        config = own_config(adapter)
        if delta.kind in MOVED and config is not None and config.get(MOVED[delta.kind][0]) is not None:
            return "" if _unmoved(key, delta, config) else f"{key}: {delta.kind} ties its rank to what the base lost"
        return f"{key}: {delta.kind} has no delta without the base weights (--base)"
    if is_bias(key, adapter.deltas):
        weight = adapter.deltas.get(_weight_of(key))
        if weight is None or not weight.nbytes:
            return f"{key}: a bias change with no factors beside it"
        if adapter.origin.layout.get(_weight_of(key)):
            return f"{key}: a bias change of {adapter.origin.layout[_weight_of(key)]}, which PEFT has not"
        return ""
    if delta.nbytes and not _lora_shaped(delta):
        return f"{key}: {type(delta).__name__.lower()} delta has no low-rank factors"
    return ""


def _lora_shaped(delta: Delta) -> bool:
    """Return whether a delta has exact low-rank factors, without computing them."""
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    if isinstance(inner, Sum):
        return all(map(_lora_shaped, inner.terms))
    return isinstance(inner, (LowRank, Kron, Hadamard))


def _unmoved(key: str, delta: NeedsBase, config: Mapping[str, Any]) -> bool:
    inner = delta.inner
    return isinstance(inner, LowRank) and peft_scale.says({module_of(key): (inner.rank, inner.scale)}, config)


def is_bias(key: str, deltas: Mapping[str, Delta]) -> bool:
    """Return whether a delta is that of a bias."""
    return len(deltas[key].shape) == 1


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


def verbatim(adapter: Adapter) -> bool:
    """Return whether an adapter is of a PEFT type that only replaces parameters, and is written back as it came."""
    origin = adapter.origin
    return (not adapter.deltas and bool(adapter.replaced) and origin.dialect == "peft"
            and str(origin.config.get("peft_type")).upper() in VERBATIM)


def state_of(adapter: Adapter) -> dict[str, Tensor]:
    """Return the carried training state, {} once ranks or scales have changed: its tensors are tied to them."""
    config = own_config(adapter)
    if config is None or not adapter.extra:
        return {}
    ranks = {module_of(k): (d.rank, d.scale) for k, d in adapter.deltas.items() if isinstance(d, LowRank)}
    return dict(adapter.extra) if peft_scale.says(ranks, config) else {}
