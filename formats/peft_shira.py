"""PEFT SHIRA written: r (in + out) entries of every module, which PEFT itself reloads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.delta import Sparse
from adaptc.formats.peft_config import Draft, module_of
from adaptc.formats.peft_keys import PREFIX


def rank_of(adapter: Adapter) -> int | None:
    """Return the r of a SHIRA adapter: all deltas are sparse matrices of r (m + n) entries. None for any other."""
    ranks = set()
    for delta in adapter.deltas.values():
        if not isinstance(delta, Sparse) or len(delta.shape) != 2 or not delta.values.numel():
            return None
        ranks.add(divmod(delta.values.numel(), sum(delta.shape)))
    r, over = ranks.pop() if len(ranks) == 1 else (0, 0)
    return r if r and not over else None


def losses(adapter: Adapter) -> list[str]:
    """Return what PEFT's SHIRA cannot say of an adapter of one `rank_of`, one clause each."""
    odd = [f"{key}: PEFT's SHIRA changes plain linear layers, not one of layout {layout}"
           for key, layout in adapter.origin.layout.items() if key in adapter.deltas]
    odd += [f"{key}: PEFT's SHIRA changes weights" for key in adapter.deltas if not key.endswith(".weight")]
    if adapter.origin.config.get("fan_in_fan_out"):
        odd.append("weights stored (in, out), as GPT-2's: PEFT's SHIRA knows no layers but nn.Linear")
    odd += [f"{key}: rows of it are replaced, which PEFT's SHIRA has no place for"
            for key, value in adapter.replaced.items() if isinstance(value, Rows)]
    if adapter.extra:
        odd.append(f"{len(adapter.extra)} carried tensors that change no weight")
    return odd


def draft(adapter: Adapter) -> Draft:
    """Return the tensors by file key: indices int32 (2, K) row by row, values float32 with the multiplier in them."""
    made = Draft()
    for key, delta in adapter.deltas.items():
        assert isinstance(delta, Sparse)
        module, places = module_of(key), delta.places()
        made.modules.append(module)
        made.wrapped.add(module)
        made.tensors |= {
            f"{PREFIX}{module}.shira_weight": (delta.values.double() * delta.scale).float(),
            f"{PREFIX}{module}.shira_indices": torch.stack([places // delta.shape[1], places % delta.shape[1]]).int()}
    return made


def config_of(adapter: Adapter, r: int, modules: list[str], saved: list[str]) -> dict[str, Any]:
    """Return adapter_config.json; `saved` are the modules that are replaced whole."""
    origin = adapter.origin
    mine = origin.dialect == "peft" and str(origin.config.get("peft_type")).upper() == "SHIRA"
    config: dict[str, Any] = dict(origin.config) if mine else {
        "peft_type": "SHIRA", "task_type": origin.config.get("task_type") if origin.dialect == "peft" else None,
        "base_model_name_or_path": origin.base_model, "inference_mode": True, "fan_in_fan_out": False,
        "mask_type": "random", "random_seed": None, "init_weights": True}
    return config | {"r": r, "target_modules": sorted(modules), "modules_to_save": sorted(saved) or None}


def build(adapter: Adapter, r: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by file key and the config."""
    made, config = draft(adapter), adapter.origin.config if adapter.origin.dialect == "peft" else {}
    known = set(config.get("modules_to_save") or [])
    for name, value in adapter.replaced.items():
        if isinstance(value, Rows):
            continue
        module, _, leaf = name.rpartition(".")
        made.tensors[PREFIX + (f"{module}.base_layer.{leaf}" if module in made.wrapped else name)] = value
        if module not in made.wrapped and not any(f".{s}." in f".{module}." for s in known):
            known.add(module)
    return made.tensors, config_of(adapter, r, made.modules, sorted(known))
