"""Quantizers of base weights against the codecs, bitsandbytes, and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from adaptc.errors import FormatError, UsageError
from adaptc.quant.affine import Affine
from adaptc.quant.gptq import error_feedback
from adaptc.quant.grid import Integer, Normal, grid_of, round_to_nearest


def weight(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [128, 100])
def test_integers_are_what_the_affine_codec_decodes_to(width: int, n: int) -> None:
    w = weight(24, n)
    coded = Affine.encode(w, width=width, group=64).decode()
    assert torch.equal(round_to_nearest(w, Integer(width)), coded)
    assert all(len(row.unique()) <= 2**width * 2 for row in coded)


@pytest.mark.parametrize("shape", [(8, 128), (7, 100)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(*shape)
    codes, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    torch.testing.assert_close(round_to_nearest(w, Normal()), functional.dequantize_4bit(codes, state), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [Integer(2), Integer(3, 32), Integer(4, 100), Normal()])
@pytest.mark.parametrize("n", [192, 100])
def test_error_feedback_lowers_the_error_at_the_outputs(grid: Integer | Normal, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(400, n, generator=g) @ torch.randn(n, n, generator=g)
    c, w = (x.T @ x / 400).double(), weight(64, n)

    def error(q: torch.Tensor) -> float:
        left = (w - q).double()
        return float(((left @ c) * left).sum())

    assert error(error_feedback(w, c, grid)) < 0.8 * error(round_to_nearest(w, grid))


def test_error_feedback_is_the_greedy_recursion_written_plainly() -> None:
    """Column by column: round, then shift the rest by -(w_j - q_j) / [C^-1]_jj [C^-1]_j, C^-1 of what is left."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(64, 48, generator=g, dtype=torch.float64)
    c, w, grid = x.T @ x / 64, weight(6, 48), Integer(4, 16)
    left, out = w.double(), torch.empty(6, 48)
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(48)
    for j in range(48):
        if j % 16 == 0:
            fitted = grid.fit(left[:, j : j + 16].float())
        out[:, j] = grid.snap(left[:, j : j + 1].float(), fitted)[:, 0]
        inverse = torch.linalg.inv(damped[j:, j:])
        left[:, j:] -= (left[:, j] - out[:, j].double())[:, None] / inverse[0, 0] * inverse[0]
    made = error_feedback(w, c, grid)
    assert float((made - out).abs().gt(1e-4).double().mean()) < 0.01  # float32 may round a tie the other way


def test_white_inputs_leave_nothing_to_feed_back() -> None:
    w = weight(5, 64)
    torch.testing.assert_close(error_feedback(w, torch.ones(64), Integer(3)), round_to_nearest(w, Integer(3)))


def test_unknown_or_impossible_quantizers_are_named() -> None:
    assert grid_of("int3", 32) == Integer(3, 32)
    assert grid_of("nf4", 128).name == "nf4"
    for name in ("int5", "fp4", "int", "gptq"):
        with pytest.raises(UsageError, match=f"quantizer {name} is not known"):
            grid_of(name, 64)
    with pytest.raises(UsageError, match="not 4, 2"):
        Integer(4, 2)
    with pytest.raises(FormatError, match="calibration inputs are all zero"):
        error_feedback(weight(2, 64), torch.zeros(64, 64), Integer(4))
    with pytest.raises(FormatError, match="not positive"):
        error_feedback(weight(2, 2), torch.tensor([[1.0, 9.0], [9.0, 1.0]]), Integer(4))
    with pytest.raises(FormatError, match="weights are not finite"):
        round_to_nearest(torch.full((1, 64), float("nan")), Normal())
