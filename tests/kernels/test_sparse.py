from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels import sparse

FORCED = ["triton", "naive", "auto"]


@pytest.fixture(params=FORCED)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    else:
        monkeypatch.setenv("ADAPTC_KERNELS", request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 1500])
def test_switching_in_and_out_is_bit_exact(forced: str, dtype: torch.dtype, count: int) -> None:
    w = torch.randn(50, 70).to(dtype)
    kept, index = w.clone(), torch.randperm(3500)[:count].sort().values.to(torch.int32)
    delta = torch.randn(count)
    saved = sparse.shift(w, index, delta, 0.5)
    want = kept.float().view(-1).clone()
    want[index.long()] += 0.5 * delta
    # the interpreter truncates where hardware rounds to nearest: one unit in the last place of bfloat16
    tolerance = 2.0**-7 if forced == "triton" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(w.view(-1).float(), want.to(dtype).float(), rtol=tolerance, atol=0)
    back = sparse.overwrite(w, index, saved)
    assert torch.equal(w, kept)
    sparse.overwrite(w, index, back)
    assert count == 0 or not torch.equal(w, kept)


@pytest.mark.parametrize("rows", [1, 9])
def test_the_side_branch(forced: str, rows: int, close: Callable[[Tensor, Tensor], None]) -> None:
    m, n = 37, 90
    index = torch.randperm(m * n)[:400].sort().values
    index = index[(index < 5 * n) | (index >= 9 * n)]  # some rows hold nothing
    values, x, y0 = torch.randn(len(index)), torch.randn(rows, n), torch.randn(rows, m)
    s = torch.zeros(m * n).index_copy_(0, index, values).view(m, n)
    close(
        sparse.side(x, sparse.by_rows(index, values, (m, n)), y0.clone(), 0.3), y0 + 0.3 * x.double() @ s.t().double()
    )


def test_wide_matrices_keep_wide_columns() -> None:
    stored = sparse.by_rows(torch.tensor([40000, 79999]), torch.ones(2), (2, 40000))
    assert stored.columns.tolist() == [0, 39999]
    assert stored.starts.tolist() == [0, 0, 2]


def test_what_cannot_be_overwritten_is_refused() -> None:
    index, values = torch.tensor([0]), torch.ones(1)
    with pytest.raises(UnsupportedError, match="strides"):
        sparse.overwrite(torch.zeros(4, 4).t()[:2], index, values)
    with pytest.raises(UnsupportedError, match="uint8"):
        sparse.shift(torch.zeros(4, 4, dtype=torch.uint8), index, values, 1.0)
