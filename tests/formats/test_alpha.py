from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptc.errors import FormatError
from adaptc.formats.alpha import alpha_for, alpha_value, record_alpha, recorded_alpha, scale_of

RANKS = st.integers(1, 512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@given(value=st.floats(-500, 500, width=16), rank=RANKS)
def test_an_alpha_that_still_says_so_comes_back_as_it_was(dtype: torch.dtype, value: float, rank: int) -> None:
    stored = torch.tensor(value).to(dtype)
    recorded = {"m": record_alpha(alpha_value("m", stored), stored)}
    back = alpha_for(scale_of(float(stored), rank), rank, recorded, "m", optional=True)
    assert back is not None
    assert (back.dtype, back.shape) == (dtype, torch.Size([]))
    assert torch.equal(back, stored)
    assert torch.equal(recorded_alpha(recorded, "m"), stored)  # type: ignore[arg-type]


@given(alpha=st.floats(2**-10, 2048, width=32), first=RANKS, then=RANKS)
def test_another_rank_keeps_the_scale_exactly(alpha: float, first: int, then: int) -> None:
    s = scale_of(alpha, first)
    made = alpha_for(s, then, {"m": [alpha, "F32", []]}, "m", optional=True)
    got = scale_of(float(made), then)  # type: ignore[arg-type]
    assert abs(got - s) <= math.ulp(s)


@given(alpha=st.floats(2**-10, 2048, width=32), rank=RANKS)
def test_every_float32_alpha_survives_a_scale(alpha: float, rank: int) -> None:
    assert scale_of(float(alpha_for(alpha / rank, rank, {}, "m", optional=False)), rank) == alpha / rank  # type: ignore[arg-type]


def test_fractions_are_not_cut_to_whole_numbers() -> None:
    assert float(alpha_for(0.3, 5, {"m": [4.0, "F16", []]}, "m", optional=True)) == pytest.approx(1.5, abs=1e-15)  # type: ignore[arg-type]


def test_missing_and_zero_mean_one() -> None:
    assert scale_of(None, 7) == scale_of(0.0, 7) == 1.0
    assert alpha_for(1.0, 7, {}, "m", optional=True) is None
    assert float(alpha_for(1.0, 7, {}, "m", optional=False)) == 7  # type: ignore[arg-type]
    assert float(alpha_for(1.0, 7, {"m": [0.0, "F32", []]}, "m", optional=True)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "says"), [
    (torch.tensor(float("nan")), "is nan"), (torch.tensor(float("inf")), "is inf"), (torch.ones(2), "has 2 entries")])
def test_an_alpha_that_is_no_number_is_refused(alpha: torch.Tensor, says: str) -> None:
    with pytest.raises(FormatError, match=f"m.alpha {says}"):
        alpha_value("m", alpha)
