"""A short run of the fuzzer that `make check` runs for a minute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz_container", Path(__file__).parents[1] / "fuzz_container.py")
assert spec is not None
assert spec.loader is not None
fuzzer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzzer)


def test_broken_containers_are_adapters_or_refused() -> None:
    examples = 60
    assert 0 < fuzzer.fuzz(examples, 1) < examples


@pytest.mark.parametrize("number", range(len(fuzzer.BASES)))
def test_what_is_broken_was_sound(number: int) -> None:
    assert fuzzer.check(fuzzer.BASES[number])


def test_the_fuzzer_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets a KeyError through fails the run."""
    monkeypatch.setattr(fuzzer, "verify", lambda *args: {}["not there"])
    with pytest.raises(KeyError):
        fuzzer.check(fuzzer.BASES[0])
