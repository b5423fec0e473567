from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, exact, plain, planes
from torch import Tensor

from adaptc.kernels import device
from adaptc.kernels.decode import Plan, decode, launch, naive, plan
from adaptc.kernels.resident import Resident

Close = Callable[[Tensor, Tensor], None]
TINY = Plan(bm=16, bn=32, bk=64, split=2, ks=128, slices=2, kq=128, bq=64, warps=4, stages=2)


def adapter(m: int, n: int, kind: str) -> Resident | None:
    if kind == "none":
        return None
    if kind.startswith("plain"):
        return plain(m, n, int(kind[5:]))
    return planes(m, n, [int(b) for b in kind])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("code", "rows", "m", "n", "kind"),
    [
        ("plain", 1, 40, 200, "1"),
        ("plain", 7, 33, 256, "1111111111111111"),
        ("nf4", 3, 40, 200, "3211"),
        ("nf4", 16, 64, 256, "none"),
        ("int4", 5, 33, 130, "11111111111111111"),
        ("nf4", 1, 32, 192, "plain1"),
        ("plain", 2, 70, 100, "plain5"),
        ("int4", 16, 32, 256, "plain64"),
        ("nf4", 2, 40, 256, "4" * 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_is_exact(
    code: str, rows: int, m: int, n: int, kind: str, dtype: torch.dtype, close: Close
) -> None:
    x, w, a = torch.randn(rows, n).to(dtype), base(m, n, code), adapter(m, n, kind)
    bias, gain = (torch.randn(m), torch.rand(m)) if rows % 2 else (None, None)
    close(launch(x, w, a, 0.7, bias, gain, TINY), exact(x, w, a, 0.7, bias, gain))


@pytest.mark.usefixtures("interpreted")
def test_a_split_product_equals_the_whole_one_and_leaves_its_flags_at_zero(close: Close) -> None:
    x, w, a = torch.randn(3, 256), base(40, 256, "nf4"), planes(40, 256, [1] * 16)
    for split, ks in ((1, 256), (2, 128), (4, 64)):
        tiles = Plan(16, 32, 64, split, ks, 2, 128, 64, 4, 2)
        close(launch(x, w, a, 0.5, tiles=tiles), exact(x, w, a, 0.5))
        assert not bool(device.scratch(x.device, 1, 1).flags.any())


@pytest.mark.usefixtures("interpreted")
def test_rows_do_not_depend_on_their_neighbours() -> None:
    x, w, a = torch.randn(5, 128), base(32, 128, "nf4"), planes(32, 128, [2, 1])
    whole = launch(x, w, a, 0.5, tiles=TINY)
    parts = torch.cat([launch(x[:2], w, a, 0.5, tiles=TINY), launch(x[2:], w, a, 0.5, tiles=TINY)])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_strided_rows_and_no_rows() -> None:
    w, wide = base(32, 64, "plain"), torch.randn(4, 100)
    x = wide[:, 20:84]
    torch.testing.assert_close(decode(x, w, None, 1.0), naive.linear(x, w, None, 1.0), rtol=1e-5, atol=1e-5)
    assert decode(x[:0], w, None, 1.0).shape == (0, 32)


@pytest.mark.parametrize("n", [64, 200, 4096, 11008, 14336, 28672])
@pytest.mark.parametrize("m", [32, 1000, 4096, 28672])
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_a_plan_covers_every_column_and_every_slice(rows: int, m: int, n: int) -> None:
    t = plan(rows, m, n, "nf4")
    assert t.bm >= rows
    assert t.split * t.ks >= n > (t.split - 1) * t.ks
    assert t.slices * t.kq >= n > (t.slices - 1) * t.kq
    assert t.ks % t.bk == 0
    assert t.kq % t.bq == 0
    assert -(-m // t.bn) * t.split < 65536  # the low half of a gate counts them
