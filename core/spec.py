"""The written form of passes: name{option=value,...}, several joined by commas. parse(print(p)) == p."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from adaptc.errors import UsageError

if TYPE_CHECKING:
    from adaptc.passes import Pass

_NAME = re.compile(r"\s*([A-Za-z][\w-]*)\s*")
_WORD = re.compile(r"[^\s,\[\]{}\"=]+")


def print_spec(name: str, options: Mapping[str, Any]) -> str:
    """Return `name` or `name{a=1,b="x y"}`."""
    if not options:
        return name
    return f"{name}{{{','.join(f'{k}={_print_value(v)}' for k, v in options.items())}}}"


def _print_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_print_value, value))}]"
    if isinstance(value, str) and _WORD.fullmatch(value) and isinstance(_word(value), str):
        return value
    return json.dumps(value)


def _word(text: str) -> Any:
    """Return the JSON value a bare word stands for, or the word itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse(text: str) -> tuple[Pass, ...]:
    """Return the passes that `text` names, in order. Raises UsageError with the place where reading stopped."""
    passes, at = [], 0
    while True:
        name, at = _match(_NAME, text, at, "a pass name")
        options: dict[str, Any] = {}
        if text[at : at + 1] == "{":
            options, at = _options(text, at + 1)
        passes.append(build(name, options))
        at = _skip(text, at)
        if at == len(text):
            return tuple(passes)
        if text[at] not in ",;|":
            raise UsageError(f"pass spec has {text[at]!r} at column {at + 1}, expected a comma: {text}")
        at += 1


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass registered as `name` with these options; an unknown option names the nearest."""
    from adaptc.registry import PASSES

    cls = PASSES.get(name)
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 3, 0.0)
            raise UsageError(f"{name} has no option {key}", hint=f"nearest: {', '.join(near)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    made: Pass = cls(**values)
    return made


def _options(text: str, at: int) -> tuple[dict[str, Any], int]:
    options: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at : at + 1] != "}":
        key, at = _match(_NAME, text, at, "an option name")
        if text[at : at + 1] != "=":
            raise UsageError(f"option {key} has no value in pass spec: {text}")
        options[key], at = _value(text, at + 1)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "}":
            raise UsageError(f"pass spec ends inside braces at column {at + 1}: {text}")
    return options, at + 1


def _value(text: str, at: int) -> tuple[Any, int]:
    at = _skip(text, at)
    if text[at : at + 1] == "[":
        items, at = [], _skip(text, at + 1)
        while text[at : at + 1] != "]":
            item, at = _value(text, at)
            items.append(item)
            at = _skip(text, at)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise UsageError(f"list is not closed at column {at + 1} of pass spec: {text}")
        return tuple(items), at + 1
    if text[at : at + 1] == '"':
        try:
            return json.JSONDecoder().raw_decode(text, at)
        except ValueError as e:
            raise UsageError(f"string is not closed at column {at + 1} of pass spec: {text}") from e
    word, at = _match(_WORD, text, at, "a value")
    return _word(word), at


def _match(pattern: re.Pattern[str], text: str, at: int, what: str) -> tuple[str, int]:
    found = pattern.match(text, at)
    if not found:
        raise UsageError(f"pass spec has no {what.split(' ', 1)[1]} at column {at + 1}: {text}")
    return found.group(found.re.groups), found.end()


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
