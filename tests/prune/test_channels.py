from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.delta import Delta, LowRank, Sparse
from adaptc.errors import FormatError, UsageError
from adaptc.factor import decoded
from adaptc.prune.channels import Channels, Lines
from adaptc.spec import parse

KEY = "model.layers.0.mlp.up_proj.weight"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(c: float = 1.0, core: bool = False) -> Adapter:
    """Return a delta whose rows and columns fade, its factors in a gauge."""
    b, a = noise(30, 3, seed=1) * 0.8 ** torch.arange(30)[:, None], noise(3, 20) * 0.8 ** torch.arange(20)
    pair = LowRank(a / c, b * c, noise(3, 3, seed=2) if core else None, 0.5, (30, 20))
    return Adapter({KEY: pair}, {}, Origin("peft", {"peft_type": "LORA", "r": 3}))


def kept(delta: Delta) -> tuple[list[int], list[int]]:
    dense = delta.dense()
    return dense.abs().sum(1).nonzero().flatten().tolist(), dense.abs().sum(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("core", [False, True])
def test_the_strongest_rows_and_columns_stay_as_they_were(core: bool) -> None:
    before = adapter(core=core)
    outcome = Channels(ratio=0.4)(before)
    dense, after = before.deltas[KEY].dense(), outcome.adapter.deltas[KEY].dense()
    rows, cols = kept(outcome.adapter.deltas[KEY])
    assert (len(rows), len(cols)) == (18, 12)
    assert rows == sorted(dense.square().sum(1).topk(18).indices.tolist())
    assert cols == sorted(dense.square().sum(0).topk(12).indices.tolist())
    assert torch.equal(after[rows][:, cols], dense[rows][:, cols])
    assert outcome.error == pytest.approx(float((after - dense).norm() / dense.norm()), rel=1e-6)


def test_the_choice_does_not_depend_on_the_gauge() -> None:
    chosen = [kept(Channels(ratio=0.5)(adapter(c)).adapter.deltas[KEY]) for c in (1.0, 100.0, 0.01)]
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.3, 0.9])
def test_an_error_is_kept_and_nearly_used_up(limit: float) -> None:
    before = adapter()
    outcome = Channels(max_error=limit)(before)
    assert outcome.error <= limit + 1e-12
    more = Channels(max_error=min(limit * 2 + 0.05, 0.99))(before)
    assert more.adapter.nbytes <= outcome.adapter.nbytes
    assert outcome.error >= 0.4 * limit


def test_dead_rows_and_columns_go_for_nothing() -> None:
    b, a = noise(30, 3), noise(3, 20)
    b[10:], a[:, ::2] = 0, 0
    outcome = Channels(max_error=0.0)(Adapter({KEY: LowRank(a, b, None, 1.0, (30, 20))}, {}, Origin("peft")))
    delta = outcome.adapter.deltas[KEY]
    assert outcome.error < 1e-12
    assert delta.nbytes == 4 * (10 * 3 + 10) + 4 * (10 * 3 + 10)
    assert torch.equal(delta.dense(), (b.double() @ a.double()))


def test_a_ratio_of_nothing_changes_nothing() -> None:
    before = adapter()
    assert Channels(ratio=0.0)(before).adapter.deltas[KEY] is before.deltas[KEY]


def test_the_container_holds_only_what_stays(tmp_path: Path) -> None:
    outcome = Channels(ratio=0.5)(adapter())
    path = adaptc.save(outcome.adapter, tmp_path / "small.adaptc.safetensors")
    again = adaptc.load(path)
    assert torch.equal(again.deltas[KEY].dense(), outcome.adapter.deltas[KEY].dense())
    stored = again.deltas[KEY]
    assert isinstance(stored, LowRank)
    assert stored.nbytes == 4 * (15 * 3 + 15) + 4 * (10 * 3 + 10)


def test_other_dialects_hold_zeros_in_the_old_shape(tmp_path: Path) -> None:
    outcome = Channels(ratio=0.5)(adapter())
    adaptc.save(outcome.adapter, tmp_path / "plain", dialect="peft")
    again = adaptc.load(tmp_path / "plain").deltas[KEY]
    assert torch.equal(again.dense(), outcome.adapter.deltas[KEY].dense())
    assert tuple(decoded(again.b).shape) == (30, 3)  # type: ignore[union-attr]


def test_deltas_without_factors_are_left_alone() -> None:
    sparse = Sparse(torch.tensor([1]), torch.ones(1), 1.0, (4, 4))
    outcome = Channels(ratio=0.5)(Adapter({"w.weight": sparse}, {}, Origin("peft")))
    assert outcome.adapter.deltas["w.weight"] is sparse
    assert "does not handle sparse" in outcome.rows[0].note


@pytest.mark.parametrize("options", [{}, {"ratio": 0.1, "max_error": 0.1}, {"ratio": 1.0}, {"ratio": -0.1},
                                     {"max_error": 1.0}, {"ratio": math.nan}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Channels(**options)


def test_it_prints_as_it_is_written() -> None:
    step = Channels(ratio=0.25, exclude=("q_proj",))
    assert parse(str(step)) == (step,)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("places", [[], [0], [1, 3], [0, 1, 2, 3, 4]])
def test_lines_decode_to_what_they_were(axis: int, places: list[int]) -> None:
    w = noise(5, 5)
    code = Lines.encode(w, torch.tensor(places, dtype=torch.int64), axis)
    expected = torch.zeros(5, 5).index_copy(axis, torch.tensor(places, dtype=torch.int64),
                                            w.index_select(axis, torch.tensor(places, dtype=torch.int64)))
    assert torch.equal(code.decode(), expected)
    assert code.nbytes == len(places) * (5 + 1) * 4


@pytest.mark.parametrize("streams", [
    {"rows": torch.tensor([1, 0], dtype=torch.int32), "values": torch.ones(8)},
    {"rows": torch.tensor([0, 9], dtype=torch.int32), "values": torch.ones(8)},
    {"rows": torch.tensor([-1, 0], dtype=torch.int32), "values": torch.ones(8)},
    {"rows": torch.tensor([0, 1], dtype=torch.int32), "values": torch.ones(7)},
    {"rows": torch.tensor([0, 1]), "values": torch.ones(8)},
    {axis: torch.tensor([0], dtype=torch.int32) for axis in ("rows", "cols")} | {"values": torch.ones(4)},
    {"values": torch.ones(4)},
    {"rows": torch.tensor([0], dtype=torch.int32), "values": torch.ones(4, dtype=torch.int32)},
])
def test_lines_that_lie_are_refused(streams: dict[str, Tensor]) -> None:
    with pytest.raises(FormatError):
        Lines().check(streams, (4, 4))
