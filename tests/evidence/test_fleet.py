"""A fleet: every adapter once, whole or not at all, whatever stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from libraries import suicidal, tree, write_kohya, write_library, write_peft

import adaptc
from adaptc.adapter import same
from adaptc.errors import NeedsError, UsageError
from adaptc.evidence import fleet
from adaptc.evidence.fleet import Lost, Plan, Serial, order_of, plan, run
from adaptc.evidence.fleet_find import find
from adaptc.evidence.fleet_local import Local
from adaptc.evidence.fleet_paths import STAGING
from adaptc.evidence.fleet_work import Result, process
from adaptc.evidence.manifest import history_of, manifest_of

SPEC = "truncate{rank=2}"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_library(Path("library"))


def planned(spec: str = SPEC, source: str = "library/**/", out: str = "out", **how: bool) -> Plan:
    return plan(find([source], out), order_of(spec), out, history_of(out), **how)


def batch(spec: str = SPEC, source: str = "library/**/", out: str = "out", engine: fleet.Engine | None = None,
          **how: bool) -> dict[str, Result]:
    with manifest_of(out) as manifest, engine or Serial() as workers:
        found = plan(find([source], out), order_of(spec), out, manifest.history, **how)
        return {r.name: r for r in run(found, out, manifest, workers)}


def statuses(results: dict[str, Result]) -> dict[str, str]:
    return {name: r.status for name, r in results.items()}


def test_outputs_are_what_run_makes_of_each(library: Path) -> None:
    results = batch()
    assert set(statuses(results).values()) == {"done"}
    assert tree(Path("out")) == {
        "manifest.jsonl", "summary.csv", "loose/style.safetensors",
        *(f"{n}/adapter_{f}" for n in ("de/a1", "en/a0", "en/a2") for f in ("model.safetensors", "config.json"))}
    for name, result in results.items():
        expected = adaptc.run(adaptc.load(result.input), SPEC)
        assert same(adaptc.load(Path("out") / result.output), expected)
        assert result.error == pytest.approx(adaptc.diff(adaptc.load(result.input), expected).error, rel=1e-9)
        made = [p for p in [Path("out") / result.output, *(Path("out") / result.output).rglob("*")] if p.is_file()]
        assert result.bytes_after == sum(p.stat().st_size for p in made), name


def test_codes_become_containers(library: Path) -> None:
    results = batch("quantize{bits=3}")
    assert {r.output for r in results.values()} == {"de/a1", "en/a0", "en/a2", "loose/style.adaptc.safetensors"}
    assert all(adaptc.load(Path("out") / r.output).origin.container == "adaptc" for r in results.values())


def test_what_is_done_is_not_done_again(library: Path) -> None:
    batch()
    assert batch() == {}
    assert len(planned(verify=True).todo) == 4  # contents are compared by those who read them
    assert set(statuses(batch(verify=True)).values()) == {"same"}
    os.utime(library / "en" / "a0" / "adapter_model.safetensors", (1, 1))
    assert statuses(batch()) == {"en/a0": "same"}
    assert batch() == {}
    write_peft(Path("new"), seed=9)
    (Path("new") / "adapter_model.safetensors").replace(library / "en" / "a0" / "adapter_model.safetensors")
    assert statuses(batch()) == {"en/a0": "done"}
    assert same(adaptc.load("out/en/a0"), adaptc.run(adaptc.load("library/en/a0"), SPEC))


def test_outputs_that_are_gone_or_damaged_are_made_again(library: Path) -> None:
    results = batch()
    Path("out/loose/style.safetensors").unlink()
    file = Path("out/en/a2/adapter_model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert statuses(batch()) == {"loose/style": "done", "en/a2": "done"}
    assert file.read_bytes() == whole
    file.write_bytes(bytes(len(whole)))
    assert batch() == {}
    again = batch(verify=True)
    assert statuses(again) == {"de/a1": "same", "en/a0": "same", "en/a2": "done", "loose/style": "same"}
    assert file.read_bytes() == whole
    assert again["en/a2"].output_hash == results["en/a2"].output_hash


def test_one_failure_stops_no_other_and_is_tried_again(library: Path) -> None:
    file = library / "de" / "a1" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    write_kohya(library / "loose" / "bad.safetensors").write_bytes(b"")
    results = batch()
    assert statuses(results) == {"de/a1": "failed", "en/a0": "done", "en/a2": "done", "loose/bad": "failed",
                                 "loose/style": "done"}
    assert results["de/a1"].reason.startswith("adapter_model.safetensors: truncated, header promises")
    assert results["loose/bad"].reason == "bad.safetensors: file is empty"
    assert not Path("out/de").exists()
    file.write_bytes(whole)
    assert statuses(batch()) == {"de/a1": "done", "loose/bad": "failed"}


def test_a_bug_is_a_failure_of_that_adapter(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, source: object) -> None:
        raise ZeroDivisionError("1/0")

    monkeypatch.setattr("adaptc.formats.kohya.Kohya.read", broken)
    results = batch()
    assert results["loose/style"].reason == "internal error, please report it: ZeroDivisionError: 1/0"
    assert [r.status for r in results.values()].count("done") == 3


def test_foreign_outputs_stay_unless_forced(library: Path) -> None:
    Path("out/loose").mkdir(parents=True)
    Path("out/loose/style.safetensors").write_bytes(b"mine")
    for _ in range(2):
        results = batch()
        assert results["loose/style"].status == "failed"
        assert "exists" in results["loose/style"].reason
    assert Path("out/loose/style.safetensors").read_bytes() == b"mine"
    assert statuses(batch(force=True)) == dict.fromkeys(["de/a1", "en/a0", "en/a2", "loose/style"], "done")


def test_another_recipe_is_refused_in_the_same_folder(library: Path) -> None:
    batch()
    with pytest.raises(UsageError, match=r"out holds 4 outputs of another recipe or version \(truncate\{rank=2\}"):
        batch("truncate{rank=1}")
    assert adaptc.load("out/en/a0").deltas["model.layers.0.self_attn.q_proj.weight"].rank == 2
    assert len(batch("truncate{rank=1}", force=True)) == 4
    assert adaptc.load("out/en/a0").deltas["model.layers.0.self_attn.q_proj.weight"].rank == 1
    Path("out/en/a2/notes").write_text("mine")
    results = batch("quantize{bits=3}", force=True)  # replaces what a run made, and nothing else
    assert statuses(results) == {"de/a1": "done", "en/a0": "done", "en/a2": "failed", "loose/style": "done"}
    assert "which overwriting it would delete" in results["en/a2"].reason
    assert "out/en/a2/notes" in {f"out/{p}" for p in tree(Path("out"))}


@pytest.mark.parametrize(("spec", "error", "said"), [
    ("truncte{rank=2}", UsageError, "pass truncte is not known"),
    ("truncate{rnk=2}", UsageError, "truncate has no option rnk"),
    ("merge", UsageError, "merge takes several adapters"), ("resolve", NeedsError, "resolve needs base"),
])
def test_recipes_are_checked_before_anything_is_read(spec: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        order_of(spec)


def test_a_worker_that_is_killed_costs_its_adapter_only(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "process", suicidal)
    first = batch(engine=Local(1))
    assert statuses(first) == {"de/a1": "failed", "en/a0": "done", "en/a2": "done", "loose/style": "done"}
    assert first["de/a1"].reason == "the worker process was ended by SIGKILL, likely out of memory"
    monkeypatch.undo()
    os.chdir(library.resolve().parent)
    assert not Path("out", STAGING).exists()


KILLED = """
import sys
from pathlib import Path
from adaptc.cli.main import main
raise SystemExit(main(["batch", sys.argv[1], "library/**/", "-o", "out", "--jobs", "1"]))
"""


def test_a_killed_run_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        write_peft(Path("library") / f"a{i:02}", seed=i, layers=40)
    run_ = subprocess.Popen([sys.executable, "-c", KILLED, "truncate{rank=2}"], stdout=subprocess.DEVNULL)
    manifest = Path("out/manifest.jsonl")
    lines: list[dict[str, str]] = []
    while sum(line["status"] == "done" for line in lines) < 3:
        assert run_.poll() is None
        time.sleep(0.01)
        lines = [json.loads(s) for s in (manifest.read_bytes() if manifest.exists() else b"").split(b"\n")[:-1]]
    run_.send_signal(signal.SIGKILL)
    run_.wait()
    before = history_of("out")
    finished = {n: Path("out", n, "adapter_model.safetensors").stat().st_mtime_ns for n in before.finished}
    for n in before.finished:
        adaptc.load(Path("out", n))
    results = batch()
    assert set(results) == {f"a{i:02}" for i in range(20)} - set(finished)
    assert set(statuses(results).values()) == {"done"}
    assert {n: Path("out", n, "adapter_model.safetensors").stat().st_mtime_ns for n in finished} == finished
    assert not any(".adaptc-" in p for p in tree(Path("out")))
    started = [json.loads(s)["name"] for s in manifest.read_text().splitlines() if '"started"' in s]
    assert len(started) <= 20 + 1  # at most what the one worker held is begun twice


def test_lost_jobs_are_failures(library: Path) -> None:
    class Losing(Serial):
        def map(self, work, jobs):
            for job in jobs:
                yield job, Lost("the node is gone") if job.name == "en/a2" else work(job)

    results = batch(engine=Losing())
    assert results["en/a2"].reason == "the node is gone"
    assert history_of("out").latest["en/a2"]["reason"] == "the node is gone"


def test_process_never_raises(library: Path) -> None:
    job = planned().todo[0]
    gone = process(type(job)(**{**{f: getattr(job, f) for f in job.__slots__}, "input": str(library / "gone")}))
    assert gone.status == "failed"
    other = process(type(job)(**{**{f: getattr(job, f) for f in job.__slots__}, "version": "0"}))
    assert "the run was started by 0" in other.reason
