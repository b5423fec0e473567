"""The Merge join: weights, dtypes, kinds of delta, size, laws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import KEY, adapter, dense, inputs, lora, refactored

import adaptc
from adaptc.adapter import Adapter, same
from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.formats import size_of
from adaptc.passes import Context
from adaptc.pipeline import Pipeline
from adaptc.squeeze.merge import Merge
from adaptc.squeeze.method import MERGES
from adaptc.squeeze.truncate import Truncate

METHODS = MERGES.ids()


def merged(adapters: list[Adapter], **options: object) -> np.ndarray:
    return dense(Merge(**options)(adapters).adapter)  # type: ignore[arg-type]


def close(x: np.ndarray, y: np.ndarray, tolerance: float = 1e-6) -> bool:
    return bool(np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y))


# laws


@pytest.mark.parametrize("method", ["exact", "cat", "lego", "ties", "magnitude", "dare-linear", "dare-ties", "knots",
                                    "tsv", "iso"])
def test_the_result_does_not_depend_on_how_deltas_are_factored(method: str) -> None:
    adapters = inputs(96, 80, (12, 10, 8))
    turned = [refactored(a, seed) for seed, a in enumerate(adapters)]
    assert close(dense(turned[0]), dense(adapters[0]), 1e-12)
    assert close(merged(turned, method=method, rank=10), merged(adapters, method=method, rank=10))


def test_the_raw_gauge_of_lego_does_depend_on_it() -> None:
    adapters = inputs(96, 80, (12, 10, 8))
    turned = [refactored(a, seed) for seed, a in enumerate(adapters)]
    raw = {"method": "lego", "rank": 10, "gauge": "raw"}
    assert not close(merged(turned, **raw), merged(adapters, **raw), 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_bit_identical_on_any_number_of_workers_and_pure(method: str) -> None:
    adapters = [adapter({f"layers.{i}.q.weight": lora(24, 20, 4, 7 * s + i) for i in range(6)}) for s in (1, 2, 3)]
    before = [{k: d.b.clone() for k, d in a.deltas.items()} for a in adapters]  # type: ignore[union-attr]
    one, four, again = (Merge(method=method, rank=6)(adapters, Context(jobs=j)).adapter for j in (1, 4, 1))
    assert same(one, four)
    assert same(one, again)
    assert all(torch.equal(b[k], a.deltas[k].b) for a, b in zip(adapters, before, strict=True) for k in b)


def test_the_seed_decides_what_is_dropped() -> None:
    adapters = inputs(40, 30, (4, 4))
    draws = [merged(adapters, method="dare-linear", seed=s) for s in (0, 1, 0)]
    assert np.array_equal(draws[0], draws[2])
    assert not close(draws[1], draws[0], 0.1)


def test_dropping_at_random_is_unbiased() -> None:
    adapters = inputs(40, 30, (2, 2))
    total = sum(dense(a) for a in adapters) / 2
    mean = sum(merged(adapters, method="dare-linear", seed=s, rank=4, density=0.8) for s in range(60)) / 60
    assert close(mean, total, 4 * (0.25 / 60) ** 0.5)


@pytest.mark.parametrize("method", ["exact", "cat", "fedavg", "fedex", "lora-fair", "magnitude"])
def test_more_rank_is_never_farther_from_the_weighted_sum(method: str) -> None:
    adapters = inputs(40, 30, (4, 6))
    errors = [Merge(method=method, rank=k)(adapters).rows[0].error for k in (6, 8, 10)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_options_print_and_parse(method: str) -> None:
    from adaptc.spec import parse

    step = Merge(method=method, weights=(0.25, 0.75), rank=3, names=("a b", "c"), heads="first")
    assert parse(str(step)) == (step,)
    assert parse(str(Merge(method=method))) == (Merge(method=method),)


# weights, ranks, dtypes


def test_weights_add_subtract_and_default_to_the_mean() -> None:
    a, b = inputs(30, 20, (4, 3))
    assert close(merged([a, b], rank=7), (dense(a) + dense(b)) / 2)
    assert close(merged([a, b], rank=7, weights=(0.6, 0.4)), 0.6 * dense(a) + 0.4 * dense(b))
    assert close(merged([a, b], rank=7, weights=(1.0, -2.0)), dense(a) - 2 * dense(b))
    assert close(merged([a, b], rank=7, weights=(1, 1), scale=-0.5), -0.5 * (dense(a) + dense(b)))


def test_the_default_rank_is_the_largest_input_rank_of_each_parameter() -> None:
    other = "model.layers.1.mlp.up_proj.weight"
    a = adapter({KEY: lora(30, 20, 4, 1), other: lora(40, 20, 2, 2)})
    b = adapter({KEY: lora(30, 20, 3, 3), other: lora(40, 20, 5, 4)})
    assert [r.rank_after for r in Merge()([a, b]).rows] == [4, 5]
    assert [r.rank_after for r in Merge(method="cat")([a, b]).rows] == [7, 7]
    assert [r.rank_after for r in Merge(method="cat", rank=6)([a, b]).rows] == [6, 6]


def test_dtypes_widen_unless_one_is_asked_for() -> None:
    half, brain = (inputs(20, 20, (3,), d)[0] for d in (torch.float16, torch.bfloat16))
    for pair, wanted, asked in (([half, brain], torch.float32, None), ([half, half], torch.float16, None),
                                ([half, brain], torch.bfloat16, "bf16")):
        made = Merge(dtype=asked)(pair).adapter.deltas[KEY]
        assert isinstance(made, LowRank)
        assert made.b.dtype == made.a.dtype == wanted


def test_a_cast_that_overflows_is_refused() -> None:
    huge = adapter(LowRank(torch.full((1, 4), 1e6), torch.full((4, 1), 1e6), None, 1.0, (4, 4)))
    with pytest.raises(FormatError, match="do not fit float16"):
        Merge(dtype="fp16")([huge, huge])


def test_the_error_is_that_of_what_is_stored() -> None:
    adapters = inputs(64, 48, (8, 8))
    out = Merge(rank=5, dtype="bf16")(adapters)
    total = sum(dense(a) for a in adapters) / 2
    off = np.linalg.norm(dense(out.adapter) - total) / np.linalg.norm(total)
    assert out.rows[0].error == pytest.approx(off, rel=1e-9)
    assert out.error == out.rows[0].error == out.adapter.history[-1].error
    full = Merge(rank=16)(adapters)
    off = np.linalg.norm(dense(full.adapter) - total) / np.linalg.norm(total)
    assert full.rows[0].error == pytest.approx(off, rel=1e-3)
    assert 0 < full.rows[0].error < 1e-6


# which parameters belong together


def test_tensors_beside_the_deltas() -> None:
    """Token embeddings of a diffusion adapter go along, PEFT's training state does not."""
    def with_extra(seed: int, dialect: str, **extra: torch.Tensor) -> Adapter:
        made = adapter(lora(8, 8, 2, seed))
        return replace(made, extra=extra, origin=replace(made.origin, dialect=dialect))

    one, two = torch.ones(3), torch.zeros(3)
    out = Merge()([with_extra(1, "cloneofsimo", s1=one, s3=one), with_extra(2, "cloneofsimo", s1=two, s2=two)])
    assert set(out.adapter.extra) == {"s2", "s3"}
    assert out.notes == ("1 tensors that change no weight left out (training state, or they differ)",)
    assert not Merge()([with_extra(1, "peft", s=one), with_extra(2, "peft", s=one)]).adapter.extra


