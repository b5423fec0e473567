"""What a merged adapter is put together from: its origin, its stored pairs, sums of deltas that have no factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.delta import BaseFree, Dense, LowRank, Sparse, Sum
from adaptc.errors import FormatError
from adaptc.lowrank import low_rank

# What of a PEFT config still holds for merged factors. Ranks and scales are the writer's; how inputs were initialised
# and trained (samplers, variants) would make PEFT build something else around them.
_HOLDS = ("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "layers_pattern",
          "layers_to_transform", "lora_dropout", "modules_to_save", "peft_version", "revision", "target_modules",
          "task_type", "trainable_token_indices")


def joined_origin(adapters: Sequence[Adapter], keys: Sequence[str], replaced: Mapping[str, Replacement]) -> Origin:
    """Return the origin of the merge: the first input's dialect, config and metadata as far as all inputs agree."""
    first = adapters[0].origin
    same = [a.origin for a in adapters if a.origin.dialect == first.dialect]
    names: dict[str, str] = {}
    layout: dict[str, str] = {}
    for origin in [*same, *(a.origin for a in adapters if a.origin not in same)]:
        layout = {**origin.layout, **layout}
        names = {**(origin.names if origin in same else {}), **names}
    metadata = {k: v for k, v in first.metadata.items() if all(o.metadata.get(k) == v for o in same)}
    config = dict(first.config)
    if first.dialect == "peft":
        config = _config(adapters, [o.config for o in same], keys, layout, replaced)
    base = next((a.origin.base_model for a in adapters if a.origin.base_model), None)
    kept = {*keys, *replaced}
    return Origin(first.dialect, config, metadata, base, {}, {k: v for k, v in names.items() if k in kept},
                  {k: v for k, v in layout.items() if k in kept})


def _config(adapters: Sequence[Adapter], configs: Sequence[Mapping[str, Any]], keys: Sequence[str],
            layout: Mapping[str, str], replaced: Mapping[str, Replacement]) -> dict[str, Any]:
    """Return the PEFT fields all inputs share. Where their modules differ, the merged ones are listed one by one."""
    first = configs[0]
    config = {k: v for k, v in first.items()
              if k in _HOLDS and all(k in c and _agree(v, c[k]) for c in configs)}
    config["peft_type"] = "LORA"
    config.setdefault("task_type", first.get("task_type"))
    config.setdefault("base_model_name_or_path", first.get("base_model_name_or_path"))
    alike = len(configs) == len(adapters) and all(set(a.deltas) == set(keys) for a in adapters)
    if not alike or "target_modules" not in config:
        config["target_modules"] = sorted({k.removesuffix(".weight") for k in keys if k.endswith(".weight")
                                           and not layout.get(k, "").startswith("experts")})
        for field in ("layers_to_transform", "layers_pattern"):
            config.pop(field, None)
    targets = {t: None for c in configs for t in c.get("target_parameters") or ()}
    if targets:
        config["target_parameters"] = list(targets)
    saved = {m: None for c in configs for m in c.get("modules_to_save") or ()
             if any(f".{m}." in f".{key}" for key in replaced)}
    config["modules_to_save"] = list(saved) or None
    if any(k not in replaced for a in adapters for k in a.replaced):  # without its head PEFT takes no classifier
        config["task_type"] = None
    return config


def beside(adapters: Sequence[Adapter]) -> tuple[dict[str, Tensor], int]:
    """Return the extra tensors to carry (token embeddings), and how many are left out.

    Those of PEFT are the state of a training method and hold for one input's factors only; of other dialects, those
    that one input of the first one's dialect has, or all have alike, are kept.
    """
    kept: dict[str, Tensor] = {}
    everything = [(k, t, a.origin.dialect) for a in adapters for k, t in a.extra.items()]
    clash = set()
    for key, t, dialect in everything:
        if dialect == "peft" or dialect != adapters[0].origin.dialect or not torch.equal(kept.setdefault(key, t), t):
            clash.add(key)
    return {k: t for k, t in kept.items() if k not in clash}, len(clash)


def _agree(x: Any, y: Any) -> bool:
    """Return whether two config values mean the same; lists of modules have no order."""
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return sorted(map(str, x)) == sorted(map(str, y))
    return bool(x == y)


def stored(b: Sequence[Tensor], a: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype,
           batch: bool) -> LowRank:
    """Return one pair (m, k), (k, n), or a `batch` of experts padded to one rank with zeros, as a delta of scale 1.

    Raises FormatError when a value left the range of `dtype`.
    """
    if not all(bool(torch.isfinite(t.sum(dtype=torch.float64))) for t in (*b, *a)):
        raise FormatError(f"merged factors do not fit {str(dtype)[6:]}", hint="--dtype bf16 or fp32")
    if not batch:
        return LowRank(a[0].cpu().contiguous(), b[0].cpu().contiguous(), None, 1.0, shape)
    k, pad = max(t.shape[0] for t in a), torch.nn.functional.pad
    wide = torch.stack([pad(t, (0, k - t.shape[1])) for t in b])
    tall = torch.stack([pad(t, (0, 0, 0, k - t.shape[0])) for t in a])
    return LowRank(tall.cpu(), wide.cpu(), None, 1.0, shape)


def weighted_sum(free: Sequence[BaseFree | None], weights: Sequence[float]) -> Sum:
    """Return sum_t w_t dW_t as a delta, the absent ones left out."""
    terms = [_scaled(d, w) for d, w in zip(free, weights, strict=True) if d is not None]
    return Sum(tuple(terms), terms[0].shape)


def _scaled(delta: BaseFree, w: float) -> BaseFree:
    if isinstance(delta, Sum):
        return replace(delta, terms=tuple(_scaled(t, w) for t in delta.terms))
    factors = low_rank(delta)
    if factors is not None:
        return replace(factors, scale=factors.scale * w)
    assert isinstance(delta, (Dense, Sparse))
    return replace(delta, scale=delta.scale * w)


def union(parts: Sequence[Sparse], present: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Return the sorted union of indices (u,) and the values there as (T, u) float64, zero rows for absent inputs."""
    places = [p.places() for p in parts]
    indices = torch.unique(torch.cat(places))
    x = torch.zeros(len(present), len(indices), dtype=torch.float64)
    for row, p, at in zip([i for i, here in enumerate(present) if here], parts, places, strict=True):
        x[row, torch.searchsorted(indices, at)] = p.values.double() * p.scale
    return indices, x
