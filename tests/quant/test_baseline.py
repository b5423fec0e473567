"""The baselines against their dense definitions."""

from __future__ import annotations

import pytest
import torch

from adaptc.quant.baseline import NF4_BITS, sign_mean, truncation_nf4
from adaptc.quant.nf4 import NF4


def factors(count: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    g = torch.Generator().manual_seed(0)
    decay = 0.6 ** torch.arange(8)
    return {f"m{i}": (torch.randn(96, 8, generator=g) * decay, torch.randn(8, 128, generator=g), 0.5 + i)
            for i in range(count)}


def test_sign_mean_is_what_it_says() -> None:
    made = factors()
    lost = total = 0.0
    for b, a, s in made.values():
        dense = s * b.double() @ a.double()
        coded = s * (b.sign() * b.abs().double().mean()).double() @ (a.sign() * a.abs().double().mean()).double()
        lost, total = lost + float((dense - coded).square().sum()), total + float(dense.square().sum())
    found = sign_mean(made)
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert found.nbytes == 3 * ((96 + 128) * 8 // 8 + 8)


def test_nf4_price_is_that_of_the_codec() -> None:
    assert NF4().bits((16, 16384)) == pytest.approx(NF4_BITS, rel=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_truncation_and_nf4_keep_the_budget_and_beat_sign_mean(share: float) -> None:
    made = factors()
    whole = sum((b.numel() + a.numel()) for b, a, _ in made.values()) * NF4_BITS / 8
    found = truncation_nf4(made, int(share * whole) + 8)
    assert found.nbytes <= int(share * whole) + 8
    assert found.error < sign_mean(made).error
    if share == 1.0:
        lost = total = 0.0
        for b, a, s in made.values():
            u, d, vh = torch.linalg.svd(s * b.double() @ a.double(), full_matrices=False)
            root = d[:8].sqrt()
            pair = (u[:, :8] * root, root[:, None] * vh[:8])
            dense = [NF4.encode(t.float().contiguous()).decode().double() for t in pair]
            true = (u[:, :8] * d[:8]) @ vh[:8]
            lost, total = lost + float((true - dense[0] @ dense[1]).square().sum()), total + float(true.square().sum())
        assert found.error == pytest.approx((lost / total) ** 0.5, rel=0.05)  # signs of the SVD move single roundings