# kinds of delta


def test_convolutions_kron_hadamard_and_dense_merge_exactly() -> None:
    shape = (12, 8, 3, 3)
    conv = replace(lora(12, 72, 3, 1), shape=shape)
    kron = Kron(Dense(torch.randn(3, 4), 1.0, (3, 4)), lora(4, 18, 1, 2), 0.5, shape)
    loha = Hadamard(replace(lora(12, 72, 2, 3), shape=shape), replace(lora(12, 72, 2, 4), shape=shape), 1.0, shape)
    flat = Dense(torch.randn(12, 8, 3, 3), 0.1, shape)
    adapters = [adapter(d) for d in (conv, kron, loha, flat)]
    total = sum(dense(a) for a in adapters) / 4
    out = Merge(rank=12)(adapters)
    made = out.adapter.deltas[KEY]
    assert made.shape == shape
    assert close(dense(out.adapter), total)
    assert out.rows[0].error < 1e-6


def test_experts_merge_one_by_one() -> None:
    def experts(seed: int, r: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(3, r, 10, generator=g), torch.randn(3, 14, r, generator=g)
        return adapter(LowRank(a, b, None, 0.5, (3, 14, 10)))

    a, b = experts(1, 2), experts(2, 4)
    for method in METHODS:
        out = Merge(method=method, rank=3)([a, b])
        made = out.adapter.deltas[KEY]
        assert isinstance(made, LowRank)
        assert made.shape == (3, 14, 10)
        assert made.b.shape == (3, 14, 3)
        assert dense(out.adapter).shape == (3, 14, 10)
    out = Merge(method="cat")([a, b])
    total = (dense(a) + dense(b)) / 2
    assert close(dense(out.adapter), total)
    third = adapter(LowRank(a.deltas[KEY].a[2], a.deltas[KEY].b[2], None, 0.5, (14, 10)))  # type: ignore[union-attr]
    fourth = adapter(LowRank(b.deltas[KEY].a[2], b.deltas[KEY].b[2], None, 0.5, (14, 10)))  # type: ignore[union-attr]
    assert close(dense(Merge(rank=3)([a, b]).adapter)[2], merged([third, fourth], rank=3))


def test_sparse_deltas_stay_sparse_and_go_through_the_elementwise_rule() -> None:
    def sparse(at: list[int], values: list[float], scale: float = 1.0) -> Adapter:
        return adapter(Sparse(torch.tensor(at), torch.tensor(values), scale, (3, 4)))

    a, b = sparse([0, 5, 7], [1.0, 2.0, -4.0], 2.0), sparse([5, 7, 11], [1.0, 3.0, 5.0])
    out = Merge()([a, b]).adapter
    assert isinstance(out.deltas[KEY], Sparse)
    assert np.allclose(dense(out), (dense(a) + dense(b)) / 2)
    out = Merge(method="ties", density=1.0)([a, b]).adapter
    assert np.allclose(dense(out).ravel()[[0, 5, 7, 11]], [2.0, 2.5, -8.0, 5.0])
    with pytest.raises(UnsupportedError, match="lego works on factors, this delta is sparse"):
        Merge(method="lego")([a, b])


def test_biases_are_added() -> None:
    key = KEY.replace("weight", "bias")
    a, b = (adapter({KEY: lora(8, 8, 2, s), key: Dense(torch.randn(8), 2.0, (8,))}) for s in (1, 2))
    for method in METHODS:
        out = Merge(method=method)([a, b])
        assert np.allclose(dense(out.adapter, key), (dense(a, key) + dense(b, key)) / 2, atol=1e-6)
        assert out.rows[1].error < 1e-6


def test_factors_of_zero_stay_zero() -> None:
    zero = adapter(LowRank(torch.randn(2, 8), torch.zeros(8, 2), None, 1.0, (8, 8)))
    for method in METHODS:
        assert not dense(Merge(method=method)([zero, zero]).adapter).any()
        assert np.isfinite(merged([zero, inputs(8, 8, (2,))[0]], method=method)).all()


def test_dora_is_refused_without_its_base_and_merged_on_resolved_deltas_with_it(tmp_path: Path) -> None:
    from adaptc.base import Base
    from adaptc.tensorfile import write_tensors

    w0 = torch.randn(12, 10, generator=torch.Generator().manual_seed(5))
    with (tmp_path / "base.safetensors").open("wb") as f:
        write_tensors(f, {KEY: w0}, {})

    def dora(seed: int) -> Adapter:
        magnitude = torch.linspace(0.5, 2.0, 12)
        return adapter(NeedsBase("dora", {"magnitude": magnitude}, {"axis": 0}, (12, 10), lora(12, 10, 3, seed)))

    a, plain = dora(1), adapter(lora(12, 10, 2, 2))
    with pytest.raises(NeedsError, match=f"{KEY}: dora in a changes the base weight") as caught:
        Merge(names=("a", "b"))([a, plain])
    assert "--base" in (caught.value.hint or "")
    v = w0.double() + a.deltas[KEY].inner.dense()  # type: ignore[union-attr]
    resolved = torch.linspace(0.5, 2.0, 12).double()[:, None] * v / v.norm(dim=1, keepdim=True) - w0.double()
    total = (resolved.numpy() + dense(plain)) / 2
    ctx = Context(base=Base(tmp_path / "base.safetensors"))
    assert close(dense(Merge(rank=10)([a, plain], ctx).adapter), total)
    short = Merge()([a, plain], ctx)
    assert short.rows[0].rank_after == 3
    u, s, vh = np.linalg.svd(total)
    assert close(dense(short.adapter), (u[:, :3] * s[:3]) @ vh[:3])


# sizes, recipes, files


def test_size_counts_the_whole_file_and_is_spent_where_it_helps() -> None:
    keys = [f"layers.{i}.q.weight" for i in range(4)]
    adapters = [adapter({k: lora(64, 48, 8, 5 * i + s, scale=1.0 + 3 * i) for i, k in enumerate(keys)}) for s in (1, 2)]
    full = size_of(Merge(method="cat")(adapters).adapter)
    out = Merge(size=full // 3)(adapters, Context(size_of=size_of))
    assert size_of(out.adapter) <= full // 3
    ranks = [r.rank_after for r in out.rows]
    assert ranks == sorted(ranks)  # type: ignore[type-var]
    for key, row in zip(keys, out.rows, strict=True):
        total = sum(dense(a, key) for a in adapters) / 2
        measured = np.linalg.norm(dense(out.adapter, key) - total) / np.linalg.norm(total)
        assert row.error == pytest.approx(measured, rel=1e-6)


def test_merge_leads_a_recipe_and_nothing_else_does() -> None:
    from adaptc.recipe import run

    adapters = inputs(30, 20, (4, 4))
    out = run(adapters, "merge{method=ties,density=0.6},truncate{rank=2}")
    by_hand = Truncate(rank=2)(Merge(method="ties", density=0.6)(adapters).adapter).adapter
    assert same(out, by_hand)
    assert [s.spec for s in out.history] == ["merge{method=ties,density=0.6}", "truncate{rank=2}"]
    with pytest.raises(UsageError, match="merge takes several adapters, so it must be the first step"):
        run(adapters, "truncate{rank=2},merge")
    with pytest.raises(UsageError, match="2 adapters for passes that take one"):
        run(adapters, "truncate{rank=2}")
    with pytest.raises(UsageError, match="merge takes two adapters or more, got 1"):
        run(adapters[0], "merge")
    assert Pipeline((Merge(), Truncate(rank=2)))(adapters).notes[0].startswith("errors count from what merge made")


def test_from_python(tmp_path: Path) -> None:
    adapters = inputs(30, 20, (4, 4), torch.float32)
    out = adaptc.merge(adapters, method="lego", rank=3, weights=[0.6, 0.4])
    adaptc.save(out, tmp_path / "out")
    again = adaptc.load(tmp_path / "out")
    assert close(dense(again), dense(out), 1e-12)
    assert again.history[-1].spec == "merge{method=lego,weights=[0.6,0.4],rank=3}"
    with pytest.raises(UsageError, match="merge has no option densitty") as caught:
        adaptc.merge(adapters, densitty=0.5)
    assert "density" in (caught.value.hint or "")


def test_the_config_targets_every_module_of_every_input(tmp_path: Path) -> None:
    a = adapter({"model.layers.0.q_proj.weight": lora(8, 8, 2, 1), "model.layers.1.q_proj.weight": lora(8, 8, 2, 2)})
    b = adapter({"model.layers.0.q_proj.weight": lora(8, 8, 2, 3), "model.layers.0.v_proj.weight": lora(8, 8, 3, 4)})
    config = adaptc.load(adaptc.save(Merge()([a, b]).adapter, tmp_path / "out")).origin.config
    assert config["target_modules"] == ["model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj"]
    assert Merge()([a, a]).adapter.origin.config["target_modules"] == ["q_proj"]
