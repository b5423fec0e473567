"""The truncate pass: goals, budgets, kinds, DoRA, casts, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse
from adaptc.errors import AdaptcError, FormatError, UsageError
from adaptc.formats import size_of
from adaptc.measure import relative_error
from adaptc.passes import Context, Outcome
from adaptc.spec import parse
from adaptc.squeeze.budget import VLLM_RANKS, allocate, fit_up, rank_for_energy, rank_for_error
from adaptc.squeeze.truncate import Truncate
from adaptc.tensorfile import write_tensors


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(m: int = 40, n: int = 56, r: int = 12, decay: float = 0.8, seed: int = 0, scale: float = 2.0) -> LowRank:
    return LowRank(t(r, n, seed=seed), t(m, r, seed=seed + 1) * decay ** torch.arange(r), None, scale, (m, n))


def adapter(**deltas: object) -> Adapter:
    made = {f"{k}.weight": d for k, d in deltas.items()}
    return Adapter(made, {}, Origin("peft", base_model="test"))  # type: ignore[arg-type]


def run(a: Adapter, **options: object) -> Outcome:
    return Truncate(**options)(a, Context(jobs=2, size_of=size_of))  # type: ignore[arg-type]


def best(delta: LowRank, k: int) -> float:
    s = torch.linalg.svdvals(delta.dense().flatten(1))
    return float(s[k:].norm() / s.norm())


def test_every_module_is_optimal_and_its_error_measured() -> None:
    a = adapter(q=pair(seed=1), k=pair(30, 30, 8, seed=2), conv=LowRank(t(6, 45), t(20, 6), None, -0.5, (20, 5, 3, 3)))
    outcome = run(a, rank=3)
    for row in outcome.rows:
        before, after = a.deltas[row.key], outcome.adapter.deltas[row.key]
        assert isinstance(after, LowRank)
        assert after.rank == 3
        assert after.shape == before.shape
        assert after.scale == 1.0
        assert row.error == pytest.approx(best(before, 3), rel=1e-6)  # type: ignore[arg-type]
        assert row.error == pytest.approx(relative_error(before, after), rel=1e-9)
        assert row.energy == pytest.approx(float(before.dense().square().sum()), rel=1e-9)
    total = sum(float((a.deltas[r.key].dense() - outcome.adapter.deltas[r.key].dense()).square().sum())
                for r in outcome.rows)
    assert outcome.error == pytest.approx(math.sqrt(total / sum(r.energy for r in outcome.rows)), rel=1e-6)
    assert outcome.adapter.history[-1].spec == "truncate{rank=3}"


def test_rank_at_or_above_the_source_changes_nothing() -> None:
    a = adapter(q=pair())
    for rank in (12, 64):
        after = run(a, rank=rank).adapter.deltas["q.weight"]
        assert after is a.deltas["q.weight"]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_takes_the_smallest_rank_that_holds_it(energy: float) -> None:
    delta = pair()
    s2 = torch.linalg.svdvals(delta.dense())[:12].square()
    row = run(adapter(q=delta), energy=energy).rows[0]
    assert row.rank_after is not None
    held = float(s2[: row.rank_after].sum() / s2.sum())
    assert held >= energy - 1e-12
    if row.rank_after > 1:
        assert float(s2[: row.rank_after - 1].sum() / s2.sum()) < energy


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3])
def test_max_error_holds_and_is_tight(error: float) -> None:
    delta = pair()
    row = run(adapter(q=delta), max_error=error).rows[0]
    assert row.rank_after is not None
    assert row.error <= error + 1e-6
    if row.rank_after > 1:
        assert best(delta, row.rank_after - 1) > error


def test_max_error_counts_the_cast() -> None:
    delta = pair(decay=0.5)
    edge = best(delta, 6) * 1.0001  # the spectrum allows rank 6, casting to bf16 adds more than a ten-thousandth
    row = run(adapter(q=delta), max_error=edge, dtype="bf16").rows[0]
    assert row.rank_after == 7
    assert row.error <= edge
    with pytest.raises(UsageError, match=r"q\.weight: error 0\.00\d+ at full rank is above max_error 0\.0001"):
        run(adapter(q=delta), max_error=1e-4, dtype="bf16")


def test_minimal_ranks_have_no_one_too_many() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    share = torch.cumsum(s.square(), 0) / s.square().sum()
    for k in range(1, 5):
        assert rank_for_energy(s, float(share[k - 1]) - 1e-9) == k
        tail = math.sqrt(max(1 - float(share[k - 1]), 0.0))
        assert rank_for_error(s, tail + 1e-9) == k
    zero = torch.zeros(4, dtype=torch.float64)
    assert rank_for_energy(zero, 0.9) == rank_for_error(zero, 0.1) == 1


@pytest.mark.parametrize("size", [3_000, 5_000, 9_000, 20_000, 10**7])
def test_size_is_never_overshot_and_nearly_used(size: int, tmp_path: Path) -> None:
    a = adapter(q=pair(seed=1), k=pair(seed=2, decay=0.3), v=pair(64, 64, 12, seed=3, decay=0.95))
    b = adaptc.compress(a, size=size)
    adaptc.save(b, tmp_path / "out")
    written = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert written <= size
    full = size_of(a)
    cheapest = 4 * (40 + 56)
    assert written > min(size, full) - cheapest - 600 or all(d.rank == 12 for d in b.deltas.values())  # type: ignore[union-attr]


def test_size_takes_directions_by_error_removed_per_byte() -> None:
    strong, weak = pair(seed=1, scale=5.0), pair(seed=1, scale=0.5)
    b = adaptc.compress(adapter(strong=strong, weak=weak), size=4_500)
    ranks = {k: d.rank for k, d in b.deltas.items()}  # type: ignore[union-attr]
    assert ranks["strong.weight"] > ranks["weak.weight"]


def test_size_below_the_smallest_file_is_refused() -> None:
    with pytest.raises(UsageError, match="below the smallest possible file"):
        adaptc.compress(adapter(q=pair()), size=100)


def test_allocation_is_the_best_prefix_for_equal_costs() -> None:
    spectra = {"a": torch.tensor([3.0, 2.0, 0.1]).double(), "b": torch.tensor([2.5, 0.2]).double()}
    cost = {"a": 10, "b": 10}
    ranks = allocate(spectra, cost, {"a": 0, "b": 0}, lambda r: sum(r[k] * cost[k] for k in r), 35)
    assert ranks == {"a": 2, "b": 1}


def test_vllm_ranks() -> None:
    assert [fit_up(r, 512) for r in (1, 2, 9, 33, 200, 400)] == [1, 8, 16, 64, 256, 512]
    assert fit_up(5, 6) == 6
    row = run(adapter(q=pair()), energy=0.8, fit="vllm").rows[0]
    assert row.rank_after in VLLM_RANKS


def test_vllm_gets_one_multiplier() -> None:
    steep = LowRank(torch.randn(8, 20), torch.randn(16, 8) * torch.tensor([1.0, *[1e-3] * 7]), None, 2.0, (16, 20))
    flat = LowRank(torch.linalg.qr(torch.randn(20, 8)).Q.T, torch.linalg.qr(torch.randn(16, 8)).Q, None, 2.0, (16, 20))
    out = run(adapter(q=steep, k=flat), energy=0.99, fit="vllm")
    deltas = list(out.adapter.deltas.values())
    assert [d.rank for d in deltas] == [1, 8]  # type: ignore[union-attr]
    assert {d.scale for d in deltas} == {1.0}  # type: ignore[union-attr]
    assert torch.allclose(deltas[1].dense(), flat.dense(), rtol=1e-6)
    assert out.rows[1].note == "multiplier folded into B"
    untouched = run(adapter(q=flat), rank=8, fit="vllm").adapter.deltas
    assert next(iter(untouched.values())) is flat


def test_kron_and_hadamard_are_truncated_where_that_saves_bytes() -> None:
    kron = Kron(Dense(t(4, 4), 1.0, (4, 4)), Dense(t(64, 64), 1.0, (64, 64)), 1.0, (256, 256))
    had = Hadamard(pair(seed=3), pair(seed=5), 0.5, (40, 56))
    outcome = run(adapter(kron=kron, had=had), rank=4)
    for key, before in (("kron.weight", kron), ("had.weight", had)):
        after = outcome.adapter.deltas[key]
        assert isinstance(after, LowRank)
        s = torch.linalg.svdvals(before.dense())
        assert relative_error(before, after) == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-5)
    small = Kron(Dense(t(4, 4), 1.0, (4, 4)), LowRank(t(1, 64), t(64, 1), None, 1.0, (64, 64)), 1.0, (256, 256))
    outcome = run(adapter(kron=small), rank=3)
    assert outcome.adapter.deltas["kron.weight"] is small
    assert "kept as it is" in outcome.rows[0].note


@pytest.mark.parametrize("method", ["exact", "rsvd"])
def test_dense_deltas_become_low_rank(method: str) -> None:
    w = (t(40, 8) @ t(8, 56)) + 1e-3 * t(40, 56, seed=9)
    dense = Dense(w, 0.5, (40, 56))
    after = run(adapter(q=dense), rank=8, method=method).adapter.deltas["q.weight"]
    assert isinstance(after, LowRank)
    assert relative_error(dense, after) < 1e-3


@pytest.mark.parametrize("delta", [pair(r=24, decay=0.95), Dense(t(40, 56), 0.5, (40, 56)),
                                   LowRank(t(3, 24, 56), t(3, 40, 24), None, 1.0, (3, 40, 56))],
                         ids=["factors", "dense", "experts"])
def test_the_error_of_rsvd_counts_what_its_sketch_has_not_seen(delta: LowRank | Dense) -> None:
    outcome = run(adapter(q=delta), rank=4, method="rsvd", oversample=2, power=1)
    row, after = outcome.rows[0], outcome.adapter.deltas["q.weight"].dense()  # type: ignore[union-attr]
    assert row.error == pytest.approx(float((delta.dense() - after).norm() / delta.dense().norm()), rel=1e-9)
    assert row.error >= (best(delta, 4) if len(delta.shape) == 2 else 0)  # type: ignore[arg-type]
    assert row.energy == pytest.approx(float(delta.dense().square().sum()), rel=1e-9)


def test_what_it_does_not_handle_is_left_alone_and_said() -> None:
    sparse = Sparse(torch.tensor([1, 5]), t(2), 1.0, (40, 56))
    outcome = run(adapter(q=pair(), s=sparse), rank=2)
    assert outcome.adapter.deltas["s.weight"] is sparse
    assert outcome.rows[1].note == "left alone: truncate does not handle sparse"
    outcome = run(adapter(q=pair(), k=pair()), rank=2, exclude=("k",))
    assert [r.rank_after for r in outcome.rows] == [2, 12]
    outcome = run(adapter(q=pair(), k=pair()), rank=2, include=("k.weight",))
    assert [r.rank_after for r in outcome.rows] == [12, 2]


def test_dtype_casts_once_and_its_error_counts() -> None:
    a = adapter(q=pair())
    outcome = run(a, rank=4, dtype="fp16")
    after = outcome.adapter.deltas["q.weight"]
    assert isinstance(after, LowRank)
    assert after.a.dtype == after.b.dtype == torch.float16
    assert outcome.rows[0].error == pytest.approx(relative_error(a.deltas["q.weight"], after), rel=1e-6)
    only_cast = run(a, dtype="bf16")
    assert only_cast.rows[0].rank_after == 12
    assert 0 < only_cast.rows[0].error < 1e-2


def test_overflowing_casts_are_refused() -> None:
    big = LowRank(t(4, 56) * 1e6, t(40, 4) * 1e6, None, 1.0, (40, 56))
    with pytest.raises(FormatError, match=r"q\.weight: .*float16"):
        run(adapter(q=big), rank=2, dtype="fp16")


def test_non_finite_factors_name_the_module() -> None:
    bad = pair()
    bad.b[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"truncate: q\.weight: factors are not finite"):
        run(adapter(q=bad), rank=2)


@pytest.mark.parametrize("options", [
    {}, {"rank": 0}, {"rank": -3}, {"energy": 0.0}, {"energy": 1.5}, {"max_error": 1.0}, {"size": 0},
    {"rank": 2, "energy": 0.5}, {"rank": 2, "method": "magic"}, {"rank": 2, "dtype": "int8"},
    {"rank": 2, "fit": "mlx"}, {"rank": 2.5}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Truncate(**options)  # type: ignore[arg-type]


def test_result_does_not_depend_on_workers_or_plan() -> None:
    a = adapter(**{f"m{i}": pair(seed=i) for i in range(6)})
    one = Truncate(rank=3)(a, Context(jobs=1)).adapter
    four = Truncate(rank=3)(a, Context(jobs=4)).adapter
    for key in a.deltas:
        assert torch.equal(one.deltas[key].a, four.deltas[key].a)  # type: ignore[union-attr]


def test_spec_round_trip() -> None:
    p = Truncate(rank=8, method="rsvd", seed=3, include=("q_proj", "v_proj"), dtype="bf16")
    assert parse(str(p)) == (p,)


def dora_case(tmp_path: Path) -> tuple[Adapter, Base, torch.Tensor]:
    w0 = t(40, 56, seed=30)
    with (tmp_path / "base.safetensors").open("wb") as f:
        write_tensors(f, {"q.weight": w0}, {})
    direction = pair(seed=4, scale=0.5)
    m = (w0.double() + direction.dense()).norm(dim=1).float() * 1.1
    dora = NeedsBase("dora", {"magnitude": m}, {"axis": 0}, (40, 56), direction)
    return adapter(q=dora), Base(tmp_path / "base.safetensors"), w0


def test_dora_without_base_keeps_its_magnitude(tmp_path: Path) -> None:
    a, _, _ = dora_case(tmp_path)
    outcome = run(a, rank=3)
    after, before = outcome.adapter.deltas["q.weight"], a.deltas["q.weight"]
    assert isinstance(after, NeedsBase)
    assert isinstance(before, NeedsBase)
    assert torch.equal(after.tensors["magnitude"], before.tensors["magnitude"])
    assert "direction" in outcome.rows[0].note


def test_dora_with_base_takes_the_better_magnitude(tmp_path: Path) -> None:
    a, base, w0 = dora_case(tmp_path)
    before = a.deltas["q.weight"]
    assert isinstance(before, NeedsBase)
    outcome = Truncate(rank=3)(a, Context(base=base))
    after = outcome.adapter.deltas["q.weight"]
    assert isinstance(after, NeedsBase)
    target, got = before.resolve(w0).dense(), after.resolve(w0).dense()
    assert outcome.rows[0].error == pytest.approx(float((got - target).norm() / target.norm()), rel=1e-6)
    kept = run(a, rank=3).adapter.deltas["q.weight"]
    assert isinstance(kept, NeedsBase)
    assert outcome.rows[0].error <= float((kept.resolve(w0).dense() - target).norm() / target.norm()) + 1e-12


def test_errors_have_one_base_class() -> None:
    assert issubclass(UsageError, AdaptcError)
    assert UsageError.exit_code == 2
    assert FormatError.exit_code == 1
