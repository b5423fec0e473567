"""PaCA in its authors' layout, against what their layer computes: columns of the weight replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file  # noqa: TID251 - an independent writer

import adaptc
from adaptc.base import Base
from adaptc.cli.main import cli
from adaptc.delta import NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError
from adaptc.resolve import resolved

KEY = "layers.0.q_proj.weight"


def files(folder: Path, indices: list[int], r: int = 3, **config: object) -> tuple[Path, Path, torch.Tensor]:
    """Write an adapter and its base; return both and the weight that the fork's merge leaves."""
    torch.manual_seed(0)
    w0, w = torch.randn(6, 10), torch.randn(6, r)
    tuned = folder / "paca"
    tuned.mkdir()
    said = {"peft_type": "PACA", "r": r, "paca_alpha": 12, "target_modules": ["q_proj"], **config}
    (tuned / "adapter_config.json").write_text(json.dumps(said))
    prefix = "base_model.model.layers.0.q_proj"
    save_file({f"{prefix}.paca_w": w, f"{prefix}.paca_indices": torch.tensor(indices)},
              tuned / "adapter_model.safetensors")
    save_file({KEY: w0}, folder / "base.safetensors")
    merged = w0.clone()
    if max(indices) < 10 and len(indices) == r:
        merged[:, indices] = 12 / r * w
    return tuned, folder / "base.safetensors", merged - w0


def test_columns_become_a_sparse_delta(tmp_path: Path) -> None:
    tuned, base, wanted = files(tmp_path, [7, 0, 4])
    adapter = adaptc.load(tuned)
    assert isinstance(adapter.deltas[KEY], NeedsBase)
    made = resolved(adapter, Base(base)).deltas[KEY]
    assert isinstance(made, Sparse)
    assert made.values.numel() == 18
    assert torch.allclose(made.dense().float(), wanted, atol=1e-6)


def test_sparsify_takes_it_exactly(tmp_path: Path) -> None:
    tuned, base, wanted = files(tmp_path, [7, 0, 4])
    result = CliRunner().invoke(cli, ["sparsify", str(tuned), "--base", str(base), "--density", "0.3", "-o",
                                      str(tmp_path / "out.safetensors")])
    assert result.exit_code == 0, (result.output, result.exception)
    made = adaptc.load(tmp_path / "out.safetensors").deltas[KEY]
    assert torch.allclose(made.dense().float(), wanted, atol=1e-6)


def test_without_the_base_it_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match="paca"):
        adaptc.load(files(tmp_path, [1, 2, 3])[0]).deltas[KEY].dense()


@pytest.mark.parametrize(("indices", "why"), [([0, 1, 10], "has 10 columns"), ([2, 2, 5], "an index is there twice")])
def test_foreign_columns_are_refused(tmp_path: Path, indices: list[int], why: str) -> None:
    tuned, base, _ = files(tmp_path, indices)
    with pytest.raises(FormatError, match=why):
        resolved(adaptc.load(tuned), Base(base))


def test_a_wrong_number_of_indices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="paca_indices"):
        adaptc.load(files(tmp_path, [0, 1])[0])


def test_alpha_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises((FormatError, NeedsError), match="paca_alpha"):
        adaptc.load(files(tmp_path, [0, 1, 2], paca_alpha=None)[0])
