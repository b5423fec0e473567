"""diffusers files written: keys in the generation they came in, scales where that generation can say them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.formats import peft_scale
from adaptc.formats.alpha import alpha_for
from adaptc.formats.diffusers_keys import component_of, is_old, partner
from adaptc.formats.flatnames import COMPONENTS
from adaptc.formats.format import TensorsFile, history_metadata
from adaptc.formats.kohya_metadata import HASHES
from adaptc.formats.kohya_modules import as_lora, has_factors, scaled, stored, write_dora

ADAPTER_METADATA = "lora_adapter_metadata"
FOLDED = "adaptc.folded"  # module -> scale that was multiplied into b because the generation has no place for it


@dataclass
class Draft:
    """What is about to be written. `settings`: component -> {module path: (rank, scale)} for the metadata."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    folded: dict[str, float] = field(default_factory=dict)
    dora: set[str] = field(default_factory=set)
    bias: set[str] = field(default_factory=set)


def settings_of(module: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (module path as patterns see it, LoraConfig fields) of a module's component.

    A file of one model has no prefixes. Patterns are written without the text_model of a CLIP encoder, so that they fit
    with and without it (transformers 5.6 dropped it), but read as they are.
    """
    component = component_of(module)
    path = module.removeprefix(f"{component}.") if component else module
    prefix = f"{component}."
    found = {k.removeprefix(prefix): v for k, v in config.items() if component and k.startswith(prefix)}
    found = found or (dict(config) if "r" in config else {})
    patterns = [*(found.get("rank_pattern") or ()), *(found.get("alpha_pattern") or ())]
    if component.startswith("text_encoder") and not any("text_model" in p for p in patterns):
        path = path.removeprefix("text_model.")
    return path, found


def losses(adapter: Adapter) -> tuple[str, ...]:
    """Return what diffusers cannot say of `adapter`, one clause each."""
    refused = _refused(adapter)
    lost = [f"{key}: {why}" for key, why in refused.items() if why not in (_FLAT, _NO_COMPONENT)]
    for why in (_FLAT, _NO_COMPONENT):
        keys = [k for k, w in refused.items() if w == why]
        if keys:
            lost.append(f"{len(keys)} of {len(adapter.deltas)} parameters {why}, first {keys[0]}")
    rows = [k for k, v in adapter.replaced.items() if isinstance(v, Rows)]
    if rows:
        lost.append(f"{len(rows)} sets of token rows, first {rows[0]}")
    if adapter.extra:
        lost.append(f"{len(adapter.extra)} carried tensors, first {next(iter(adapter.extra))}")
    return tuple(lost)


_FLAT = "have flattened names that cannot be unflattened"
_NO_COMPONENT = f"name no component ({', '.join(COMPONENTS[:5])}, ...)"


def _refused(adapter: Adapter) -> dict[str, str]:
    names = adapter.origin.names if adapter.origin.dialect == "diffusers" else {}
    found = ((k, _refusal(k, d, adapter, names)) for k, d in adapter.deltas.items() if d.nbytes)
    return {k: why for k, why in found if why is not None}


def _refusal(key: str, delta: Delta, adapter: Adapter, names: Mapping[str, str]) -> str | None:
    module, _, leaf = key.rpartition(".")
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    layout = adapter.origin.layout.get(key, "")
    if leaf not in ("weight", "bias"):
        return "is not the weight or bias of a module"
    if not component_of(module) and key not in names and adapter.origin.dialect != "diffusers":
        return _FLAT if "." not in module and ":" not in module else _NO_COMPONENT
    if isinstance(delta, NeedsBase) and (delta.kind != "dora" or inner is None):
        return f"{delta.kind} changes the base weight"
    if isinstance(delta, NeedsBase) and delta.config.get("axis", 0) != 0 and adapter.origin.dialect != "diffusers":
        return "DoRA over columns has no key"
    if layout in ("embedding", "experts") or (isinstance(inner, LowRank) and len(inner.b.shape) != 2):
        return f"{layout or 'a stack of experts'} is no linear layer or convolution"
    assert inner is not None
    if leaf == "bias":
        pair = adapter.deltas.get(f"{module}.weight")
        inner = pair.inner if isinstance(pair, NeedsBase) else pair
        paired = inner is not None and has_factors(inner)
        return None if key in names or paired else "a bias change has no pair beside it"
    if key in names or has_factors(inner):
        return None
    return f"{type(inner).__name__.lower()} delta has no low-rank factors"


def build(adapter: Adapter) -> TensorsFile:
    """Return the file; deltas named by `losses` are left out."""
    mine = adapter.origin.dialect == "diffusers"
    config = adapter.origin.config.get(ADAPTER_METADATA, {}) if mine else {}
    refused = _refused(adapter)
    draft = Draft()
    scales: dict[str, float] = {}
    kept = {k: d for k, d in adapter.deltas.items() if d.nbytes and k not in refused}
    for key, delta in kept.items():
        if not key.endswith(".bias"):
            scales[key.removesuffix(".weight")] = _write_weight(draft, adapter, key, delta, config)
    for key, delta in kept.items():
        if key.endswith(".bias") and isinstance(delta, Dense):
            _write_bias(draft, adapter, key, delta, scales)
    if not mine or adapter.history:  # float64 is what was computed, never what a loader expects
        draft.tensors = {k: t.float() if t.dtype == torch.float64 and not k.endswith(".alpha") else t
                         for k, t in draft.tensors.items()}
    names = adapter.origin.names if mine else {}
    draft.tensors |= {names.get(k, k): v for k, v in adapter.replaced.items() if isinstance(v, Tensor)}
    return TensorsFile(draft.tensors, _metadata(adapter, draft, config, mine))


def _write_weight(draft: Draft, adapter: Adapter, key: str, delta: Delta, config: Mapping[str, Any]) -> float:
    """Add one weight's tensors; return the scale its loader will apply."""
    mine = adapter.origin.dialect == "diffusers"
    module = key.removesuffix(".weight")
    name = (adapter.origin.names.get(key) if mine else None) or f"{module}.lora_A.weight"
    inner = delta.inner if isinstance(delta, NeedsBase) else delta
    if inner is None or not has_factors(inner):  # a full difference that came as one
        assert inner is not None
        exact = isinstance(inner, Dense) and inner.scale == 1.0
        draft.tensors[name] = stored(inner.weight) if isinstance(inner, Dense) and exact else inner.dense().float()
        return 1.0
    lora = as_lora(inner)
    assert lora is not None
    if name.endswith(".diff"):
        name = f"{module}.lora_down.weight"
    a, b, s = stored(lora.a), stored(lora.b), lora.scale
    kernel = lora.shape[2:]
    recorded = adapter.origin.config.get("alpha", {}) if mine else {}
    path, said = settings_of(module, config)
    if s and (module in recorded or ".lora_down." in name):
        alpha = alpha_for(s, lora.rank, recorded, module, optional=True)
        draft.tensors |= {} if alpha is None else {f"{module}.alpha": alpha}
    elif not mine or ("r" in said and not is_old(name)):
        draft.settings.setdefault(component_of(module), {})[path] = lora.rank, s
    elif s != 1.0:
        b, s, draft.folded[module] = scaled(b, s), 1.0, s
    draft.tensors[name] = a.reshape(a.shape[0], *lora.shape[1:])
    draft.tensors[partner(name)] = b.reshape(*b.shape, *(1 for _ in kernel))
    if isinstance(delta, NeedsBase):
        draft.dora.add(component_of(module))
        draft.tensors |= _magnitude(module, delta)
    return s


def _magnitude(module: str, delta: NeedsBase) -> dict[str, Tensor]:
    m, kernel = delta.tensors["magnitude"], delta.shape[2:]
    if delta.config.get("key"):
        return {delta.config["key"]: m.reshape(delta.config["shape"])}
    if delta.config.get("axis", 0) != 0:
        return {f"{module}.dora_scale": write_dora(delta)}
    return {f"{module}.lora_magnitude_vector": m.reshape(1, -1, *(1 for _ in kernel)) if kernel else m.reshape(-1)}


def _write_bias(draft: Draft, adapter: Adapter, key: str, delta: Dense, scales: Mapping[str, float]) -> None:
    mine = adapter.origin.dialect == "diffusers"
    module = key.removesuffix(".bias")
    name = (adapter.origin.names.get(key) if mine else None) or f"{module}.lora_B.bias"
    s = scales.get(module, 1.0) if name.endswith(".bias") else 1.0
    draft.tensors[name] = scaled(stored(delta.weight), delta.scale / s if s else 0.0)
    if name.endswith(".bias"):
        draft.bias.add(component_of(module))


def _metadata(adapter: Adapter, draft: Draft, config: Mapping[str, Any], mine: bool) -> dict[str, str]:
    metadata = dict(adapter.origin.metadata) if mine else {"format": "pt"} | {
        k: v for k, v in adapter.origin.metadata.items() if k not in (ADAPTER_METADATA, *HASHES)}
    new = dict(config)
    for component, modules in draft.settings.items():
        prefix = f"{component}." if component and not (mine and "r" in config) else ""
        old = settings_of(f"{component}.x", config)[1] if mine else {
            "peft_type": "LORA", "target_modules": sorted(modules), "use_dora": component in draft.dora,
            "lora_bias": component in draft.bias}
        new |= {f"{prefix}{k}": v for k, v in (old | peft_scale.rules(modules, old)).items()}
    if new != config:
        metadata[ADAPTER_METADATA] = json.dumps(new, indent=2, sort_keys=True)
    if draft.folded:
        metadata[FOLDED] = json.dumps(draft.folded, separators=(",", ":"))
    return metadata | history_metadata(adapter)
