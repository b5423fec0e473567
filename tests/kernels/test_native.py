from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kernel_samples import base, exact, plain, planes
from torch import Tensor

pytest.importorskip("llvmlite")

from adaptc.kernels.native import jit, linear

HOST = jit.host_target()
RUNNABLE = {
    "avx512": ["avx512", "avx2", "generic"],
    "avx2": ["avx2", "generic"],
    "neon": ["neon"],
    "generic": ["generic"],
}


@pytest.mark.parametrize("code", ["plain", "nf4", "int4"])
@pytest.mark.parametrize(
    ("rows", "m", "n", "rank"),
    [(1, 130, 200, 5), (16, 64, 256, 16), (3, 70, 1001, -7), (7, 40, 65, 0), (30, 100, 130, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_linear_is_exact(
    code: str, rows: int, m: int, n: int, rank: int, dtype: torch.dtype, close: Callable[[Tensor, Tensor], None]
) -> None:
    x, w = torch.randn(rows, n).to(dtype), base(m, n, code)
    a = None if rank == 0 else planes(m, n, [1] * rank) if rank > 0 else plain(m, n, -rank)
    bias, gain = torch.randn(m), torch.rand(m)
    close(linear.linear(x, w, a, 0.7, bias, gain), exact(x, w, a, 0.7, bias, gain))


@pytest.mark.parametrize("target", RUNNABLE[HOST])
def test_every_target_this_machine_runs_agrees(
    target: str, monkeypatch: pytest.MonkeyPatch, close: Callable[[Tensor, Tensor], None]
) -> None:
    code = jit.native(target)
    monkeypatch.setattr(linear, "native", lambda: code)
    x, w, a = torch.randn(5, 192), base(50, 192, "nf4"), planes(50, 192, [2, 1, 1])
    close(linear.linear(x, w, a, 0.5), exact(x, w, a, 0.5))
    tall = torch.randn(20, 192)
    close(linear.linear(tall, w, a, 0.5), exact(tall, w, a, 0.5))


@pytest.mark.parametrize(
    ("target", "instruction"), [("avx512", "zmm"), ("avx2", "ymm"), ("neon", "tbl"), ("generic", "xmm")]
)
def test_the_ir_compiles_for_every_target(target: str, instruction: str) -> None:
    text = jit.assembly("nf4", target)
    assert instruction in text
    assert all(f"gemv{rows}:" in text for rows in jit.ROWS)
    assert "ready:" in text


def test_threads_share_out_the_rows(monkeypatch: pytest.MonkeyPatch, close: Callable[[Tensor, Tensor], None]) -> None:
    monkeypatch.setattr(linear, "THREADED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, w = torch.randn(6, 128), base(50, 128, "nf4")
    close(linear.linear(x, w, None, 1.0), exact(x, w, None, 1.0))


def test_signs_are_laid_out_once_for_each_adapter() -> None:
    a = planes(20, 64, [1])
    ready = linear.prepare(a)
    assert a.native is ready
    assert ready.width == 32
    assert copy.deepcopy(a).native is None


def test_words_and_nibbles_hold_the_same_bits() -> None:
    bits = torch.randint(0, 2, (16, 32), dtype=torch.int32)
    by_output = (linear.words(bits).int()[:, :, None] >> torch.arange(16)) & 1  # (group, rank, output)
    by_rank = (linear.nibbles(bits).int()[:, :, None, :] >> torch.arange(8)[:, None]) & 1  # (group, 8, 8, output)
    assert torch.equal(by_output.permute(1, 0, 2).reshape(16, 32), bits)
    assert torch.equal(by_rank.flatten(1, 2).permute(1, 0, 2).reshape(16, 32), bits)
