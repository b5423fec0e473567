"""The JSON beside an adapter: bounded in size, depth and digits, with the fields readers rely on of the right type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptc.errors import FormatError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 20  # of an integer; 64 bits have 20
# Fields that readers walk through; null is always allowed, other fields may be anything.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "peft_type": (str,), "fine_tune_type": (str,), "base_model_name_or_path": (str,), "model": (str,),
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "lora_parameters": (dict,), "target_parameters": (list,),
    "modules_to_save": (list, str), "trainable_token_indices": (list, dict), "token_indices": (list, dict),
}


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in `path`. Raises FormatError for what is no JSON, too big, too deep, or mistyped."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise FormatError(f"{path.name} has {size} bytes, the limit is {MAX_BYTES}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FormatError(f"{path.name} is not JSON: not UTF-8") from e
    return parse_config(text, path.name)


def parse_config(text: str, name: str, depth: int = MAX_DEPTH) -> Mapping[str, Any]:
    """Return `text` as a config object; `name` is what messages call it. Raises FormatError as `read_config` does."""
    try:
        config = json.loads(text, parse_int=_whole)
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair cannot be written or shown
    except UnicodeEncodeError as e:
        raise FormatError(f"{name} holds half a surrogate pair") from e
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{name} is not JSON") from e
    if not isinstance(config, dict):
        raise FormatError(f"{name} is not a JSON object")
    if deeper(config, depth):
        raise FormatError(f"{name} is nested deeper than {depth} levels")
    for field, types in _TYPES.items():
        value = config.get(field)
        if value is not None and not isinstance(value, types):
            wanted = " or ".join({"str": "text", "dict": "an object", "list": "a list"}[t.__name__] for t in types)
            raise FormatError(f"{field} in {name} is {str(value)[:40]!r}, not {wanted}")
    for field in ("trainable_token_indices", "token_indices"):
        value = config.get(field) or []
        for rows in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(rows, list) or not all(type(i) is int and i >= 0 for i in rows):
                raise FormatError(f"{field} in {name} lists {str(rows)[:40]!r}, not row numbers")
    return config


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def deeper(value: Any, limit: int) -> bool:
    """Return whether a JSON `value` nests more than `limit` levels, walking level by level."""
    level = [value]
    for _ in range(limit):
        level = [v for parent in level if isinstance(parent, (dict, list))
                 for v in (parent.values() if isinstance(parent, dict) else parent)]
        if not level:
            return False
    return True
