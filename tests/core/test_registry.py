"""Registries: one owner an id, unknown ids with the nearest, plugins that do not load."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from adaptc.errors import UsageError
from adaptc.registry import FORMATS, PASSES, Registry, nearest


def registry(monkeypatch, *entries: tuple[str, str]) -> Registry[object]:
    points = [EntryPoint(name, value, "adaptc.tests") for name, value in entries]
    monkeypatch.setattr("adaptc.registry.entry_points", lambda group: points if group == "adaptc.tests" else [])
    return Registry("adaptc.tests", "thing")


def test_classes_are_loaded_when_asked_for(monkeypatch):
    things = registry(monkeypatch, ("dict", "builtins:dict"), ("gone", "adaptc.nowhere:Thing"))
    assert things.ids() == ["dict", "gone"]
    assert things.get("dict") is dict
    with pytest.raises(UsageError, match=r"thing gone cannot be loaded from adaptc\.nowhere:Thing"):
        things.get("gone")


def test_unknown_id_names_the_nearest_three(monkeypatch):
    things = registry(monkeypatch, *((n, "builtins:dict") for n in ("kohya", "peft", "mlx", "diffusers")))
    with pytest.raises(UsageError, match="thing pfet is not known") as caught:
        things.get("pfet")
    assert caught.value.hint.startswith("nearest: peft, ")
    assert len(caught.value.hint.split(", ")) == 3
    with pytest.raises(UsageError, match="thing x is not known") as caught:
        Registry("adaptc.empty", "thing").get("x")
    assert caught.value.hint is None
    assert nearest("x", []) is None


def test_an_id_has_one_owner(monkeypatch):
    things = registry(monkeypatch, ("a", "builtins:dict"), ("a", "builtins:list"), ("b", "builtins:set"),
                      ("b", "builtins:set"))
    with pytest.raises(UsageError, match="thing a is claimed by builtins:dict and builtins:list"):
        things.get("a")
    assert things.get("b") is set  # the same package found twice on the path
    with pytest.raises(UsageError, match="thing b is already registered"):
        things.add("b", list)
    things.add("c", list)
    assert things.get("c") is list
    assert things.ids() == ["a", "b", "c"]


def test_installed_ids_match_their_classes():
    for registered in (PASSES, FORMATS):
        found = registered.items()
        assert found
        for id, cls in found:
            assert getattr(cls, "name", None) == id or getattr(cls, "id", None) == id
