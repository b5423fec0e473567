"""adapter_config.json of a written PEFT LoRA: everything PEFT needs to inject the same modules and load the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adaptc.adapter import Adapter, Rows
from adaptc.delta import NeedsBase
from adaptc.formats import peft_scale
from adaptc.formats.patterns import fits

# Switches of stored forms that reading writes out.
_FOLDED = ("use_qalora", "use_bdlora", "enable_lora")
_STATES = ("monteclora_config", "velora_config")
# Base-dependent kinds that PEFT keeps as a LoRA pair: the config field that declares them, and its value without.
MOVED: dict[str, tuple[str, Any]] = {
    "pissa": ("init_lora_weights", True), "olora": ("init_lora_weights", True), "kasa": ("kasa_config", None)}


@dataclass
class Draft:
    """What is about to be written: tensors by file key, (rank, scale) by the name that patterns match.

    `modules` are targets, `parameters` target parameters, `dropped` the keys that nothing is left of, `wrapped` all
    modules that PEFT will put a layer around.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, tuple[int, float]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    wrapped: set[str] = field(default_factory=set)


def own_config(adapter: Adapter) -> Mapping[str, Any] | None:
    """Return the config of an adapter that came from a PEFT LoRA, None for any other."""
    config, dialect = adapter.origin.config, adapter.origin.dialect
    return config if dialect == "peft" and str(config.get("peft_type")).upper() == "LORA" else None


def module_of(key: str) -> str:
    """Return the module that PEFT injects for a parameter."""
    return key.removesuffix(".weight").removesuffix(".in_proj_weight")


def config_of(adapter: Adapter, draft: Draft, bias: bool, state: bool) -> dict[str, Any]:
    """Return the config of what was drafted; `state` says that carried training state is written too."""
    origin, mine = adapter.origin, own_config(adapter)
    peft = origin.dialect == "peft"
    config: dict[str, Any] = dict(mine) if mine is not None else {
        "peft_type": "LORA", "task_type": origin.config.get("task_type") if peft else None, "bias": "none",
        "base_model_name_or_path": origin.base_model, "inference_mode": True, "fan_in_fan_out": False}
    config |= peft_scale.rules(draft.settings, config)
    config["target_modules"] = _targets(config.get("target_modules", []), draft.modules)
    if draft.parameters or config.get("target_parameters"):
        config["target_parameters"] = _parameters(config.get("target_parameters") or [], draft)
    _carry(adapter, draft, config)
    kinds = {d.kind for d in adapter.deltas.values() if isinstance(d, NeedsBase)}
    for name, value in (("use_dora", "dora" in kinds), ("lora_bias", bias)):
        if value or config.get(name):
            config[name] = value
    for kind, (name, plain) in MOVED.items():  # left standing, the field would have PEFT move the base again
        given = config.get(name)
        declared = str(given).lower() == kind if name == "init_lora_weights" else given is not None
        if declared and kind not in kinds:
            config[name] = plain
    for name in _FOLDED:
        if config.get(name):
            del config[name]
    if not state:
        config |= dict.fromkeys((n for n in _STATES if config.get(n) and adapter.extra), None)
    gone = sorted(module_of(k) for k in draft.dropped if adapter.origin.layout.get(k) != "experts")
    if gone:  # modules that a byte budget left nothing of: PEFT must not inject them
        config["exclude_modules"] = _excluded(config.get("exclude_modules"), gone, draft.modules)
    return config


def _carry(adapter: Adapter, draft: Draft, config: dict[str, Any]) -> None:
    """Declare heads and token rows, which PEFT loads only when its config names them."""
    if own_config(adapter) is not None:
        return
    given = adapter.origin.config if adapter.origin.dialect == "peft" else {}
    saved = set(given.get("modules_to_save") or [])
    rows = {}
    for name, value in adapter.replaced.items():
        module = name.rpartition(".")[0]
        if isinstance(value, Rows):
            rows[module] = list(value.indices)
        elif module not in draft.modules and not any(module == s or module.endswith(f".{s}") for s in saved):
            saved.add(module)
    config["modules_to_save"] = sorted(saved) or None
    if rows:
        config["trainable_token_indices"] = rows


def _targets(given: Any, modules: list[str]) -> Any:
    """Return target_modules as given where they cover every module, else with the missing paths."""
    if given is None or given == "all-linear":  # rules that only the model can tell
        return given
    if isinstance(given, str):
        return given if all(fits(f"^(?:{given})", m) for m in modules) else sorted(modules)
    missing = [m for m in modules if not any(m == g or m.endswith(f".{g}") for g in given)]
    return sorted({*given, *missing}) if missing else given


def _parameters(given: Iterable[str], draft: Draft) -> list[str]:
    """Return target_parameters without those nothing is left of, in the words of `given` where these still fit."""
    kept = [g for g in given if any(p == g or p.endswith(f".{g}") for p in draft.parameters)]
    gone = [k for k in draft.dropped if any(k == g or k.endswith(f".{g}") for g in kept)]
    covered = all(any(p == g or p.endswith(f".{g}") for g in kept) for p in draft.parameters)
    return kept if covered and not gone else list(draft.parameters)


def _excluded(given: Any, dropped: list[str], kept: Iterable[str]) -> Any:
    """Return exclude_modules with `dropped` added: as a list, or as one expression where a path ends another one."""
    plain = not any(k.endswith(f".{d}") for k in kept for d in dropped)
    if not isinstance(given, str) and plain:
        return sorted({*(given or []), *dropped})
    before = [f"(?:{given})"] if isinstance(given, str) else [rf"(?:.*\.)?{re.escape(g)}" for g in given or []]
    return "|".join([*before, *map(re.escape, dropped)])
