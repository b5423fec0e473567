from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, exact, plain, planes
from torch import Tensor

from adaptc.kernels.prefill import Tiles, launch, prefill

SMALL = Tiles(bm=32, bn=32, bk=64, kq=128, warps=4, stages=2)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("code", "rows", "m", "n", "rank"),
    [("plain", 70, 40, 130, 5), ("nf4", 33, 40, 200, 16), ("int4", 65, 32, 128, -20), ("nf4", 40, 33, 64, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_is_exact(
    code: str, rows: int, m: int, n: int, rank: int, dtype: torch.dtype, close: Callable[[Tensor, Tensor], None]
) -> None:
    x, w = torch.randn(rows, n).to(dtype), base(m, n, code)
    a = None if rank == 0 else planes(m, n, [1] * rank) if rank > 0 else plain(m, n, -rank)
    bias, gain = torch.randn(m), torch.rand(m) if rank else None
    close(launch(x, w, a, 0.7, bias, gain, SMALL), exact(x, w, a, 0.7, bias, gain))


@pytest.mark.usefixtures("interpreted")
def test_no_rows() -> None:
    assert prefill(torch.randn(0, 64), base(32, 64, "nf4"), None, 1.0).shape == (0, 32)
