from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, plain, planes
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels import dora
from adaptc.kernels.resident import unpack
from adaptc.kernels.weight import unpack_weight


@pytest.mark.parametrize("forced", ["triton", "auto"])
@pytest.mark.parametrize(
    ("code", "m", "n", "rank"), [("plain", 70, 130, 5), ("nf4", 65, 200, 16), ("int4", 33, 64, -20)]
)
def test_factored_norms_are_those_of_the_sum(
    forced: str, code: str, m: int, n: int, rank: int, request: pytest.FixtureRequest, close: Callable[..., None]
) -> None:
    if forced == "triton":
        request.getfixturevalue("interpreted")
    w, a = base(m, n, code), planes(m, n, [1] * rank) if rank > 0 else plain(m, n, -rank)
    p, core, q = (t.double() for t in unpack(a))
    close(dora.row_norms(w, a, 0.7), (unpack_weight(w).double() + 0.7 * p @ core @ q).norm(dim=1))


@pytest.mark.parametrize("forced", ["triton", "auto"])
@pytest.mark.parametrize("rows", [1, 9])
def test_compose_is_pefts_expression(
    forced: str, rows: int, request: pytest.FixtureRequest, close: Callable[[Tensor, Tensor], None]
) -> None:
    if forced == "triton":
        request.getfixturevalue("interpreted")
    b, d, gain, bias = torch.randn(rows, 600), torch.randn(rows, 600), torch.rand(600), torch.randn(600)
    for offset in (None, bias):
        inner = b.double() if offset is None else b.double() - offset.double()
        want = b.double() + (gain.double() - 1) * inner + gain.double() * 0.5 * d.double()
        close(dora.compose(b, d, gain, offset, 0.5), want)


def test_another_shape_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="adapter is for"):
        dora.row_norms(base(8, 64, "plain"), planes(9, 64, [1]), 1.0)
