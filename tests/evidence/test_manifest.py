"""The manifest: what its lines say, and what becomes of one that was cut short."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from adaptc.errors import FormatError, UsageError
from adaptc.evidence.manifest import Manifest, manifest_of, read_manifest, summary

DONE = {"status": "done", "name": "a", "stamp": "1", "hash": "h", "output": "a", "bytes_after": 3, "error": 0.5}


def test_lines_are_read_back_and_a_cut_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    with Manifest(path) as manifest:
        manifest.append(DONE)
        manifest.append({"status": "started", "name": "b", "clear": True})
    with path.open("ab") as f:
        f.write(b'{"status": "done", "na')
    assert set(read_manifest(path).latest) == {"a"}
    with Manifest(path) as manifest:
        manifest.append(DONE | {"name": "c"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_an_output_is_ours_when_a_run_made_it_or_was_killed_making_it(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m") as manifest:
        history = manifest.history
        manifest.append({"status": "started", "name": "a", "clear": True})
        assert history.ours("a")  # killed here, it may lie there
        manifest.append({"status": "failed", "name": "a", "reason": "no"})
        assert not history.ours("a")
        manifest.append({"status": "started", "name": "b", "clear": False})
        assert not history.ours("b")
        manifest.append(DONE)
        manifest.append({"status": "failed", "name": "a", "reason": "changed, and broken"})
        assert history.ours("a")
        assert history.latest["a"]["status"] == "failed"


def test_a_touched_input_keeps_its_figures(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m") as manifest:
        manifest.append(DONE)
        manifest.append({"status": "same", "name": "a", "stamp": "2"})
        assert manifest.history.finished["a"] == DONE | {"stamp": "2"}


def test_two_runs_do_not_share_one(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m"), pytest.raises(UsageError, match="in use, another run"):
        Manifest(tmp_path / "m")
    with Manifest(tmp_path / "m"):
        pass


def test_what_is_no_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"status": "run"}\n[1]\n')
    with pytest.raises(FormatError, match="line 2 is no JSON object"), manifest_of(str(tmp_path)):
        pass
    assert (tmp_path / "manifest.jsonl").read_text() == '{"status": "run"}\n[1]\n'


def test_summary_has_a_row_for_each(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m") as manifest:
        manifest.append(DONE)
        manifest.append({"status": "failed", "name": "0, \"x\"", "reason": "a, b"})
        rows = list(csv.DictReader(summary(manifest.history).splitlines()))
    assert [(r["name"], r["status"], r["reason"]) for r in rows] == [('0, "x"', "failed", "a, b"), ("a", "done", "")]


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with manifest_of(str(tmp_path / "out")):
            raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        stopped()
    assert list(tmp_path.iterdir()) == []
