from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.base import Base
from adaptc.delta import Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.prune.cuts import Cut, slice_delta, spread_delta
from adaptc.prune.slice import rebased, shard_files, slice_adapter
from adaptc.quant.affine import Affine
from adaptc.tensorfile import write_tensors

CUT = Cut((6, 8), torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 7]))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(m: int = 6, n: int = 8, r: int = 2, seed: int = 0) -> LowRank:
    return LowRank(noise(r, n, seed=seed), noise(m, r, seed=seed + 1), None, 0.5, (m, n))


def sparse() -> Sparse:
    return Sparse(torch.tensor([1, 3, 17, 20, 41, 47]), noise(6, seed=3), 2.0, (6, 8))


DELTAS: dict[str, Delta] = {
    "lowrank": pair(), "dense": Dense(noise(6, 8), 0.3, (6, 8)), "sparse": sparse(),
    "core": LowRank(noise(3, 8), noise(6, 2), noise(2, 3), 1.5, (6, 8)),
    "kron": Kron(Dense(noise(3, 2), 1.0, (3, 2)), Dense(noise(2, 4), 1.0, (2, 4)), 0.7, (6, 8)),
    "hadamard": Hadamard(pair(seed=4), pair(seed=6), 0.2, (6, 8)),
    "sum": Sum((pair(), sparse()), (6, 8)),
    "codes": LowRank(Affine.encode(noise(2, 8), width=8), Affine.encode(noise(6, 2), width=8), None, 1.0, (6, 8)),
}


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_a_sliced_delta_is_the_slice_of_what_it_means(delta: Delta) -> None:
    part = slice_delta("w", delta, CUT)
    assert part.shape == (3, 4)
    torch.testing.assert_close(part.dense(), CUT.slice(delta.dense()))


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_spreading_a_slice_is_masking(delta: Delta) -> None:
    whole = spread_delta("w", slice_delta("w", delta, CUT), CUT)
    assert whole.shape == (6, 8)
    torch.testing.assert_close(whole.dense(), CUT.mask(delta.dense()))


def test_rank_scale_and_dtype_stay() -> None:
    part = slice_delta("w", LowRank(noise(2, 8).bfloat16(), noise(6, 2).bfloat16(), None, 0.25, (6, 8)), CUT)
    assert isinstance(part, LowRank)
    assert (part.rank, part.scale, part.dtype) == (2, 0.25, torch.bfloat16)


def test_a_bias_is_cut_by_its_rows() -> None:
    cut = Cut((6,), torch.tensor([1, 4]))
    delta = Dense(noise(6), 2.0, (6,))
    part = slice_delta("b", delta, cut)
    assert part.dense().tolist() == delta.dense()[[1, 4]].tolist()
    assert spread_delta("b", part, cut).dense().nonzero().flatten().tolist() == [1, 4]


def test_one_side_can_stay_whole() -> None:
    w = noise(6, 8)
    assert torch.equal(Cut((6, 8), cols=torch.tensor([2])).slice(w), w[:, 2:3])
    assert torch.equal(Cut((6, 8), rows=torch.tensor([0, 1])).mask(w)[2:], torch.zeros(4, 8))
    assert Cut((6, 8)).whole
    assert not CUT.whole


def test_cuts_of_cuts_are_one_cut() -> None:
    then = Cut((3, 4), torch.tensor([1, 2]), torch.tensor([0, 3]))
    w = noise(6, 8)
    assert torch.equal(then.after(CUT).slice(w), then.slice(CUT.slice(w)))
    assert torch.equal(Cut((3, 4)).after(CUT).slice(w), CUT.slice(w))
    assert torch.equal(CUT.after(Cut((6, 8))).slice(w), CUT.slice(w))


def test_what_depends_on_whole_rows_is_refused() -> None:
    dora = NeedsBase("dora", {"magnitude": noise(6)}, {"axis": 0}, (6, 8), pair())
    with pytest.raises(UnsupportedError, match="dora depends on whole rows"):
        slice_delta("w", dora, CUT)


def test_a_delta_of_another_width_is_not_spread() -> None:
    with pytest.raises(FormatError, match=r"adapter has shape \(6, 8\), the map keeps \(3, 4\) of \(6, 8\)"):
        spread_delta("w", pair(), CUT)


@pytest.fixture
def base(tmp_path: Path) -> Base:
    with (tmp_path / "model.safetensors").open("wb") as f:
        write_tensors(f, {"model.up.weight": noise(6, 8), "model.up.bias": noise(6), "other.weight": noise(2, 2)}, {})
    return Base(tmp_path)


def test_carried_tensors_are_cut_with_their_parameter(base: Base) -> None:
    bias = Cut((6,), torch.tensor([0, 2, 5]))
    adapter = Adapter({"up.weight": pair(), "other.weight": pair(2, 2, 1)}, {"up.bias": noise(6, seed=8)},
                      Origin("peft"))
    part = slice_adapter(adapter, base, {"model.up.weight": CUT, "model.up.bias": bias})
    assert part.deltas["up.weight"].shape == (3, 4)
    assert part.deltas["other.weight"] is adapter.deltas["other.weight"]
    assert torch.equal(part.replaced["up.bias"], noise(6, seed=8)[[0, 2, 5]])  # type: ignore[arg-type]
    masked = slice_adapter(adapter, base, {"model.up.weight": CUT, "model.up.bias": bias}, masked=True)
    assert masked.deltas["up.weight"].shape == (6, 8)
    torch.testing.assert_close(masked.deltas["up.weight"].dense(), CUT.mask(pair().dense()))


def test_carried_rows_of_a_cut_parameter_are_refused(base: Base) -> None:
    adapter = Adapter({}, {"up.bias": Rows((1,), noise(1, 1))}, Origin("peft"))
    with pytest.raises(FormatError, match=r"up\.bias: carried tensor"):
        slice_adapter(adapter, base, {"model.up.bias": Cut((6,), torch.tensor([0]))})


def test_a_new_base_is_named_and_the_old_fingerprint_goes() -> None:
    origin = Origin("peft", {"base_model_name_or_path": "old", "r": 2}, base_model="old", fingerprint="0" * 16)
    made = rebased(Adapter({}, {}, origin), "new").origin
    assert (made.base_model, made.fingerprint, made.config["base_model_name_or_path"]) == ("new", None, "new")


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="holds no safetensors weights"):
        shard_files(tmp_path)
