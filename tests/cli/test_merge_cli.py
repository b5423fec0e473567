"""adaptc merge and adaptc compare as commands: exit codes, messages, reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.cli.main import main
from adaptc.cli.merge import short_names, split_weights
from adaptc.delta import LowRank
from adaptc.errors import UsageError


def write(path: Path, seed: int, rank: int = 3, shape: tuple[int, int] = (12, 10), **replaced: torch.Tensor) -> Path:
    g = torch.Generator().manual_seed(seed)
    deltas = {f"layers.{i}.q_proj.weight": LowRank(torch.randn(rank, shape[1], generator=g),
                                                   torch.randn(shape[0], rank, generator=g), None, 0.5, shape)
              for i in range(2)}
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
    return adaptc.save(Adapter(deltas, dict(replaced), Origin("peft", config, base_model="org/base")), path)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return str(write(tmp_path / "one", 1)), str(write(tmp_path / "two", 2, rank=2))


def test_merge_writes_what_it_reports(pair, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["merge", *pair, "-o", str(out), "--method", "ties", "--density", "0.7", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["written"] is True
    assert data["spec"] == "merge{method=ties,density=0.7,names=[one,two]}"
    assert [m["rank"] for m in data["modules"]] == [{"before": 3, "after": 3}] * 2
    assert data["bytes"]["after"] == sum(f.stat().st_size for f in out.iterdir())
    made = adaptc.load(out)
    expected = adaptc.merge([adaptc.load(p) for p in pair], method="ties", density=0.7)
    for key, delta in expected.deltas.items():
        assert torch.equal(made.deltas[key].dense(), delta.dense())


def test_weights_inline_and_listed_are_the_same(pair, tmp_path, capsys) -> None:
    one, two = pair
    assert main(["merge", f"{one}:0.7", f"{two}:-0.3", "-o", str(tmp_path / "a"), "-q"]) == 0
    assert main(["merge", one, two, "--weights", "0.7,-0.3", "-o", str(tmp_path / "b"), "-q"]) == 0
    assert capsys.readouterr().out == ""
    a, b = (adaptc.load(tmp_path / n) for n in "ab")
    assert all(torch.equal(a.deltas[k].dense(), b.deltas[k].dense()) for k in a.deltas)
    assert a.history[-1].spec == "merge{weights=[0.7,-0.3],names=[one,two]}"


def test_dry_run_and_size(pair, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["merge", *pair, "-o", str(out), "--size", "2200", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"]["after"] <= 2200
    assert data["written"] is False
    assert not out.exists()
    assert main(["merge", *pair, "-o", str(out), "--size", "2200", "-q"]) == 0
    assert sum(f.stat().st_size for f in out.iterdir()) == data["bytes"]["after"]


@pytest.mark.parametrize(("args", "code", "text"), [
    (["--rank", "0"], 2, "rank is 0, must be a whole number from 1"),
    (["--method", "ties", "--density", "0"], 2, "density is 0.0, must be above 0 and at most 1"),
    (["--weights", "1"], 2, "1 weight for 2 adapters"),
    (["--weights", "1,x"], 2, "weights are '1,x', must be numbers with commas between"),
    (["--method", "ties2"], 2, "merge method ties2 is not known"),
    (["--density", "0.5"], 2, "method exact has no density"),
    (["--heads", "third"], 2, "heads is third, must be first, drop, or an input (one, two)"),
])
def test_senseless_requests(pair, tmp_path, capsys, args, code, text) -> None:
    assert main(["merge", *pair, "-o", str(tmp_path / "out"), *args]) == code
    err = capsys.readouterr().err
    assert err.splitlines()[0] == f"adaptc: {text}"
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_inputs_that_do_not_fit(pair, tmp_path, capsys) -> None:
    wide = str(write(tmp_path / "wide", 3, shape=(12, 14)))
    headed = [str(write(tmp_path / f"head{i}", i, **{"score.weight": torch.full((2, 10), float(i))})) for i in (1, 2)]
    cases = [([pair[0], wide], 1, "layers.0.q_proj.weight: shape 12x10 in one, 12x14 in wide"),
             ([pair[0]], 2, "merge takes two adapters or more, got 1"),
             (headed, 1, "score.weight differs between head1 and head2"),
             ([pair[0], str(tmp_path / "nothing")], 2, None),
             ([f"{pair[0]}:0.5", pair[1]], 2, "1 of 2 inputs have a weight")]
    for sources, code, text in cases:
        got = main(["merge", *sources, "-o", str(tmp_path / "out")])
        err = capsys.readouterr().err
        if text is None:
            assert got in (1, 2)
            assert "nothing" in err
            continue
        assert (got, err.splitlines()[0]) == (code, f"adaptc: {text}")
        assert not (tmp_path / "out").exists()
    assert main(["merge", *headed, "-o", str(tmp_path / "out"), "--heads", headed[1], "-q"]) == 0
    assert float(adaptc.load(tmp_path / "out").replaced["score.weight"].max()) == 2.0


def test_an_input_is_never_the_output(pair, capsys) -> None:
    before = {f: f.read_bytes() for f in Path(pair[1]).iterdir()}
    assert main(["merge", *pair, "-o", pair[1], "--force"]) == 2
    assert {f: f.read_bytes() for f in Path(pair[1]).iterdir()} == before


def test_a_recipe_may_begin_with_merge(pair) -> None:
    out = adaptc.run([adaptc.load(p) for p in pair], "merge{method=knots},truncate{rank=1}")
    assert {d.rank for d in out.deltas.values()} == {1}  # type: ignore[union-attr]


def test_compare_as_table_json_and_plot(pair, tmp_path, capsys) -> None:
    assert main(["compare", *pair]) == 0
    text = capsys.readouterr().out
    assert "one ~ two" in text
    assert "q_proj" in text
    assert main(["compare", *pair, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["adapters"] == ["one", "two"]
    assert -1 <= data["total"][0]["cosine"] <= 1
    pytest.importorskip("matplotlib")
    plot = tmp_path / "map.png"
    assert main(["compare", *pair, pair[0], "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    before = plot.read_bytes()
    assert main(["compare", *pair, "--plot", str(plot)]) == 2
    assert plot.read_bytes() == before
    assert main(["compare", *pair, "--plot", str(plot), "--force"]) == 0
    assert plot.read_bytes() != before
    assert main(["compare", *pair, "--plot", str(tmp_path / "map.xyz")]) == 2
    assert main(["compare", pair[0]]) == 2


def test_a_plot_without_matplotlib_says_what_to_install(pair, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", *pair, "--plot", str(tmp_path / "map.png")]) == 2
    assert "pip install 'adaptc[plot]'" in capsys.readouterr().err


def test_short_names_and_inline_weights(tmp_path) -> None:
    assert short_names(("a/adapter", "b/adapter/")) == ("a/adapter", "b/adapter")
    assert short_names(("x/a", "y/b")) == ("a", "b")
    assert short_names(("a", "a")) == ("a (1)", "a (2)")
    assert split_weights(("a", "org/b")) == (("a", "org/b"), None)
    assert split_weights(("a:1", "b:-.5")) == (("a", "b"), (1.0, -0.5))
    (tmp_path / "odd:2").mkdir()
    assert split_weights((str(tmp_path / "odd:2"), "c:d")) == ((str(tmp_path / "odd:2"), "c:d"), None)
    with pytest.raises(UsageError, match="1 of 2 inputs have a weight"):
        split_weights(("a:1", "b"))
