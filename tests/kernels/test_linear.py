from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, exact, planes
from torch import Tensor

from adaptc.errors import UnsupportedError
from adaptc.kernels.linear import linear


@pytest.mark.parametrize("forced", ["auto", "naive"])
def test_gradient_with_respect_to_x(
    forced: str, monkeypatch: pytest.MonkeyPatch, close: Callable[[Tensor, Tensor], None]
) -> None:
    monkeypatch.setenv("ADAPTC_KERNELS", forced)
    w, a, bias, gain = base(40, 128, "nf4"), planes(40, 128, [1, 2]), torch.randn(40), torch.rand(40)
    x = torch.randn(2, 3, 128, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    seed = torch.randn(2, 3, 40)
    y = linear(x, w, a, 0.5, bias, gain)
    y.backward(seed)
    want = exact(wide, w, a, 0.5, bias, gain)
    want.backward(seed.double())
    assert x.grad is not None
    assert wide.grad is not None
    close(y.detach(), want.detach())
    close(x.grad, wide.grad)


def test_the_op_is_well_formed_for_the_compiler() -> None:
    w, a, x = base(20, 64, "nf4"), planes(20, 64, [1] * 3), torch.randn(5, 64)
    arguments = (x, w.data, w.scales, "nf4", 20, 64, a.q, a.p, a.core, 3, 0.5, None, None)
    torch.library.opcheck(torch.ops.adaptc.linear.default, arguments)


def test_it_traces_into_one_graph() -> None:
    w, a = base(20, 64, "nf4"), planes(20, 64, [1] * 3)
    compiled = torch.compile(lambda x: linear(x, w, a, 0.5) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), 2 * linear(x, w, a, 0.5))


def test_what_does_not_fit_is_refused_by_name() -> None:
    w = base(20, 64, "nf4")
    with pytest.raises(UnsupportedError, match="width 63, the weight takes 64"):
        linear(torch.zeros(1, 63), w)
    with pytest.raises(UnsupportedError, match="adapter is for 21 x 64, the weight is 20 x 64"):
        linear(torch.zeros(1, 64), w, planes(21, 64, [1]))
    with pytest.raises(UnsupportedError, match="float64"):
        linear(torch.zeros(1, 64, dtype=torch.float64), w)
    with pytest.raises(UnsupportedError, match="weight is on cpu, activations are on meta"):
        linear(torch.zeros(1, 64, device="meta"), w)
