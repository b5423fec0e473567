"""Patterns against `re` itself, and without its bad days."""

from __future__ import annotations

import random
import re

import pytest

from adaptc.errors import FormatError
from adaptc.formats.patterns import fits

MODULES = ["model.layers.3.self_attn.q_proj", "a.b", "layers.10.mlp.up_proj", "x", "visual.blocks.3.attn.qkv", "aaa.aa",
           ""]
PATTERNS = [r"layers\.(3|10)\..*_proj", r"^model\..*q_proj$", r".*\.(q|k)_proj", r"[a-z]+\.b", "(a+)+", "(a|b|.)*?",
            r"(?!visual).*qkv", r"(?:[^.]+\.){2}[^.]*", r"\w+\d*", "a{2,3}.?a*", r"\bq_proj\b", r"[^\d]*", "q_proj",
            "x?", r"\Ax\Z", "self_attn.q_proj", "lf_attn.q_proj", "attn", r"(a*)*\.(a*)*", r"(?=.*qkv)visual.*",
            r"[^a-c.]+", "", "."]


def test_same_answer_as_re() -> None:
    source = random.Random(0)
    atoms = ["a", "b", ".", r"\.", "[ab]", "(a|b)", "(ab)*", "a+", "b?", "(a|ab)", "(a*b)*", "a{1,2}", "^", "$", r"\d",
             "[^a]", "(?=b)", "(?!b)", "(?:ab|b)+?", r"\W", r"\b"]
    patterns = PATTERNS + ["".join(source.choices(atoms, k=source.randint(1, 5))) for _ in range(400)]
    modules = MODULES + ["".join(source.choices("ab.1", k=source.randint(1, 8))) for _ in range(15)]
    wrong = [(p, m) for p in patterns for m in modules if fits(p, m) != bool(re.match(rf"(.*\.)?({p})$", m))]
    assert wrong == []


@pytest.mark.parametrize("pattern", ["(a+)+!", "(a|a)*!", "(.*)*(.*)*(.*)*(.*)*!", "((((a*)*)*)*)*!",
                                     "(a?){300}a{300}!", "(a{0,60000}){60000}!"])
def test_exponential_patterns_end(pattern: str) -> None:
    assert not fits(pattern, "a" * 300)  # a backtracking matcher would still be at it when the sun is cold


@pytest.mark.parametrize("pattern", ["*x", "(", "[", "a{2,1}", r"(.)\1", "(?i)x", "(?i:x)", "(?<=x)y", "x|" * 600,
                                     "(.*(?=.*(?=.*(?=.*!))))*"])
def test_refused(pattern: str) -> None:
    with pytest.raises(FormatError, match="adapter_config"):
        fits(pattern, "a" * 300)
