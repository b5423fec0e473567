"""Rank, alpha and scale of PEFT's LoRA family: reading the rules, and writing them so that they reload."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
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

    Raises FormatError when the config promises another rank for this module, or there is none.
    """
    if rank < 1:
        raise FormatError(f"{module}: rank {rank} has no scale")
    promised = pattern(config.get("rank_pattern"), module, config.get("r"))
    if promised is not None and int(number(config, "r", promised)) != rank:
        raise FormatError(f"{module}: adapter_config.json says rank {promised}, lora_A has rank {rank}")
    alpha = number(config, "lora_alpha", pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def rules(modules: Mapping[str, tuple[int, float]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields that give every module its (rank, scale): r, lora_alpha, patterns, use_rslora.

    Rules of `config` that already say so are returned unchanged. Otherwise r is the largest rank (what vLLM reads),
    alpha = scale * r is never rounded, rsLoRA is folded away, and patterns are full module paths. Where one path is
    the tail of another, or holds regular-expression characters, patterns are anchored and escaped.
    """
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    if config.get("r") is not None and says(modules, config):
        return {f: config[f] for f in fields if f in config}
    r = max((k for k, _ in modules.values()), default=1)
    # the commonest scale, not the commonest alpha: after a truncation ranks differ and scales are all 1
    common = Counter(s for _, s in modules.values()).most_common(1)
    s = common[0][0] if common else 1.0
    rest = {m: (k, f) for m, (k, f) in modules.items() if k != r or f * k != s * r}
    name = (lambda m: f"^{re.escape(m)}") if _ambiguous(rest, modules) else (lambda m: m)
    return {"r": r, "lora_alpha": _tidy(s * r), "use_rslora": False,
            "rank_pattern": {name(m): k for m, (k, _) in rest.items() if k != r},
            "alpha_pattern": {name(m): _tidy(f * k) for m, (k, f) in rest.items() if f * k != s * r}}


def _ambiguous(patterns: Iterable[str], modules: Iterable[str]) -> bool:
    """Return whether a path taken as a pattern fits any other module: as its tail, or through a wildcard dot."""
    by_end: dict[tuple[int, str], list[str]] = {}
    for p in patterns:
        if re.fullmatch(r"[\w.-]+", p) is None:
            return True
        by_end.setdefault((len(p), p.rpartition(".")[2]), []).append(p)
    for module in modules:
        for (length, end), group in by_end.items():
            whole = length == len(module) or (length < len(module) and module[-length - 1] == ".")
            if whole and module.endswith(end) and any(p != module and fits(p, module) for p in group):
                return True
    return False


def says(modules: Mapping[str, tuple[int, float]], config: Mapping[str, Any]) -> bool:
    """Return whether `config` gives exactly these ranks, and these scales up to the rounding of one division."""
    try:
        return all(math.isclose(scale(config, m, rank), s, rel_tol=1e-15) for m, (rank, s) in modules.items())
    except FormatError:
        return False


def _tidy(alpha: float) -> float | int:
    """Return alpha as an int where it is one, for a config that reads like everybody else's."""
    return int(alpha) if alpha == int(alpha) else alpha
