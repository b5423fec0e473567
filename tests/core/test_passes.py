"""Passes: pure, measured, in order, refused before they start; pipelines; the worker pool."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from adaptc.adapter import Adapter, Origin, same, tensors
from adaptc.delta import Delta, LowRank, Sparse
from adaptc.errors import FormatError, LossError, NeedsError, UsageError
from adaptc.passes import Change, Context, Need, Pass, located, one_blas_thread, run
from adaptc.pipeline import Pipeline
from adaptc.report import compare, total_error


@dataclass(frozen=True, kw_only=True)
class Halve(Pass):
    """Multiply every low-rank delta by `by`."""

    name: ClassVar[str] = "halve"
    by: float = 0.5

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        assert isinstance(delta, LowRank)
        return Change(replace(delta, scale=delta.scale * self.by), note="halved")


@dataclass(frozen=True, kw_only=True)
class Thorough(Halve):
    """Claims to need base weights."""

    name: ClassVar[str] = "thorough"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE})


@dataclass(frozen=True, kw_only=True)
class Picky(Halve):
    """Fails on the second layer."""

    name: ClassVar[str] = "picky"

    def delta(self, key: str, delta: Delta, setting: Any) -> Change:
        if "1" in key:
            raise FormatError("is odd", hint="look again")
        return super().delta(key, delta, setting)


def low(seed: int, scale: float = 1.0) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(3, 5, generator=random), torch.randn(4, 3, generator=random), None, scale, (4, 5))


@pytest.fixture
def adapter() -> Adapter:
    sparse = Sparse(torch.tensor([0, 7]), torch.tensor([1.0, 2.0]), 1.0, (4, 5))
    deltas = {f"layers.{i}.{name}.weight": low(10 * i + j) for i in range(2) for j, name in enumerate(("q_proj", "up"))}
    return Adapter({**deltas, "lm_head.weight": sparse}, {"norm.weight": torch.ones(3)}, Origin("test"))


def test_a_pass_changes_what_it_handles_and_measures(adapter):
    outcome = Halve()(adapter)
    assert list(outcome.adapter.deltas) == list(adapter.deltas)
    for row in outcome.rows[:4]:
        assert (row.error, row.note) == (pytest.approx(0.5), "halved")
        before, after = adapter.deltas[row.key].dense(), outcome.adapter.deltas[row.key].dense()
        assert torch.allclose(after, before / 2)
        assert row.energy == pytest.approx(float(before.square().sum()))
    left = outcome.rows[4]
    assert (left.key, left.error, left.note) == ("lm_head.weight", 0.0, "left alone: halve does not handle sparse")
    assert outcome.adapter.deltas["lm_head.weight"] is adapter.deltas["lm_head.weight"]
    energies = [r.energy for r in outcome.rows]
    assert outcome.error == pytest.approx((sum(0.25 * e for e in energies[:4]) / sum(energies)) ** 0.5)
    assert outcome.adapter.replaced["norm.weight"] is adapter.replaced["norm.weight"]


def test_a_pass_is_pure(adapter):
    kept = {k: {n: t.clone() for n, t in tensors(d).items()} for k, d in adapter.deltas.items()}
    first, second = Halve(by=0.25)(adapter), Halve(by=0.25)(adapter)
    assert same(first.adapter, second.adapter)
    assert adapter.history == ()
    assert all(torch.equal(t, tensors(adapter.deltas[k])[n]) for k, ts in kept.items() for n, t in ts.items())


def test_history_holds_the_spec_and_the_measured_error(adapter):
    outcome = Halve(by=0.75)(Halve()(adapter).adapter)
    assert [s.spec for s in outcome.adapter.history] == ["halve", "halve{by=0.75}"]
    assert outcome.adapter.history[-1].error == pytest.approx(outcome.error)
    assert outcome.adapter.history[0].nbytes_before == adapter.nbytes


@pytest.mark.parametrize(("include", "exclude", "changed"), [
    ((), (), [0, 1, 2, 3]), (("q_proj",), (), [0, 2]), (("layers.1",), (), [2, 3]), (("*.up.*",), (), [1, 3]),
    ((), ("q_proj",), [1, 3]), (("layers.0",), ("up",), [0]), (("q_proj", "up"), ("layers.?.up",), [0, 2]),
    (("layers.1.up.weight",), (), [3]),
])
def test_patterns_choose_modules(include, exclude, changed, adapter):
    outcome = Halve(include=include, exclude=exclude)(adapter)
    assert [i for i, r in enumerate(outcome.rows) if r.note == "halved"] == changed


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_refused(option, adapter):
    with pytest.raises(UsageError, match=f"halve: {option} pattern 'proj' fits none of 5 parameters"):
        Halve(**{option: ("proj",)})(adapter)


def test_needs_are_refused_before_work(adapter):
    with pytest.raises(NeedsError, match="thorough needs base"):
        Thorough()(adapter)


def test_failure_names_pass_parameter_and_what_ran(adapter):
    with pytest.raises(FormatError, match=r"^picky: layers\.1\.q_proj\.weight: is odd \(after halve\{by=2.0\}, halve\)$"
                       ) as caught:
        Pipeline((Halve(by=2.0), Halve(), Picky()))(adapter)
    assert caught.value.hint == "look again"


def test_values_that_are_not_finite_are_refused_wherever_they_are(adapter):
    bad = torch.tensor([1.0, float("nan")])
    for key, delta in (("lm_head.weight", replace(adapter.deltas["lm_head.weight"], values=bad)),
                       ("layers.0.up.weight", replace(low(0), b=torch.full((4, 3), float("inf"))))):
        with pytest.raises(FormatError, match=rf"halve: {key}: .*not finite"):
            Halve()(adapter.with_deltas({**adapter.deltas, key: delta}))


def test_pipeline_compares_first_with_last(adapter):
    twice = Pipeline((Halve(), Halve(exclude=("up",))))(adapter)
    assert [r.error for r in twice.rows] == pytest.approx([0.75, 0.5, 0.75, 0.5, 0.0])
    assert len(twice.adapter.history) == 2
    one = Pipeline((Halve(),))(adapter)
    assert one.rows == Halve()(adapter).rows
    nothing = Pipeline(())(adapter)
    assert nothing.adapter is adapter
    assert nothing.rows == ()


def test_compare_with_a_removed_delta(adapter):
    row = compare("k", low(1), None)
    assert (row.error, row.rank_after, row.nbytes_after, row.note) == (1.0, 0, 0, "removed")
    assert compare("k", low(1), low(1)).error < 1e-15


def test_total_error_of_nothing():
    assert total_error([]) == 0.0
    assert total_error([compare("k", low(1, scale=0.0), low(1, scale=0.0))]) == 0.0


def test_pool_keeps_order_and_reports(adapter):
    seen: list[tuple[str, int, int]] = []
    keys = [f"k{i}" for i in range(7)]
    ctx = Context(jobs=3, progress=lambda *step: seen.append(step))
    assert run(lambda k: k.upper(), keys, ctx, "work") == [k.upper() for k in keys]
    assert seen == [("work", i, 7) for i in range(1, 8)]
    assert run(lambda k: k, [], Context(), "none") == []


def test_pool_uses_its_threads_and_one_when_asked():
    together = threading.Barrier(2, timeout=20)
    assert run(lambda k: together.wait() >= 0, ["a", "b"], Context(jobs=2), "meet") == [True, True]
    names = run(lambda k: threading.current_thread().name, list("abcd"), Context(jobs=1), "alone")
    assert len(set(names)) == 1


def test_first_failure_stops_the_rest():
    done: list[str] = []

    def work(key: str) -> None:
        if key == "k0":
            raise FormatError("broken")
        time.sleep(0.01)  # 2 s for all of them: far more than it takes to cancel what has not begun
        done.append(key)

    with pytest.raises(FormatError, match=r"^k0: broken$"):
        run(work, [f"k{i}" for i in range(200)], Context(jobs=1), "work")
    assert len(done) < 199


def test_blas_threads_are_restored():
    before = torch.get_num_threads()
    inside = 0
    try:
        with one_blas_thread():
            inside = torch.get_num_threads()
            raise FormatError("out")
    except FormatError:
        pass
    assert inside == 1
    assert torch.get_num_threads() == before


def test_contexts_that_make_no_sense():
    with pytest.raises(UsageError, match="jobs is -1"):
        Context(jobs=-1)
    with pytest.raises(UsageError, match="device tape is not available here"):
        Context(device="tape")


def test_located_keeps_type_hint_and_losses():
    made = located(LossError("x", ("a", "b"), hint="h"), "there: x")
    assert isinstance(made, LossError)
    assert (str(made), made.hint, made.losses) == ("there: x", "h", ("a", "b"))
