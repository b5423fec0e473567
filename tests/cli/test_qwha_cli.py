"""adaptc qwha: what it writes, what it says, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.calibration import write_calibration
from adaptc.cli.main import main
from adaptc.delta import LowRank
from adaptc.fingerprint import fingerprint
from adaptc.spectral import Spectral
from adaptc.tensorfile import write_tensors

SHAPES = {f"model.layers.{i}.self_attn.{p}.weight": (48, 64) for i in range(2) for p in ("q_proj", "v_proj")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model's folder and statistics of its layers, with the current folder beside them."""
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as f:
        write_tensors(f, {k: torch.randn(*s, generator=g) * 0.1 for k, s in SHAPES.items()}, {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"_name_or_path": "maker/toy"}')
    moments = []
    for _ in range(2):
        x = torch.randn(300, 64, generator=g) @ torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
        moments.append(dict.fromkeys(SHAPES, x.T @ x / 300))
    write_calibration(tmp_path / "stats.safetensors", moments[0], {"tokens": 300, "held_tokens": 300}, held=moments[1])
    return tmp_path


ARGS = ["qwha", "--base", "model", "--calibration", "stats.safetensors", "--quant", "int3"]
Run = Callable[..., "Said"]


class Said:
    """Exit code and output of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str) -> Said:
        code = main([*ARGS, *args])
        out, err = capfd.readouterr()
        return Said(code, out, err)

    return call


def test_an_adapter_and_its_base_are_written_and_accounted_for(run: Run, folder: Path) -> None:
    said = run("--rank-budget", "2", "-o", "q.adaptc.safetensors", "--write-base", "model-int3")
    assert (said.code, said.err) == (0, "")
    adapter = adaptc.load(folder / "q.adaptc.safetensors")
    assert set(adapter.deltas) == set(SHAPES)
    for d in adapter.deltas.values():
        assert isinstance(d, Spectral)
        assert (d.transform, d.values.numel()) == ("sylvester", 2 * (48 + 64))
    assert adapter.origin.base_model == "maker/toy"
    assert adapter.origin.fingerprint == fingerprint(Base(folder / "model-int3"), adapter)
    for word in ("int3:group=64", "q_proj", "held out", "made for its base quantised by", "model-int3/"):
        assert word in said.out


def test_json_has_every_layer_on_both_splits(run: Run) -> None:
    import json

    said = run("--density", "0.05", "--gptq", "-o", "q.adaptc.safetensors", "--json")
    data = json.loads(said.out)
    assert {m["name"] for m in data["modules"]} == set(SHAPES)
    for m in data["modules"]:
        assert m["coefficients"] == round(0.05 * 48 * 64)
        assert 0 < m["outputs"]["train"] < m["outputs"]["held"] < 1
    assert data["spec"] == "qwha{quant=int3,density=0.05,gptq=true}"
    assert data["left_alone"] == []


def test_a_trained_adapter_and_the_official_layout(run: Run, folder: Path) -> None:
    trained = {k: LowRank(torch.randn(2, 64) * 0.1, torch.randn(48, 2), None, 0.5, (48, 64)) for k in list(SHAPES)[:2]}
    adaptc.save(Adapter(trained, {}, Origin("peft")), folder / "lora")
    said = run("--rank-budget", "8", "--from-adapter", "lora", "--to", "qhft", "-o", "out")
    assert said.code == 0, said.err
    read = adaptc.load(folder / "out")
    assert read.origin.dialect == "qhft"
    assert set(read.deltas) == set(SHAPES)


@pytest.mark.parametrize(("args", "message"), [
    (["-o", "q.adaptc.safetensors"], "qwha wants one of rank_budget and density"),
    (["--density", "0", "-o", "q.adaptc.safetensors"], "density is 0"),
    (["--rank-budget", "0", "-o", "q.adaptc.safetensors"], "rank budget is 0"),
    (["--rank-budget", "2", "--base", "nowhere", "-o", "q.adaptc.safetensors"], "nowhere does not exist"),
    (["--rank-budget", "2", "--calibration", "no.safetensors", "-o", "q.adaptc.safetensors"],
     "no.safetensors does not exist"),
    (["--rank-budget", "2", "--quant", "int9", "-o", "q.adaptc.safetensors"], "quantizer int9 is not known"),
    (["--rank-budget", "2", "-o", "stats.safetensors"], "stats.safetensors is the input"),
    (["--rank-budget", "2", "-o", "q.adaptc.safetensors", "--write-base", "model", "--force"], "model is the input"),
    (["--rank-budget", "2", "--quant", "model", "-o", "q.adaptc.safetensors", "--write-base", "x"],
     "nothing to write"),
])
def test_refusals_are_one_line_and_leave_nothing(run: Run, folder: Path, args: list[str], message: str) -> None:
    before = sorted(p.name for p in folder.iterdir())
    said = run(*args)
    assert said.code in (1, 2)
    assert message in said.err.splitlines()[0]
    assert "Traceback" not in said.err
    assert sorted(p.name for p in folder.iterdir()) == before


def test_help_imports_no_torch() -> None:
    import subprocess
    import sys

    code = ("import sys; from adaptc.cli.main import main; main(['qwha', '--help']); "
            "sys.exit(9 if 'torch' in sys.modules else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adaptc qwha --base model/" in done.stdout
