from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.cli.main import cli
from adaptc.delta import LowRank
from adaptc.evidence.charts import Series, bars, heat, lines, ranges

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "rect", "line", "circle", "polyline"}


class Tree(HTMLParser):
    """Fails where a tag is not closed, and collects what the page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or tag in ("rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def adapter(name: str = "q_proj", layers: int = 3) -> Adapter:
    torch.manual_seed(0)
    deltas = {f"model.layers.{i}.{part}.weight": LowRank(torch.randn(4, 16), torch.randn(24, 4), None, 0.5, (24, 16))
              for i in range(layers) for part in (f"self_attn.{name}", "mlp.up_proj")}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": [name, "up_proj"],
              "base_model_name_or_path": "<script>alert(1)</script>"}
    return Adapter(deltas, {}, Origin("peft", config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adaptc.save(adapter(), tmp_path / "full", dialect="peft")
    adaptc.save(adaptc.compress(adaptc.load(tmp_path / "full"), rank=2), tmp_path / "small")
    return tmp_path


def written(folder: Path, *args: str) -> str:
    result = CliRunner().invoke(cli, ["report", *args, "-o", str(folder / "r.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (folder / "r.html").read_text(encoding="utf8")


def test_the_page_holds_everything_and_loads_nothing(folder: Path) -> None:
    text = written(folder, str(folder / "small"), "--against", str(folder / "full"))
    tree = Tree()
    tree.feed(text)
    assert not tree.open
    tags = [t for t, _ in tree.tags]
    assert "script" not in tags
    assert tags.count("svg") == 7  # sizes, errors; bytes, spectra, effective rank, error by module, trivial schemes
    assert tags.count("details") == tags.count("svg")
    loaded = [v for _, a in tree.tags for k, v in a.items() if k in ("src", "href")]
    assert loaded == ["data:,"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "truncate{rank=2" in text
    error = adaptc.diff(adaptc.load(folder / "full"), adaptc.load(folder / "small")).error
    assert f"{error:.3g} in all" in text


def test_one_adapter_alone_has_no_errors_to_show(folder: Path) -> None:
    text = written(folder, str(folder / "full"))
    assert text.count("<svg") == 3
    assert "No history" in text


def test_documents_become_sections(folder: Path) -> None:
    def estimate(metric: str, value: float) -> dict[str, object]:
        return {"metric": metric, "value": value, "low": value - 0.1, "high": value + 0.1, "difference": -0.01,
                "difference_low": -0.02, "difference_high": 0.01, "distinguishable": False}

    points = [{"label": f"rank {r}", "spec": f"truncate{{rank={r}}}", "goal": "rank", "setting": r, "nbytes": 1000 * r,
               "error": 1 / r, "metrics": {"accuracy": estimate("accuracy", 0.5 + r / 50)}} for r in (1, 2, 4)]
    (folder / "sweep.json").write_text(json.dumps({"points": points}))
    (folder / "eval.json").write_text(json.dumps({
        "units": 50, "data": "t.tsv", "base": "b", "reference": "full",
        "adapters": [{"name": n, "metrics": [estimate("accuracy", 0.8)]} for n in ("full", "small")]}))
    text = written(folder, str(folder / "sweep.json"), str(folder / "eval.json"))
    assert "accuracy over bytes" in text
    assert "no other beats" in text
    assert "not distinguishable" in text
    assert text.count("<svg") == 2


@pytest.mark.parametrize(("content", "why"), [
    ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "is no result of adaptc sweep"),
    ('{"points": [1]}', "is no result"),
])
def test_other_documents_are_refused(folder: Path, content: str, why: str) -> None:
    (folder / "x.json").write_text(content)
    result = CliRunner().invoke(cli, ["report", str(folder / "x.json"), "-o", str(folder / "r.html")])
    assert result.exit_code != 0
    assert why in str(result.exception)
    assert not (folder / "r.html").exists()


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "r.html").write_text("mine")
    result = CliRunner().invoke(cli, ["report", str(folder / "full"), "-o", str(folder / "r.html")])
    assert result.exit_code != 0
    assert (folder / "r.html").read_text() == "mine"


def test_charts_take_any_numbers() -> None:
    assert bars([("a", 0.0, "0")]).count("<rect") == 1
    assert lines([Series("none", [])], "x", "y") == ""
    assert lines([Series("zero", [(1.0, 0.0)])], "x", "y", log_y=True) == ""
    same = lines([Series("flat", [(1.0, 2.0), (2.0, 2.0)])], "x", "y", log_x=True, log_y=True)
    assert "nan" not in same
    assert "inf" not in same
    assert heat(["a"], ["0", "1"], [[None, 0.0]]).count("<title>") == 1
    assert ranges([]) == ""
    for value in (1e-300, 1e300, -5.0, 0.0):
        assert "nan" not in ranges([("v", value, value, value)])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_it_without_complaint(folder: Path) -> None:
    written(folder, str(folder / "small"), "--against", str(folder / "full"))
    done = subprocess.run(
        [CHROMIUM or "", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--window-size=390,900", f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'r.png'}",
         "--dump-dom",
         (folder / "r.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    assert done.stdout.count("<svg") == 7
    assert (folder / "r.png").stat().st_size > 10_000
