"""Kernels run in Triton's interpreter here; it has to be asked for before a kernel module is imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
if importlib.util.find_spec("triton") is not None:
    # Now, all of them: a kernel first imported while a test has set the variable otherwise would never be interpreted.
    for _op in ("batch", "decode", "dora", "prefill", "sparse", "walsh"):
        importlib.import_module(f"adaptc.kernels.{_op}.triton")

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Give every test its own random stream and its own gates: a test that died in a kernel must not stop the next."""
    from adaptc.kernels import device

    torch.manual_seed(7)
    device._SCRATCH.clear()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the Triton kernels on CPU tensors, with every buffer they get poisoned."""
    pytest.importorskip("triton")
    monkeypatch.setenv("ADAPTC_KERNELS", "triton")
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made: Tensor = real(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], None]:
    """Assert the relative error that the output's dtype allows."""

    def check(y: Tensor, want: Tensor) -> None:
        err = float((y.double() - want).norm() / want.norm())
        assert err <= BOUND[y.dtype], err

    return check
