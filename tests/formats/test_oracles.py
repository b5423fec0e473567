"""PEFT's own merges and recorded outputs, of every type it has, against what adaptc reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft_oracle import Held, distance, error, merged
from reference_data import shared_root
from torch import Tensor, nn
from torch.nn import functional as F

import adaptc
from adaptc.errors import NeedsError, UnsupportedError

REFUSED = {
    "adamss": UnsupportedError, "lily": UnsupportedError, "poly": UnsupportedError, "randlora_nosave": NeedsError,
    "unilora_nosave": NeedsError, "vera_nosave": NeedsError,
}
# Rebuilt from an SVD of W0 in float32, which differs in its last digits from one machine's LAPACK to another's.
SPECTRAL = {"kasa", "lora_pissa", "psoft"}


def folders(kind: str, pattern: str = "*") -> list[str]:
    root = shared_root()
    return sorted(p.name for p in (root / kind).glob(pattern) if p.is_dir()) if root else []


@pytest.mark.shared
@pytest.mark.parametrize("name", folders("oracles/peft-zoo") or ["absent"])
def test_checkpoint_rebuilds_the_merge_or_is_refused(name: str, shared: Path) -> None:
    folder = shared / "oracles/peft-zoo" / name
    if name in REFUSED:
        with pytest.raises(REFUSED[name]) as refusal:
            adaptc.load(folder)
        assert "\n" not in str(refusal.value)
        return
    assert error(folder) <= (3e-6 if name in SPECTRAL else 1e-6)


@pytest.mark.shared
def test_there_are_sixty_five_checkpoints(shared: Path) -> None:
    assert len(folders("oracles/peft-zoo")) == 65
    assert set(REFUSED) <= set(folders("oracles/peft-zoo"))


def mlp(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    h = F.relu(F.linear(x.double(), w["lin0.weight"], w["lin0.bias"]))
    return F.log_softmax(F.linear(h, w["lin1.weight"], w["lin1.bias"]), -1)


def embedding(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    h = F.relu(w["emb.weight"][x] @ w["conv1d.weight"] + w["conv1d.bias"]).flatten(1)
    return F.log_softmax(F.linear(h, w["lin0.weight"], w["lin0.bias"]), -1)


def conv(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    h = F.relu(F.conv2d(x.double().reshape(2, 5, 3, 3), w["conv2d.weight"], w["conv2d.bias"])).flatten(1)
    return F.log_softmax(F.linear(h, w["lin0.weight"], w["lin0.bias"]), -1)


def parameters(**modules: nn.Module) -> dict[str, Tensor]:
    return {f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}


def base_of(name: str) -> dict[str, Tensor]:
    """The seeded networks of PEFT's regression suite, layers drawn in the order of their definition."""
    torch.manual_seed(0)
    if "emb_conv1d" in name:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        return parameters(emb=nn.Embedding(100, 5), conv1d=conv1d(1, 5), lin0=nn.Linear(10, 2))
    if "conv2d" in name:
        return parameters(conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(10, 2))
    return parameters(lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2))


@pytest.mark.shared
@pytest.mark.parametrize("name", folders("corpus", "peft-reg-*") or ["absent"])
def test_old_files_reproduce_the_outputs_recorded_when_they_were_made(name: str, shared: Path) -> None:
    folder = shared / "corpus" / name
    w = merged(adaptc.load(folder), base_of(name), ("conv1d.weight",))
    run = embedding if "emb_conv1d" in name else conv if "conv2d" in name else mlp
    made = run(w, torch.arange(90).reshape(9, 10))
    golden = torch.load(folder / "output.pt", map_location="cpu", weights_only=True).double()
    assert distance({"y": made}, {"y": golden}) <= 1e-5  # recorded in float32, inputs up to 89


@pytest.mark.shared
@pytest.mark.parametrize("name", [n for n in folders("corpus") if "mlx" not in n] or ["absent"])
def test_every_tensor_of_a_real_peft_file_is_accounted_for(name: str, shared: Path) -> None:
    from adaptc.formats.source import open_source

    folder = shared / "corpus" / name
    if not (folder / "adapter_config.json").is_file():
        pytest.skip("not a PEFT folder")
    if name in ("peft-finegates-unknown-type", "peft-unilora-roberta"):
        with pytest.raises((NeedsError, UnsupportedError), match=r"FINEGATES|UNILORA"):
            adaptc.load(folder)
        return
    adapter = adaptc.load(folder)
    stored = sum(t.nbytes for t in open_source(folder).tensors.values())
    if name.startswith("peft-reg-adalora"):
        stored += adapter.deltas["lin0.weight"].core.nbytes - 12 * 4  # type: ignore[union-attr]
    if name.startswith("bloom"):
        assert adapter.nbytes > stored  # fused projections written out
    else:
        assert adapter.nbytes == stored


def test_held_base_knows_what_it_lacks() -> None:
    assert Held({"a.weight": torch.zeros(2, 2)}).name_of("b.weight") is None
