"""Base-dependent deltas on their base: as a pass, before a pass, and on the command line's way in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import NeedsError
from adaptc.passes import Context
from adaptc.squeeze.resolve import Resolve
from adaptc.tensorfile import write_tensors

W0 = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
L = torch.linspace(0.5, 1.5, 6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    with path.open("wb") as f:
        write_tensors(f, {"q.weight": W0, "q.bias": torch.arange(6.0), "d.weight": W0, "k.weight": W0}, {})
    return path


def adapter() -> Adapter:
    ia3 = NeedsBase("ia3", {"l": L}, {"axis": 0}, (6, 9))
    pair = LowRank(torch.ones(1, 9), torch.ones(6, 1), None, 1.0, (6, 9))
    dora = NeedsBase("dora", {"magnitude": torch.ones(6)}, {"axis": 0}, (6, 9), pair)
    return Adapter({"q.weight": ia3, "d.weight": dora, "k.weight": pair}, {}, Origin("peft"))


def test_pass_resolves_what_it_is_asked_to(base: Path) -> None:
    outcome = Resolve(keep=("dora",))(adapter(), Context(Base(base)))
    after = outcome.adapter
    torch.testing.assert_close(after.deltas["q.weight"].dense(), (W0 * (L[:, None] - 1)).double())
    torch.testing.assert_close(after.deltas["q.bias"].dense(), (torch.arange(6.0) * (L - 1)).double())
    assert isinstance(after.deltas["d.weight"], NeedsBase)
    assert outcome.rows[0].note == Resolve.done
    every = Resolve()(adapter(), Context(Base(base))).adapter
    assert not any(isinstance(d, NeedsBase) for d in every.deltas.values())


def test_base_is_needed() -> None:
    with pytest.raises(NeedsError, match="needs base"):
        Resolve()(adapter())


def test_compress_resolves_first(base: Path) -> None:
    made = adaptc.compress(adapter(), base=base, rank=2)
    assert isinstance(made.deltas["q.weight"], LowRank)
    best = torch.linalg.svdvals(W0.double() * (L[:, None] - 1))[2:].norm()
    left = (made.deltas["q.weight"].dense() - W0.double() * (L[:, None] - 1)).norm()
    assert float(left) == pytest.approx(float(best), rel=1e-5)
