"""The written form of passes: name{option=value,...}, several joined by commas. parse(print(p)) == p."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import Field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from adaptc.bytesize import read_nbytes
from adaptc.errors import UsageError
from adaptc.registry import PASSES, nearest

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
            raise _stopped(text, at, "a comma")
        at += 1


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass registered as `name` with these options.

    Lists become tuples, one value where a tuple is expected a tuple of one, whole numbers floats where a float is
    expected, and texts such as "2MiB" bytes for a field whose metadata has unit "bytes". Raises UsageError for an
    unknown option (naming the nearest), and for a value of another type than its field has.
    """
    cls = PASSES.get(name)
    known = {f.name: f for f in fields(cls) if f.init}
    hints = get_type_hints(cls)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"{name} has no option {key}", hint=nearest(key, list(known)))
        values[key] = _fitted(f"{name} option {key}", value, known[key], hints[key])
    made: Pass = cls(**values)
    return made


_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def _fitted(what: str, value: Any, field: Field[Any], hint: Any) -> Any:
    """Return `value` as the type its field has, or raise UsageError; types beyond the plain ones are not judged."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and field.metadata.get("unit") == "bytes":
        return read_nbytes(value)
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    many = next((t for t in allowed if get_origin(t) is tuple), None)
    if many is not None:
        items = value if isinstance(value, tuple) else (value,)
        inner = next((t for t in get_args(many) if t is not Ellipsis), object)
        wrong = [v for v in items if inner in _PLAIN and type(v) is not inner]
        if wrong:
            raise UsageError(f"{what} holds {wrong[0]!r}, expected {_PLAIN[inner]}")
        return items
    if any(t not in _PLAIN for t in allowed) or type(value) in allowed:
        return value
    if type(value) is int and float in allowed:
        return float(value)
    wanted = " or ".join(_PLAIN[t] for t in allowed if t is not NoneType)
    raise UsageError(f"{what} is {value!r}, expected {wanted}")


def _options(text: str, at: int) -> tuple[dict[str, Any], int]:
    options: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at : at + 1] != "}":
        key, at = _match(_NAME, text, at, "an option name")
        if text[at : at + 1] != "=":
            raise _stopped(text, at, f"= after {key}")
        options[key], at = _value(text, at + 1)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "}":
            raise _stopped(text, at, "a comma or }")
    return options, at + 1


def _value(text: str, at: int) -> tuple[Any, int]:
    at = _skip(text, at)
    if text[at : at + 1] == "[":
        at = _skip(text, at + 1)
        items = []
        while text[at : at + 1] != "]":
            item, at = _value(text, at)
            items.append(item)
            at = _skip(text, at)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise _stopped(text, at, "a comma or ]")
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
        raise _stopped(text, at, what)
    return found.group(found.re.groups), found.end()


def _stopped(text: str, at: int, expected: str) -> UsageError:
    found = repr(text[at]) if at < len(text) else "nothing"
    return UsageError(f"pass spec has {found} at column {at + 1}, expected {expected}: {text}",
                      hint="written as truncate{rank=8,include=[q_proj,v_proj]}")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
