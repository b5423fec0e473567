"""The quantize pass: budgets kept, error measured on what decodes, methods, calibration, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.calibration import Calibration, write_calibration
from adaptc.coded import Coded
from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import AdaptcError, FormatError, NeedsError, UsageError
from adaptc.factor import Encoded
from adaptc.formats import size_of
from adaptc.lowrank import plain
from adaptc.passes import Context, Outcome
from adaptc.quant.quantize import Quantize, stored_nbytes
from adaptc.report import compare, total_error
from adaptc.spec import parse
from adaptc.tensorfile import write_tensors


def pair(m: int, n: int, r: int, seed: int, scale: float = 1.0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    decay = 0.7 ** torch.arange(r)
    return LowRank(torch.randn(r, n, generator=g), torch.randn(m, r, generator=g) * decay, None, scale, (m, n))


@pytest.fixture
def adapter() -> Adapter:
    deltas = {f"l.{i}.{p}.weight": pair(96, 128 if p == "q" else 96, 8, 2 * i + (p == "v"), 0.5 + i)
              for i in range(3) for p in "qv"}
    return Adapter(deltas, {}, Origin("peft", base_model="b"))


def run(a: Adapter, **options: object) -> Outcome:
    return Quantize(**options)(a, Context(jobs=1, size_of=size_of))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0])
def test_bits_are_kept_and_more_of_them_are_better(adapter: Adapter, bits: float) -> None:
    outcome = run(adapter, bits=bits)
    params = sum((d.a.numel() + d.b.numel()) for d in adapter.deltas.values())  # type: ignore[union-attr]
    spent = stored_nbytes(outcome.adapter, list(adapter.deltas))
    assert spent <= bits * params / 8
    assert spent > 0.9 * bits * params / 8
    decoded = outcome.adapter.map(lambda _, d: plain(d))
    rows = [compare(k, d, decoded.deltas[k]) for k, d in adapter.deltas.items()]
    assert outcome.error == pytest.approx(total_error(rows), rel=1e-6)
    assert outcome.error < run(adapter, bits=bits / 2).error
    assert outcome.adapter.origin.container == "adaptc"
    assert "truncation + NF4 has error" in outcome.notes[0]
    assert float(outcome.notes[0].rpartition(" ")[2]) > outcome.error


@pytest.mark.parametrize("error", [0.6, 0.3, 0.1])
def test_error_target_is_met_as_measured(adapter: Adapter, error: float) -> None:
    assert 0.8 * error < run(adapter, max_error=error).error <= error


@pytest.mark.parametrize("size", [3_000, 5_000, 20_000])
def test_size_of_the_file_is_never_overshot(adapter: Adapter, size: int, tmp_path: Path) -> None:
    made = run(adapter, size=size).adapter
    out = adaptc.save(made, tmp_path / "out")
    written = sum(p.stat().st_size for p in out.iterdir())
    assert 0.9 * size < written <= size
    with pytest.raises(UsageError, match="below the smallest possible file"):
        run(adapter, size=500)


def test_the_file_says_the_same_as_the_adapter(adapter: Adapter, tmp_path: Path) -> None:
    made = run(adapter, bits=1.0).adapter
    again = adaptc.load(adaptc.save(made, tmp_path / "x.adaptc.safetensors"))
    for key in made.deltas:
        one, two = plain(made.deltas[key]), plain(again.deltas[key])
        assert torch.equal(one.a, two.a)  # type: ignore[union-attr]
        assert torch.equal(one.b, two.b)  # type: ignore[union-attr]
    assert again.history[-1].spec == "quantize{bits=1.0}"


def test_dora_keeps_its_magnitude(adapter: Adapter) -> None:
    dora = NeedsBase("dora", {"magnitude": torch.ones(96)}, {"axis": 0}, (96, 128), pair(96, 128, 8, 1))
    made = run(Adapter({"q.weight": dora}, {}, Origin("peft")), bits=2.0).adapter.deltas["q.weight"]
    assert isinstance(made, NeedsBase)
    assert isinstance(made.inner, Coded)
    assert torch.equal(made.tensors["magnitude"], torch.ones(96))


@pytest.mark.parametrize(("method", "bits", "bound"), [("nf4", None, 0.13), ("affine", 3, 0.3), ("fp8", 8, 0.05),
                                                       ("bilora", 4, 0.35)])
def test_codecs_of_single_factors(adapter: Adapter, method: str, bits: int | None, bound: float) -> None:
    outcome = run(adapter, method=method, bits=bits)
    assert outcome.error < bound
    assert all(isinstance(d.a, Encoded) for d in outcome.adapter.deltas.values())  # type: ignore[union-attr]
    assert parse(str(Quantize(method=method, bits=bits))) == (Quantize(method=method, bits=bits),)


def statistics(path: Path, adapter: Adapter, diagonal: bool, **odd: torch.Tensor) -> Calibration:
    g = torch.Generator().manual_seed(3)
    held = {}
    for i, (key, d) in enumerate(adapter.deltas.items()):
        x = torch.randn(200, d.shape[1], generator=g) * (4.0 if i == 0 else 0.3)
        held[f"{key}.{'x2' if diagonal else 'xx'}"] = x.square().mean(0) if diagonal else x.T @ x / 200
    with path.open("wb") as f:
        write_tensors(f, {**held, **odd}, {"adaptc.calibration": json.dumps({"tokens": 200})})
    return Calibration(path)


@pytest.mark.parametrize("diagonal", [True, False])
def test_calibration_keeps_the_code_that_is_better_at_the_outputs(adapter: Adapter, tmp_path: Path, diagonal: bool
                                                                  ) -> None:
    stats = statistics(tmp_path / "s.safetensors", adapter, diagonal)
    plain_rows = run(adapter, bits=1.0).rows
    outcome = Quantize(bits=1.0)(adapter, Context(calibration=stats))
    assert "coded for outputs" in outcome.rows[0].note
    loud = next(iter(adapter.deltas))
    before, after = (next(r for r in rows if r.key == loud).error for rows in (plain_rows, outcome.rows))
    assert after < before  # the module with the loudest inputs is coded more finely


def test_output_energy_is_the_mean_over_inputs(adapter: Adapter, tmp_path: Path) -> None:
    stats = statistics(tmp_path / "s.safetensors", adapter, False)
    key, d = next(iter(adapter.deltas.items()))
    assert isinstance(d, LowRank)
    w = d.b.double() @ d.a.double()  # type: ignore[union-attr]
    expected = float(torch.trace(w @ stats[f"{key}.xx"].double() @ w.T))
    assert stats.output_energy(key, d.b, d.a) == pytest.approx(expected, rel=1e-10)  # type: ignore[arg-type]


def test_statistics_that_do_not_fit(adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="does not exist"):
        Calibration(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="no statistic"):
        statistics(tmp_path / "odd.safetensors", adapter, True, **{"x.weight": torch.ones(3)})
    stats = statistics(tmp_path / "s.safetensors", adapter, True)
    with pytest.raises(NeedsError, match="no statistics of"):
        Quantize(bits=1.0)(Adapter({"z.weight": pair(8, 8, 2, 1)}, {}, Origin("peft")), Context(calibration=stats))
    key = next(iter(adapter.deltas))
    with pytest.raises(FormatError, match="the layer has"):
        stats.output_energy(key, torch.ones(4, 2), torch.ones(2, 5))


@pytest.mark.parametrize("options", [
    {}, {"bits": 0}, {"bits": 17}, {"bits": 1, "size": 10}, {"max_error": 0}, {"max_error": 1.0}, {"size": 0},
    {"method": "magic", "bits": 1}, {"method": "nf4", "bits": 3}, {"method": "affine"}, {"method": "fp8", "size": 100}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(AdaptcError):
        Quantize(**options)  # type: ignore[arg-type]


def test_the_report_has_the_error_on_both_sides(adapter: Adapter, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(5)
    sides = []
    for count in (300, 40):
        x = {k: torch.randn(count, d.shape[1], generator=g, dtype=torch.float64) for k, d in adapter.deltas.items()}
        sides.append({k: v.T @ v / count for k, v in x.items()})
    write_calibration(tmp_path / "s.safetensors", sides[0], {"tokens": 300, "held_tokens": 40}, held=sides[1])
    outcome = Quantize(bits=1.0)(adapter, Context(calibration=Calibration(tmp_path / "s.safetensors")))
    left = total = 0.0
    for key, d in adapter.deltas.items():
        w, gap = d.dense(), d.dense() - outcome.adapter.deltas[key].dense()
        left += float(torch.trace(gap @ sides[1][key] @ gap.T))
        total += float(torch.trace(w @ sides[1][key] @ w.T))
    said = re.search(r"the better was kept, ([\d.]+) on held-out inputs", outcome.rows[0].note)
    assert said is not None
    assert float(said[1]) == pytest.approx(math.sqrt(left / total), rel=5e-3)
