"""Sparsify: exact for what is sparse, the best mask for what is not, and an honest refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.base import Base
from adaptc.calibration import Calibration, write_calibration
from adaptc.delta import Dense, Kron, LowRank, NeedsBase, Sparse
from adaptc.errors import AdaptcError, FormatError, NeedsError, UsageError
from adaptc.factor import Encoded
from adaptc.formats import size_of
from adaptc.passes import Context
from adaptc.prune import view
from adaptc.prune.shira import Sparsify
from adaptc.spec import parse
from adaptc.tensorfile import write_tensors

KEY, OTHER = "layers.0.q_proj.weight", "layers.1.q_proj.weight"


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low(m: int = 48, n: int = 64, r: int = 4, seed: int = 0) -> LowRank:
    return LowRank(t(r, n, seed=seed), t(m, r, seed=seed + 1), None, 0.5, (m, n))


def adapter(**deltas: object) -> Adapter:
    named = {k.replace("__", "."): d for k, d in deltas.items()}
    return Adapter(named or {KEY: low(), OTHER: low(seed=5)}, {}, Origin("peft"))  # type: ignore[arg-type]


def sparse(k: int = 40, seed: int = 0) -> Sparse:
    places = torch.randperm(48 * 64, generator=torch.Generator().manual_seed(seed))[:k].sort().values
    return Sparse(places, t(k, seed=seed), 1.0, (48, 64))


def one(delta: object, ctx: Context | None = None, **options: object) -> Sparse:
    made = Sparsify(**{"accept_loss": True, **options})(adapter(layers__0__q_proj__weight=delta), ctx)  # type: ignore[arg-type]
    found = made.adapter.deltas[KEY]
    assert isinstance(found, Sparse)
    return found


def kept(delta: object, made: Sparse) -> float:
    """Return the share of ||dW||^2 at the kept entries."""
    dense = delta.dense().flatten()  # type: ignore[attr-defined]
    return float(dense[made.places()].square().sum() / dense.square().sum())


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_the_entries_kept_are_the_deltas_own(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "BLOCK", 640)
    delta = low()
    made, dense = one(delta, density=density), delta.dense().flatten()
    best = dense.abs().topk(round(density * dense.numel())).indices.sort().values
    assert torch.equal(made.places(), best)
    torch.testing.assert_close(made.dense().flatten()[best], dense[best], rtol=1e-6, atol=1e-7)
    assert int((made.dense() != 0).sum()) == len(best)


def test_kept_energy_rises_with_k_and_beats_every_other_mask_of_equal_k() -> None:
    delta, before = low(), 0.0
    for density in (0.01, 0.02, 0.05, 0.2, 0.5, 1.0):
        made = one(delta, density=density)
        share = kept(delta, made)
        assert share >= before
        assert share >= made.values.numel() / (48 * 64)
        for name in ("random", "struct"):
            other = one(delta, density=density, mask=name)
            assert other.values.numel() == made.values.numel()
            assert kept(delta, other) <= share + 1e-12
        before = share
    assert before == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["magnitude", "random", "struct"])
@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_the_reported_error_is_that_of_what_is_stored(name: str, dtype: str | None) -> None:
    outcome = Sparsify(density=0.1, mask=name, dtype=dtype, accept_loss=True)(adapter())
    for row, found in zip(outcome.rows, outcome.masks, strict=True):
        before, after = adapter().deltas[row.key].dense(), outcome.adapter.deltas[row.key].dense()
        assert row.error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-6)
        assert found.kept == pytest.approx(1 - row.error**2, abs=1e-3 if dtype else 1e-9)
        assert (found.entries, found.of) == (round(0.1 * 48 * 64), 48 * 64)


@pytest.mark.parametrize("options", [{"density": 0.05}, {"rank": 2}, {"density": 0.5, "across": True}])
def test_a_sparse_delta_comes_through_exactly(options: dict[str, object]) -> None:
    outcome = Sparsify(**options)(adapter(layers__0__q_proj__weight=sparse()))  # type: ignore[arg-type]
    assert torch.equal(outcome.adapter.deltas[KEY].dense(), sparse().dense())
    assert outcome.error == 0.0
    assert outcome.masks[0].kept == pytest.approx(1.0)


def test_a_sparse_delta_is_thinned_by_its_largest_entries() -> None:
    made, whole = one(sparse(), density=20 / (48 * 64)), sparse()
    best = whole.values.abs().topk(20).indices.sort().values
    assert torch.equal(made.places(), whole.places()[best])
    assert torch.equal(made.values, whole.values[best])


@pytest.mark.parametrize("delta", [Dense(t(48, 64), 0.5, (48, 64)), Dense(t(48, 16, 2, 2), 1.0, (48, 16, 2, 2)),
                                   Kron(Dense(t(4, 4), 1.0, (4, 4)), low(12, 16), 1.0, (48, 64))])
def test_other_kinds_are_thinned_too(delta: Dense) -> None:
    made = one(delta, density=0.25)
    assert made.shape == delta.shape
    best = delta.dense().flatten().abs().topk(768).indices.sort().values
    assert torch.equal(made.places(), best)


def test_like_rank_gives_every_module_its_count_and_the_last_position() -> None:
    given = adapter(layers__0__q_proj__weight=low(), layers__0__up__weight=low(100, 64), few__weight=sparse(5))
    outcome = Sparsify(rank=3, accept_loss=True)(given)
    for delta in outcome.adapter.deltas.values():
        assert isinstance(delta, Sparse)
        assert isinstance(delta.indices, torch.Tensor)
        assert delta.values.numel() == 3 * sum(delta.shape)
        assert int(delta.places()[-1]) == math.prod(delta.shape) - 1
        assert len(delta.places().unique()) == delta.values.numel()
    assert torch.equal(outcome.adapter.deltas["few.weight"].dense(), sparse(5).dense())


def test_one_budget_over_all_modules_goes_where_the_large_entries_are() -> None:
    given = adapter(layers__0__q_proj__weight=low(), layers__1__q_proj__weight=replace(low(seed=5), scale=2.0))
    apart, across = (Sparsify(density=0.1, accept_loss=True, across=a)(given) for a in (False, True))
    entries = [d.values.numel() for d in across.adapter.deltas.values()]  # type: ignore[union-attr]
    assert sum(entries) == round(0.1 * 2 * 48 * 64)
    assert entries[1] > 2 * entries[0]
    assert across.error < apart.error


@pytest.mark.parametrize("name", ["magnitude", "random"])
@pytest.mark.parametrize("size", [6_000, 12_345, 30_000])
def test_a_size_is_kept_and_used_up(name: str, size: int, tmp_path: Path) -> None:
    given = adapter(**{f"l{i}__weight": replace(low(128, 96, seed=i), scale=1.0 + i) for i in range(3)})
    made = Sparsify(size=size, mask=name, accept_loss=True)(given, Context(size_of=size_of)).adapter
    path = adaptc.save(made, tmp_path / "x.adaptc.safetensors")
    assert (0.97 if size > 10_000 else 0.85) * size < path.stat().st_size <= size  # small ones change form between
    back = adaptc.load(path)
    assert all(torch.equal(back.deltas[k].dense(), d.dense()) for k, d in made.deltas.items())


def test_a_size_below_the_headers_is_refused() -> None:
    with pytest.raises(UsageError, match="below the smallest possible file"):
        Sparsify(size=200)(adapter(), Context(size_of=size_of))


def test_container_indices_are_coded_and_come_back(tmp_path: Path) -> None:
    made = Sparsify(density=0.1)(adapter(layers__0__q_proj__weight=Dense(t(200, 300) ** 5, 1.0, (200, 300)))).adapter
    delta = made.deltas[KEY]
    assert isinstance(delta, Sparse)
    assert isinstance(delta.indices, Encoded)
    back = adaptc.load(adaptc.save(made, tmp_path / "x.adaptc.safetensors"))
    assert same(back, made)
    assert back.deltas[KEY].nbytes == delta.nbytes < 6000 * (4 + 0.75)


def test_little_energy_is_refused_with_the_number() -> None:
    said = r"1\.99 % of the entries keep \d+\.\d % of \|\|dW\|\|\^2 \(relative error 0\.\d+\), below 50 %"
    with pytest.raises(AdaptcError, match=said):
        Sparsify(density=0.02)(adapter())
    assert Sparsify(density=0.02, min_energy=0.1)(adapter()).error > 0.8
    assert Sparsify(density=0.02, accept_loss=True)(adapter()).error > 0.8
    assert Sparsify(density=0.9)(adapter()).error < 0.1


def statistics(folder: Path, n: int = 64, tokens: int = 4000) -> Calibration:
    """Return moments of correlated inputs, some much louder, in two splits."""
    mix = t(n, n, seed=7) @ torch.diag(torch.linspace(0.1, 3, n)) / 8 + 0.3
    x = t(2 * tokens, n, seed=8) @ mix
    train, held = (s.T @ s / tokens for s in x.split(tokens))
    write_calibration(folder / "s.safetensors", {KEY: train, OTHER: train.diagonal()}, {"tokens": tokens},
                      held={KEY: held, OTHER: held.diagonal()})
    return Calibration(folder / "s.safetensors")


def test_activation_masks_lose_less_at_the_outputs_and_both_splits_are_measured(tmp_path: Path) -> None:
    ctx = Context(calibration=statistics(tmp_path))
    plain, aware, fitted = (Sparsify(density=0.1, accept_loss=True, **o)(adapter(), ctx) for o in (  # type: ignore[arg-type]
        {}, {"mask": "activation"}, {"mask": "activation", "refine": True}))
    for outcome in (plain, aware, fitted):
        for found in outcome.masks:
            before, after = adapter().deltas[found.key].dense(), outcome.adapter.deltas[found.key].dense()
            for split in ("train", "held"):
                c = ctx.calibration.gram(found.key, 64, split)  # type: ignore[union-attr]
                c = c if c.dim() == 2 else c.diag()
                lost, all_ = (float(((d @ c) * d).sum()) for d in (before - after, before))
                assert found.output_error(split) == pytest.approx(math.sqrt(lost / all_), rel=1e-4)
    for one_, two, three in zip(plain.masks, aware.masks, fitted.masks, strict=True):
        for split in ("train", "held"):
            assert two.output_error(split) < one_.output_error(split)  # type: ignore[operator]
        assert three.output_error("train") <= two.output_error("train") + 1e-6  # type: ignore[operator]
        assert two.kept <= one_.kept
    assert fitted.masks[0].output_error("train") < 0.9 * aware.masks[0].output_error("train")  # type: ignore[operator]


def test_snip_weighs_by_the_base(tmp_path: Path) -> None:
    w0 = {KEY: t(48, 64, seed=3), OTHER: t(48, 64, seed=4)}
    with (tmp_path / "model.safetensors").open("wb") as f:
        write_tensors(f, w0, {})
    made = one(low(), Context(base=Base(tmp_path / "model.safetensors")), density=0.1, mask="snip")
    best = (low().dense() * w0[KEY]).abs().flatten().topk(307).indices.sort().values
    assert torch.equal(made.places(), best)


def test_what_is_missing_or_makes_no_sense_is_said() -> None:
    with pytest.raises(NeedsError, match="mask snip weighs dW by the base"):
        Sparsify(density=0.1, mask="snip")(adapter())
    with pytest.raises(NeedsError, match="mask activation needs statistics"):
        Sparsify(density=0.1, mask="activation")(adapter())
    with pytest.raises(NeedsError, match="refine needs statistics"):
        Sparsify(density=0.1, refine=True)(adapter())
    with pytest.raises(UsageError, match=r"q_proj.weight: 28 \(48 \+ 64\) entries are more than its 3072"):
        Sparsify(rank=28)(adapter())
    with pytest.raises(FormatError, match="finds no delta"):
        Sparsify(density=0.1)(adapter(x__bias=Dense(t(5), 1.0, (5,))))
    for options, says in (({}, "got none"), ({"density": 0.0}, "density is 0,"), ({"density": 1.5}, "density is 1.5"),
                          ({"density": 0.1, "rank": 2}, "density and rank"), ({"rank": 0}, "rank is 0"),
                          ({"density": 0.1, "mask": "best"}, "mask best"), ({"rank": 1, "across": True}, "across goes"),
                          ({"density": 0.1, "mask": "random", "across": True}, "a drawn mask has not"),
                          ({"density": 0.1, "min_energy": 2.0}, "min_energy is 2"),
                          ({"density": 0.1, "dtype": "int8"}, "dtype int8")):
        with pytest.raises(UsageError, match=says):
            Sparsify(**options)  # type: ignore[arg-type]


def test_what_it_does_not_handle_is_left_alone_and_named() -> None:
    experts = LowRank(t(2, 3, 8), t(2, 5, 3), None, 1.0, (2, 5, 8))
    dora = NeedsBase("dora", {"magnitude": t(48)}, {"axis": 0}, (48, 64), low())
    outcome = Sparsify(density=0.5)(adapter(q__weight=low(), experts__up=experts, dora__weight=dora))
    assert outcome.adapter.deltas["experts.up"] is experts
    assert outcome.adapter.deltas["dora.weight"] is dora
    assert [r.note for r in outcome.rows][1:] == ["left alone: sparsify does not handle lowrank",
                                                  "left alone: sparsify does not handle dora"]


def test_it_is_pure_deterministic_and_prints_itself() -> None:
    given, step = adapter(), Sparsify(density=0.1, mask="random", seed=3, accept_loss=True)
    copies = {k: (d.a.clone(), d.b.clone()) for k, d in given.deltas.items()}  # type: ignore[union-attr]
    assert same(step(given).adapter, step(given).adapter)
    assert all(torch.equal(given.deltas[k].a, a) and torch.equal(given.deltas[k].b, b)  # type: ignore[union-attr]
               for k, (a, b) in copies.items())
    assert parse(str(step)) == (step,)
    assert str(step) == "sparsify{density=0.1,mask=random,seed=3,accept_loss=true}"


def test_values_that_are_not_finite_or_do_not_fit_are_refused() -> None:
    bad = low()
    bad.b[0, 0] = math.nan
    with pytest.raises(FormatError, match=r"q_proj.weight: values are not finite"):
        Sparsify(density=0.5)(adapter(layers__0__q_proj__weight=bad))
    with pytest.raises(FormatError, match="do not fit float16"):
        Sparsify(density=0.5, dtype="fp16")(adapter(layers__0__q_proj__weight=replace(low(), scale=1e6)))


def test_nothing_wide_is_ever_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row block of dW is the largest thing there is."""
    monkeypatch.setattr(view, "BLOCK", 1 << 10)
    largest = [0]
    real = view._Product.rows

    def rows(self: object, start: int, stop: int) -> torch.Tensor:
        made = real(self, start, stop)  # type: ignore[arg-type]
        largest[0] = max(largest[0], made.numel())
        return made

    monkeypatch.setattr(view._Product, "rows", rows)
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("dW was made whole"))
    Sparsify(density=0.1, accept_loss=True)(adapter(layers__0__q_proj__weight=low(256, 128)))
    assert 0 < largest[0] <= 1 << 10
