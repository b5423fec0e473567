"""Rank, alpha and scale of PEFT's LoRA family: reading the rules, and writing them so that they reload."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adaptc.errors import FormatError
from adaptc.formats.patterns import fits


def pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that fits `module`, in JSON order, else `default`.

    A key k fits when re.match("(.*\\.)?(k)$", module); it may be a full regular expression. The match is on the module
    path without "base_model.model.". Raises FormatError for a key that is no regular expression, or one that no
    module path needs; matching takes bounded time whatever the key.
    """
    for key, value in (patterns or {}).items():
        if fits(key, module):
            return value
    return default


def number(config: Mapping[str, Any], name: str, value: Any) -> float:
    """Return a finite number from the config. Raises FormatError naming the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{name} in adapter_config.json is {value!r}, not a number")
    return value


def scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return s = alpha / r, or alpha / sqrt(r) with use_rslora, after alpha_pattern; r is the tensors' own rank.

    Raises FormatError when the config promises another rank for this module.
    """
    promised = pattern(config.get("rank_pattern"), module, config.get("r"))
    if promised is not None and int(number(config, "r", promised)) != rank:
        raise FormatError(f"{module}: adapter_config.json says rank {promised}, lora_A has rank {rank}")
    alpha = number(config, "lora_alpha", pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rules(modules: Mapping[str, tuple[int, float]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields that give every module its (rank, scale): r, lora_alpha, patterns, use_rslora.

    Rules of `config` that already say so are returned unchanged. Otherwise r is the largest rank (what vLLM reads),
    alpha = scale * r is never rounded, rsLoRA is folded away, and patterns are full module paths, longest first so
    that no path is taken for the tail of another.
    """
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    if config.get("r") is not None and _says(modules, config):
        return {f: config[f] for f in fields if f in config}
    r = max((k for k, _ in modules.values()), default=1)
    common = Counter(s for _, s in modules.values()).most_common(1)
    s = common[0][0] if common else 1.0
    longest = sorted(modules, key=lambda m: (-len(m), m))
    ranks = {m: modules[m][0] for m in longest if modules[m][0] != r}
    alphas = {m: _tidy(modules[m][1] * modules[m][0]) for m in longest if modules[m][1] * modules[m][0] != s * r}
    return {"r": r, "lora_alpha": _tidy(s * r), "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False}


def _says(modules: Mapping[str, tuple[int, float]], config: Mapping[str, Any]) -> bool:
    """Return whether `config` gives exactly these ranks and scales."""
    try:
        return all(scale(config, m, rank) == s for m, (rank, s) in modules.items())
    except FormatError:
        return False


def _tidy(alpha: float) -> float | int:
    """Return alpha as an int where it is one, for a config that reads like everybody else's."""
    return int(alpha) if alpha == int(alpha) else alpha
