from __future__ import annotations

import pytest
import torch
from kernel_samples import base

from adaptc.errors import NeedsError, UnsupportedError, UsageError
from adaptc.kernels import device
from adaptc.kernels.decode import decode, naive


def test_the_environment_forces_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 4)
    for wish in ("naive", "triton", "native"):
        monkeypatch.setenv("ADAPTC_KERNELS", wish)
        monkeypatch.setattr(device, "has", lambda module: True)
        assert device.backend(x) == wish
    monkeypatch.setenv("ADAPTC_KERNELS", "fast")
    with pytest.raises(UsageError, match="ADAPTC_KERNELS is fast"):
        device.backend(x)


def test_naive_is_the_specification_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTC_KERNELS", "naive")
    x, w = torch.randn(2, 64), base(8, 64, "nf4")
    assert torch.equal(decode(x, w, None, 1.0), naive.linear(x, w, None, 1.0))


def test_missing_pieces_are_named_and_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has", lambda module: False)
    x = torch.zeros(1, 4)
    for wish, words in (("triton", "triton is not installed"), ("native", "native code needs llvmlite")):
        monkeypatch.setenv("ADAPTC_KERNELS", wish)
        with pytest.raises(NeedsError, match=words):
            device.backend(x)
    monkeypatch.setenv("ADAPTC_KERNELS", "auto")
    assert device.backend(x) == "naive"


def test_triton_on_a_cpu_asks_for_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTC_KERNELS", "triton")
    monkeypatch.setattr(device, "has", lambda module: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NeedsError, match="needs a GPU or TRITON_INTERPRET=1"):
        device.backend(torch.zeros(1, 4))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        device.backend(torch.zeros(1, 4, dtype=torch.float64))


def test_scratch_grows_and_keeps_its_flags_at_zero() -> None:
    small = device.scratch(torch.device("cpu"), 4, 4)
    large = device.scratch(torch.device("cpu"), small.flags.numel() + 1, small.floats.numel() + 1)
    assert large.flags.numel() > small.flags.numel()
    assert not bool(large.flags.any())
    assert device.scratch(torch.device("cpu"), 4, 4) is large


def test_the_interpreter_multiplies_in_float32_and_a_gpu_in_the_input_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    tl = pytest.importorskip("triton.language")
    x = torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.compute_type(x) is tl.float32
    assert not device.permutes(x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert device.compute_type(x) is tl.bfloat16
