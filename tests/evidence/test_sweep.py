"""sweep: points are the files that compress and quantize write, remembered by content; --until finds the smallest."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from adapters import words, write_lora
from small_models import write_model

import adaptc
from adaptc.adapter import tensors
from adaptc.cli.main import main
from adaptc.evidence import sweep
from adaptc.evidence.curve import Bound


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, an adapter and data."""
    at = tmp_path_factory.mktemp("sweep")
    write_model(at / "bert", "bert")
    write_lora(at / "lora", "bert", classes=3, seed=1, size=2.0)
    (at / "rows.tsv").write_text("".join(f"{words(4 + i % 5, i)}\t{i % 3}\n" for i in range(30)))
    return at


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The same in a folder of its own, the current one."""
    shutil.copytree(made, tmp_path / "s")
    monkeypatch.chdir(tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def adaptc_says(capsys):
    def call(*args):
        capsys.readouterr()
        code = main([str(a) for a in args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


COMMON = ("lora", "--base", "bert", "--data", "rows.tsv", "--bootstrap", "20")


def test_points_are_the_files_that_the_commands_write(place, adaptc_says):
    code, out, err = adaptc_says("sweep", *COMMON, "--ranks", "2,4", "--bits", "3", "--sizes", "1/2")
    assert code == 0, err
    data = json.loads((place / "lora.sweep.json").read_text())
    points = {p["label"]: p for p in data["points"]}
    assert list(points) == ["source", "rank 2", "rank 4", "3 bit", "1/2"]
    total = 4 * sum(t.numel() for d in adaptc.load("lora").deltas.values() for t in tensors(d).values()) + 4 * 51
    commands = {"rank 2": ("compress", "--rank", 2, "-o", "r2"),
                "3 bit": ("quantize", "--bits", 3, "-o", "b3.adaptc.safetensors"),
                "1/2": ("quantize", "--size", total // 2, "-o", "half.adaptc.safetensors")}
    for label, (name, *options) in commands.items():
        assert adaptc_says(name, "lora", *options, "-q")[0] == 0
        written = place / options[-1]
        nbytes = sum(f.stat().st_size for f in written.iterdir()) if written.is_dir() else written.stat().st_size
        assert points[label]["nbytes"] == nbytes
    code, out, _ = adaptc_says("eval", "lora", "r2", "b3.adaptc.safetensors", *COMMON[1:], "--json")
    assert code == 0
    for label, found in zip(("source", "rank 2", "3 bit"), json.loads(out)["adapters"], strict=True):
        assert {m["metric"]: m["value"] for m in found["metrics"]} == pytest.approx(
            {m: e["value"] for m, e in points[label]["metrics"].items()}, abs=1e-7)
    assert points["source"]["nbytes"] == sum(f.stat().st_size for f in (place / "lora").iterdir())
    a = [points[label]["metrics"]["accuracy"]["value"] for label in ("rank 2", "rank 4", "source")]
    assert data["aurac"]["log2"] == pytest.approx((a[0] + a[1]) / 4 + (a[1] + a[2]) / 4)
    assert data["aurac"]["ranks"] == [2, 4, 8]


def test_a_second_run_measures_only_what_is_new(place, adaptc_says, monkeypatch):
    asked = []
    real = sweep.evaluate
    monkeypatch.setattr(sweep, "evaluate", lambda loaded, rows, adapters, *rest: asked.append(list(adapters)) or real(
        loaded, rows, adapters, *rest))
    assert adaptc_says("sweep", *COMMON, "--ranks", "2", "-o", "a.json")[0] == 0
    assert asked == [["", "truncate{rank=2}"]]
    asked.clear()
    code, out, _ = adaptc_says("sweep", *COMMON, "--ranks", "2", "--bits", "1", "-o", "b.csv", "--cache",
                               "a.json.cache")
    assert code == 0
    assert asked == [["", "quantize{bits=1}"]]
    assert "2 of 3 points were measured before" in out
    rows = list(csv.DictReader((place / "b.csv").open()))
    assert [r["label"] for r in rows] == ["source", "rank 2", "1 bit"]
    asked.clear()
    assert adaptc_says("sweep", *COMMON, "--ranks", "2", "-o", "a.json", "--force")[0] == 0
    assert asked == []
    (place / "rows.tsv").write_text((place / "rows.tsv").read_text().replace("\t0", "\t1"))
    assert adaptc_says("sweep", *COMMON, "--ranks", "2", "-o", "a.json", "--force")[0] == 0
    assert asked == [["", "truncate{rank=2}"]]


def test_points_before_a_failure_are_kept(place, adaptc_says, monkeypatch):
    real, runs = sweep.evaluate, []

    def fails(*args):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sweep, "evaluate", fails)
    many = ("--bits", "1,2,3,4,5")
    assert adaptc_says("sweep", *COMMON, *many, "-o", "c.json")[0] == 130
    assert not (place / "c.json").exists()
    code, out, _ = adaptc_says("sweep", *COMMON, *many, "-o", "c.json")
    assert code == 0
    assert "4 of 6 points were measured before" in out
    assert len(runs) == 3


def test_until_writes_the_smallest_file_that_keeps_the_bound(place, adaptc_says):
    code, out, err = adaptc_says("sweep", *COMMON, "--until", "kl<0.05", "-o", "u.json")
    assert code == 0, err
    found = json.loads((place / "u.json").read_text())["until"]
    file = place / "lora.kl-below-0.05.adaptc.safetensors"
    assert found["file"] == file.name
    assert file.stat().st_size == found["point"]["nbytes"]
    tried = {p["setting"]: p["metrics"]["kl"]["value"] for p in found["tried"]}
    bits = found["point"]["setting"]
    assert tried[bits] == found["value"] < 0.05
    below = max(b for b in tried if b < bits)
    assert tried[below] >= 0.05
    assert bits / below == pytest.approx(2 ** (1 / 16), rel=1e-4)
    assert len(tried) <= 8
    code, out, _ = adaptc_says("eval", "lora", file.name, *COMMON[1:], "--json")
    kl = next(m["value"] for m in json.loads(out)["adapters"][1]["metrics"] if m["metric"] == "kl")
    assert kl == pytest.approx(found["value"], abs=1e-7)


def test_until_over_ranks_and_over_what_cannot_be(place, adaptc_says):
    code, _, err = adaptc_says("sweep", *COMMON, "--until", "kl<0.02", "--by", "rank", "-o", "r.json", "--save", "best")
    assert code == 0, err
    found = json.loads((place / "r.json").read_text())["until"]
    ranks = {p["setting"]: p["metrics"]["kl"]["value"] for p in found["tried"]}
    rank = found["point"]["setting"]
    assert ranks[rank] < 0.02
    assert rank == 1 or ranks[rank - 1] >= 0.02
    assert max(d.rank for d in adaptc.load("best").deltas.values()) == rank
    code, _, err = adaptc_says("sweep", *COMMON, "--until", "accuracy>1.5", "-o", "no.json")
    assert code == 2
    assert "accuracy>1.5 is not met at 8 bit" in err
    assert not (place / "no.json").exists()


def test_without_head_counts_deltas_alone(place, adaptc_says):
    assert adaptc_says("sweep", *COMMON, "--ranks", "2", "--without-head", "-o", "h.json")[0] == 0
    assert adaptc_says("sweep", *COMMON, "--ranks", "2", "-o", "w.json")[0] == 0
    bare, whole = (json.loads((place / f).read_text())["points"] for f in ("h.json", "w.json"))
    assert all(a["nbytes"] + 4 * 51 < b["nbytes"] for a, b in zip(bare, whole, strict=True))
    assert [p["metrics"]["accuracy"]["value"] for p in bare] == [p["metrics"]["accuracy"]["value"] for p in whole]
    made = sweep.without_head(adaptc.load("lora"))
    assert not made.replaced
    assert made.origin.config["modules_to_save"] is None


@pytest.mark.parametrize(("args", "code", "said"), [
    (("--ranks", "0"), 2, "ranks holds 0, expected whole numbers from 1"),
    (("--ranks", "two"), 2, "ranks 'two' are no numbers"),
    (("--ranks", "8,9"), 2, "every rank asked for is 8 or more"),
    (("--sizes", "1/x"), 2, "size '1/x' is no fraction"),
    (("--sizes", "40K"), 2, "could mean 40KB or 40KiB"),
    (("--sizes", "10B"), 2, "is below the smallest possible file"),
    (("--until", "kl"), 2, "'kl' is no bound"),
    (("--metric", "fame", "--ranks", "2"), 2, "metric fame is not known"),
    (("--until", "kl<1", "--save", "best"), 2, "best has no suffix"),
    (("--until", "kl<1", "--save", "lora/adapter_model.safetensors", "--force"), 2, "is the input"),
    (("-o", "out.txt"), 2, "out.txt is no table that can be written"),
])
def test_bad_requests_are_one_line(place, adaptc_says, args, code, said):
    found, _, err = adaptc_says("sweep", *COMMON, *args)
    assert (found, said in err.splitlines()[0]) == (code, True), err
    assert not list(place.glob("*.sweep.json"))


def test_a_search_takes_the_logarithm_of_its_range():
    class Fake(sweep.Bench):
        seen = 0

        def points(self, recipes, progress=None):
            (recipe,) = recipes
            self.seen += 1
            value = {"metric": "kl", "value": 1.0 / recipe.setting, "difference": None}
            return [sweep.Point("", recipe.spec, recipe.goal, recipe.setting, 1, 0.0, {"kl": value})]

    bench = Fake.__new__(Fake)
    tried = bench.search(Bound.parse("kl<=0.25"), "rank", 64)
    assert min(p.setting for p in tried if p.value("kl") <= 0.25) == 4
    assert bench.seen == 7
