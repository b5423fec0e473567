"""Module patterns out of configs, matched in bounded time: a file must not be able to stall its reader.

Plain module paths are compared directly. Anything else is parsed by `re` itself and run on sets of positions, kept as
the bits of one integer: a character moves all of them one step, a repeat grows the set until nothing is new. There is
no backtracking, so "(a+)+$", which costs a backtracking matcher 2^n steps, costs n; a budget of steps bounds the rest.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import lru_cache
from typing import Any

from adaptc.errors import FormatError

MAX_PATTERN = 1000  # characters
MAX_STEPS = 20_000  # nodes visited in one match; a pattern of a real config takes a few hundred
_PLAIN = re.compile(r"[\w.-]+")
_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.MULTILINE | re.ASCII | re.LOCALE
_sre: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def fits(pattern: str, module: str) -> bool:
    """Return re.match(rf"(.*\\.)?({pattern})$", module) as a truth value, PEFT's rule for rank and alpha patterns.

    Raises FormatError for what is no regular expression, is too long or too costly, or uses flags, back references,
    look-behind or possessive groups (which PEFT would run and no module path needs).
    """
    if _PLAIN.fullmatch(pattern):
        tail = module[-len(pattern):]
        whole = len(tail) == len(module) or module[-len(pattern) - 1] == "."
        return len(tail) == len(pattern) and whole and all(p in (".", c) for p, c in zip(pattern, tail, strict=True))
    try:
        return bool(_Match(pattern, module).sequence(_parsed(pattern), 1) >> len(module) & 1)
    except RecursionError as e:
        raise FormatError(f"pattern {pattern!r} in adapter_config.json nests too deeply") from e


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Any:
    if len(pattern) > MAX_PATTERN:
        raise FormatError(f"a pattern in adapter_config.json has {len(pattern)} characters, the limit is {MAX_PATTERN}")
    try:
        tree = _sre.parse(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as e:
        raise FormatError(f"pattern {pattern!r} in adapter_config.json is not a regular expression") from e
    if tree.state.flags & _FLAGS:
        raise FormatError(f"pattern {pattern!r} in adapter_config.json sets flags, which no module path needs")
    return tree


class _Match:
    """One pattern on one text. Sets of positions are integers: bit p stands for "p characters are consumed"."""

    def __init__(self, pattern: str, text: str) -> None:
        self.pattern, self.text, self.steps = pattern, text, 0

    def sequence(self, nodes: Any, at: int) -> int:
        """Return the ends of `nodes` run one after another from every position in `at`."""
        for op, arg in nodes:
            if not at:
                break
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise FormatError(f"pattern {self.pattern!r} in adapter_config.json takes more than {MAX_STEPS} steps")
            at = self.node(str(op), arg, at)
        return at

    def node(self, op: str, arg: Any, at: int) -> int:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            one = tuple(arg) if op == "IN" else arg
            return sum(2 << p for p, c in enumerate(self.text) if at >> p & 1 and _single(op, one, c))
        if op == "BRANCH":
            ends = 0
            for branch in arg[1]:
                ends |= self.sequence(branch, at)
            return ends
        if op == "SUBPATTERN" and not arg[1] and not arg[2]:  # no flags of its own
            return self.sequence(arg[3], at)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = arg
            return self.repeat(low, high, body, at)
        if op in ("ASSERT", "ASSERT_NOT") and arg[0] == 1:  # look-ahead
            wanted = op == "ASSERT"
            return sum(1 << p for p in _bits(at) if bool(self.sequence(arg[1], 1 << p)) == wanted)
        if op == "AT":
            return sum(1 << p for p in _bits(at) if self.anchored(str(arg), p))
        raise FormatError(f"pattern {self.pattern!r} in adapter_config.json uses {op.lower()}, which is not read here")

    def repeat(self, low: int, high: int, body: Any, at: int) -> int:
        """Return the ends after low to high rounds; a round that changes nothing ends it, later ones would repeat."""
        rounds = 0
        while rounds < low and at:
            after = self.sequence(body, at)
            rounds = low if after == at else rounds + 1
            at = after
        seen = new = at
        while rounds < high and new:
            new = self.sequence(body, new) & ~seen
            seen, rounds = seen | new, rounds + 1
        return seen

    def anchored(self, what: str, p: int) -> bool:
        if what in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return p == 0
        if what in ("AT_END", "AT_END_STRING"):
            return p == len(self.text)
        word = [0 <= i < len(self.text) and (self.text[i].isalnum() or self.text[i] == "_") for i in (p - 1, p)]
        return (word[0] != word[1]) == (what == "AT_BOUNDARY")


def _bits(at: int) -> list[int]:
    return [p for p in range(at.bit_length()) if at >> p & 1]


@lru_cache(maxsize=65536)
def _single(op: str, arg: Any, c: str) -> bool:
    """Return whether one character fits one single-character node."""
    if op == "ANY":
        return c != "\n"
    if op != "IN":
        return bool(ord(c) == arg) == (op == "LITERAL")
    inside = any(_member(str(kind), value, c) for kind, value in arg)
    return inside != (str(arg[0][0]) == "NEGATE")


def _member(kind: str, value: Any, c: str) -> bool:
    if kind == "LITERAL":
        return bool(ord(c) == value)
    if kind == "RANGE":
        return bool(value[0] <= ord(c) <= value[1])
    if kind == "CATEGORY":
        found = re.match({"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}[str(value).split("_")[-1]], c)
        return bool(found) != ("NOT" in str(value))
    return False
