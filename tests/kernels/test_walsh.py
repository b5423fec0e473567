from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels import walsh
from adaptc.kernels.sparse import by_rows


def paley(prime: int) -> Tensor:
    """Return the Hadamard matrix of order prime + 1, prime = 3 mod 4 (Paley's first construction)."""
    squares = {i * i % prime for i in range(1, prime)}
    h = torch.eye(prime + 1)
    h[0, 1:], h[1:, 0] = 1, -1
    for i in range(prime):
        for j in range(prime):
            if i != j:
                h[i + 1, j + 1] = 1 if (i - j) % prime in squares else -1
    return h


ONE = torch.ones(1, 1)
CASES = [(ONE, 64, 1), (ONE, 8, 5), (paley(11), 16, 1), (paley(11), 4, 2), (ONE, 1, 10), (paley(19), 1, 1)]


@pytest.mark.parametrize("forced", ["triton", "naive", "auto"])
@pytest.mark.parametrize(("had", "length", "groups"), CASES)
def test_transform_and_product(
    had: Tensor, length: int, groups: int, forced: str, request: pytest.FixtureRequest, close: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if forced == "triton":
        request.getfixturevalue("interpreted")
    else:
        monkeypatch.setenv("ADAPTC_KERNELS", forced)
    m, rows, n = 20, 3, had.shape[0] * length * groups
    one = torch.kron(had.double(), torch.tensor(hadamard(length)).double()) / (had.shape[0] * length) ** 0.5
    u = torch.block_diag(*[one] * groups)
    torch.testing.assert_close(u @ u.t(), torch.eye(n, dtype=torch.float64))
    x, y0 = torch.randn(rows, n), torch.randn(rows, m)
    close(walsh.transform(x, had, length), x.double() @ u.t())
    index = torch.randperm(m * n)[: m * n // 8 + 1].sort().values
    values = torch.randn(len(index))
    f = torch.zeros(m * n).index_copy_(0, index, values).view(m, n)
    y = walsh.spectral(x, had, length, by_rows(index, values, (m, n)), y0.clone(), 0.3)
    close(y, y0.double() + 0.3 * x.double() @ u.t() @ f.t().double())


@pytest.mark.parametrize(("n", "length"), [(96, 64), (48, 3), (1 << 15, 1 << 15)])
def test_a_width_without_this_transform_is_refused(n: int, length: int) -> None:
    with pytest.raises(UnsupportedError, match=f"width {n} has no transform"):
        walsh.transform(torch.zeros(1, n), ONE, length)
