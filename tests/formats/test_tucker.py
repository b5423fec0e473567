from __future__ import annotations

import pytest
import torch
from layouts import close, t

from adaptc.delta import LowRank
from adaptc.formats import tucker


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3, 1)])
def test_decodes_to_the_contraction_in_float64(kernel: tuple[int, ...]) -> None:
    mid, down = t(4, 5, *kernel, dtype=torch.float16), t(5, 7, dtype=torch.float16)
    factor = tucker.fold(mid, down)
    a = factor.decode()
    want = torch.tensordot(down.double(), mid.double(), ([0], [1])).movedim(1, 0)  # (4, 7, kernel)
    assert a.dtype == torch.float64
    assert close(a, want.reshape(4, -1))
    assert factor.nbytes == mid.nbytes + down.nbytes
    assert tucker.unfold(factor) == (mid, down)
    assert tucker.unfold(a) is None
    assert LowRank(factor, t(6, 4), None, 1.0, (6, 7, *kernel)).rank == 4
