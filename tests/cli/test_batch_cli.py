"""adaptc batch on the command line: a library in, a mirrored tree and a manifest out."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptc.cli.main import main
from adaptc.cli.pace import clock, pace
from adaptc.cli.render import Voice

RECIPE = '[[step]]\npass = "truncate"\nrank = 2\n'


@pytest.fixture
def library(make):
    Path("recipe.toml").write_text(RECIPE)
    Path("library").mkdir()
    for i in range(3):
        make(f"library/a{i}", seed=i)
    return Path("library")


def test_first_run_second_run_and_a_failure(adaptc, library):
    said = adaptc("batch", "recipe.toml", "library/**/", "-o", "out/", "--engine", "serial")
    assert said.code == 0, said.err
    assert said.err == ""
    assert "wrote 3 adapters to out/, " in said.out
    again = adaptc("batch", "recipe.toml", "library/**/", "-o", "out", "--json")
    assert (again.code, again.data["done"], again.data["already"]) == (0, 0, 3)
    file = library / "a1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    third = adaptc("batch", "recipe.toml", "library/**/", "-o", "out", "--engine", "serial")
    assert third.code == 1
    assert "! " in third.out
    assert "library/a1: adapter_model.safetensors: truncated" in third.out
    rows = {r["name"]: r for r in csv.DictReader(Path("out/summary.csv").read_text().splitlines())}
    assert {n: r["status"] for n, r in rows.items()} == {"a0": "done", "a1": "failed", "a2": "done"}
    data = adaptc("batch", "recipe.toml", "library", "-o", "out", "--engine", "serial", "--json")
    assert data.code == 1
    assert [f["name"] for f in data.data["failures"]] == ["a1"]


def test_dry_run_lists_and_touches_nothing(adaptc, library):
    said = adaptc("batch", "recipe.toml", "library/**/", "-o", "out", "--dry-run")
    assert said.code == 0
    size = sum(p.stat().st_size for p in library.rglob("*") if p.is_file())
    assert "would run truncate{rank=2} on 3 adapters" in said.out
    assert not Path("out").exists()
    data = adaptc("batch", "recipe.toml", "library/**/", "-o", "out", "--dry-run", "--json").data
    assert (data["todo"], data["done"], data["bytes"]) == (3, 0, size)
    assert [a["name"] for a in data["adapters"]] == ["a0", "a1", "a2"]
    adaptc("batch", "recipe.toml", "library/a0", "-o", "out", "--root", "library", "--engine", "serial")
    data = adaptc("batch", "recipe.toml", "library/**/", "-o", "out", "--dry-run", "--json").data
    assert [a["todo"] for a in data["adapters"]] == [False, True, True]


@pytest.mark.parametrize(("args", "code", "said"), [
    (("truncte", "library"), 2, "pass truncte is not known"), (("truncate{rnk=2}", "library"), 2, "nearest: rank"),
    (("recipe.toml", "empty"), 2, "empty holds no adapter file"), (("none.toml", "library"), 2, "does not exist"),
    (("recipe.toml", "library", "--to", "keft"), 2, "dialect keft is not known"),
    (("recipe.toml", "library", "--address", "x:1"), 2, "--address goes with --engine ray"),
    (("recipe.toml", "library", "--base", "no"), 2, "base no does not exist"),
    (("recipe.toml", "library", "--engine", "ray", "--address", "127.0.0.1:9"), 1, "cannot be reached"),
])
def test_bad_requests_are_one_line_and_leave_nothing(args, code, said, adaptc, library):
    if "ray" in args:
        pytest.importorskip("ray")
    Path("empty").mkdir()
    result = adaptc("batch", *args, "-o", "out")
    assert result.code == code
    assert said in result.err
    assert sum(not line.startswith("  hint") for line in result.err.splitlines()) == 1
    assert not Path("out").exists()


def test_termination_leaves_nothing_half_written(make):
    make("big", layers=400)
    script = "import sys; from adaptc.cli.main import main; sys.exit(main())"
    run = subprocess.Popen([sys.executable, "-c", script, "compress", "big", "-o", "new/out", "--rank", "2"],
                           stderr=subprocess.PIPE, text=True)
    while not list(Path().rglob(".adaptc-*")) and run.poll() is None:
        time.sleep(0.0005)
    run.send_signal(signal.SIGTERM)
    err = run.communicate()[1]
    if run.returncode == 0:
        pytest.skip("it was done before the signal arrived")
    assert (run.returncode, err.strip()) == (143, "adaptc: terminated")
    assert sorted(os.listdir()) == ["big"]


def test_main_in_process_keeps_the_signal_handlers_of_its_caller():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_pace_tells_a_log_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("adaptc.cli.pace.time.monotonic", lambda: now[0])
    with pace(Voice(), 4, 400, "adapters") as step:
        for at, wrong in ((10.0, False), (40.0, True)):
            now[0] = at
            step(100, wrong)
    assert capsys.readouterr().err == "adaptc: 2/4 adapters, 1 failed, 0.05/s, 40 s left\n"
    assert [clock(s) for s in (3.2, 61, 7500)] == ["3 s", "1 min 01 s", "2 h 05 min"]
