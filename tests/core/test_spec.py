"""The written form of passes: parse(str(p)) == p, values fitted to their fields, places named where reading stops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptc.errors import UsageError
from adaptc.passes import Change, Pass
from adaptc.pipeline import Pipeline
from adaptc.registry import PASSES
from adaptc.spec import build, parse
from adaptc.squeeze.truncate import Truncate


@dataclass(frozen=True, kw_only=True)
class Probe(Pass):
    """Has an option of every type."""

    name: ClassVar[str] = "probe-1"
    text: str = ""
    maybe: str | None = None
    whole: int = 0
    part: float | None = None
    switch: bool = False
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] | None = None
    size: int | None = field(default=None, metadata={"unit": "bytes"})
    anything: Any = None

    def delta(self, key: str, delta: Any, setting: Any) -> Change:
        """Change nothing."""
        return Change(delta)


@pytest.fixture(autouse=True)
def _probe() -> Iterator[None]:
    PASSES._loaded["probe-1"] = Probe
    yield
    del PASSES._loaded["probe-1"]


ODD = ["true", "null", "1", "1e3", "NaN", "-Infinity", "2MiB", "a,b", "}", "a=b", '"', "\\", "[", " x", "q_proj",
       "*.mlp.*", "é", "\u2028", "\x1f", "\ud800"]
TEXT = st.one_of(st.text(), st.sampled_from(ODD))
FLOATS = st.floats(allow_nan=False)
PROBES = st.builds(
    Probe, text=TEXT, maybe=st.none() | TEXT, whole=st.integers(), part=st.none() | FLOATS, switch=st.booleans(),
    names=st.lists(TEXT, max_size=3).map(tuple), counts=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    size=st.none() | st.integers(1), include=st.lists(TEXT, max_size=2).map(tuple),
    anything=st.recursive(st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
                          lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6))


@settings(max_examples=150, deadline=None)
@given(PROBES)
def test_parse_inverts_print(step):
    assert parse(str(step)) == (step,)


@settings(max_examples=50, deadline=None)
@given(st.lists(PROBES, min_size=1, max_size=3), st.sampled_from([",", " , ", ";", " | ", ",\n"]))
def test_pipelines_round_trip(steps, joint):
    assert parse(joint.join(map(str, steps))) == tuple(steps)
    assert parse(str(Pipeline(tuple(steps)))) == tuple(steps)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='probe-1{}[]=,;"\\ atruncze8.'))
def test_any_text_is_passes_or_a_usage_error(text):
    try:
        steps = parse(text)
    except UsageError:
        return
    assert parse(",".join(map(str, steps))) == steps


@pytest.mark.parametrize("step", [
    Truncate(rank=8), Truncate(energy=0.99), Truncate(max_error=0.05, dtype="fp16", include=("q_proj", "*.mlp.*")),
    Truncate(size=2 * 2**20, fit="vllm"), Truncate(rank=3, method="rsvd", oversample=0, power=1, seed=-1),
])
def test_truncate_round_trips(step):
    assert parse(str(step)) == (step,)


def test_defaults_are_not_printed():
    assert str(Truncate(rank=8)) == "truncate{rank=8}"
    assert str(Probe()) == "probe-1"
    assert str(Probe(text="a b", names=("x", "1"))) == 'probe-1{text="a b",names=[x,"1"]}'


@pytest.mark.parametrize(("options", "fitted"), [
    ({"part": 1}, Probe(part=1.0)), ({"names": "one"}, Probe(names=("one",))), ({"names": ["a"]}, Probe(names=("a",))),
    ({"counts": 3}, Probe(counts=(3,))), ({"size": "1.5KiB"}, Probe(size=1536)), ({"size": 7}, Probe(size=7)),
])
def test_values_fit_their_fields(options, fitted):
    made = build("probe-1", options)
    assert made == fitted
    assert type(made.part) is type(fitted.part)


@pytest.mark.parametrize(("options", "said"), [
    ({"whole": 1.5}, "probe-1 option whole is 1.5, expected a whole number"),
    ({"whole": True}, "option whole is True, expected a whole number"),
    ({"switch": 1}, "option switch is 1, expected true or false"),
    ({"text": 3}, "option text is 3, expected a text"), ({"whole": None}, "option whole is None"),
    ({"part": "half"}, "option part is 'half', expected a number"),
    ({"names": ["a", 1]}, "option names holds 1, expected a text"), ({"size": "2M"}, "could mean 2MB or 2MiB"),
    ({"nams": "a"}, "probe-1 has no option nams"),
])
def test_values_that_do_not_fit(options, said):
    with pytest.raises(UsageError) as caught:
        build("probe-1", options)
    assert said in str(caught.value)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UsageError, match="pass truncat is not known") as caught:
        parse("truncat{rank=8}")
    assert caught.value.hint.startswith("nearest: truncate")
    with pytest.raises(UsageError) as caught:
        parse("truncate{rnak=8}")
    assert caught.value.hint.startswith("nearest: rank")


@pytest.mark.parametrize(("text", "place"), [
    ("", "nothing at column 1, expected a pass name"),
    ("truncate{rank=8", "nothing at column 16, expected a comma or }"),
    ("truncate{rank}", "'}' at column 14, expected = after rank"), ("truncate{rank=8} truncate", "'t' at column 18"),
    ("probe-1{names=[a b]}", "'b' at column 18, expected a comma or ]"), ('probe-1{text="a}', "string is not closed"),
    ("truncate{rank=8},", "nothing at column 18, expected a pass name"), ("truncate{=8}", "'=' at column 10"),
    ("truncate{rank=}", "'}' at column 15, expected a value"),
])
def test_the_place_where_reading_stopped(text, place):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert place in str(caught.value)
