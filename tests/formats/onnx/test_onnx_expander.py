"""Expanders of every codec: the decoder's own bits, in ONNX Runtime and in onnx.reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_tools import adapter_of, session

from adaptc.adapter import Adapter
from adaptc.delta import Delta, LowRank, Sparse
from adaptc.errors import UnsupportedError
from adaptc.formats.onnx.emit_delta import exact_product
from adaptc.formats.onnx.expander import expander, reference
from adaptc.formats.onnx.integers import integer_rows, radix
from adaptc.formats.onnx.slots import Slot
from adaptc.formats.onnx.values import is_full
from adaptc.passes import Context
from adaptc.quant.bitplane import bit_planes
from adaptc.quant.quantize import Quantize
from adaptc.quant.walsh import name_for
from adaptc.spectral import Spectral

SHAPES = ((96, 64), (64, 100), (70, 33))
METHODS = [None, *(Quantize(bits=b) for b in (0.7, 1.0, 3.0)),
           *(Quantize(method="affine", bits=float(b), group=g) for b, g in ((2, 64), (3, 7), (4, 64), (8, 100))),
           Quantize(method="nf4"), Quantize(method="fp8"),
           *(Quantize(method="bilora", bits=float(b)) for b in (1, 2, 4, 8))]


def _random(dtype: torch.dtype, shapes: tuple[tuple[int, int], ...] = SHAPES, rank: int = 8) -> Adapter:
    g = torch.Generator().manual_seed(0)
    return adapter_of({f"m.{i}.weight": LowRank(
        (torch.randn(rank, n, generator=g) / 9).to(dtype), (torch.randn(m, rank, generator=g) / 9).to(dtype), None, 0.7,
        (m, n)) for i, (m, n) in enumerate(shapes)})


def _slots(adapter: Adapter) -> dict[str, Slot]:
    out = {}
    for key, delta in adapter.deltas.items():
        stem, shape = key.removesuffix(".weight"), (delta.shape[0], delta.shape[1])
        out[key] = (Slot(stem, shape, delta=f"{stem}.lora_delta") if is_full(delta) else
                    Slot(stem, shape, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"))
    return out


def _bits(array: Any) -> Any:
    return array.view(np.int32)


def _same(adapter: Adapter) -> int:
    """Hold the expander against the decoder to the last bit in both runtimes; return the bytes of the graph."""
    slots = _slots(adapter)
    model = expander(adapter, slots, lambda key: torch.empty(0)).proto
    onnx.checker.check_model(model, full_check=True)
    wanted, names = reference(adapter, slots), [o.name for o in model.graph.output]
    assert set(names) == set(wanted)
    for found in (session(model.SerializeToString()).run(None, {}), ReferenceEvaluator(model).run(None, {})):
        for name, array in zip(names, found, strict=True):
            assert array.shape == wanted[name].shape
            assert np.array_equal(_bits(array), _bits(wanted[name])), name
    return len(model.SerializeToString())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_codecs(method: Quantize | None, dtype: torch.dtype) -> None:
    adapter = _random(dtype)
    _same(adapter if method is None else method(adapter, Context()).adapter)


def test_one_bit_package_is_a_sixteenth_of_the_float_factors() -> None:
    adapter = _random(torch.float32, ((768, 768), (768, 640), (640, 768)), 32)
    floats = sum(4 * 32 * sum(d.shape) for d in adapter.deltas.values())
    assert 16 * _same(Quantize(bits=1.0)(adapter, Context()).adapter) <= floats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("m", "n", "k", "scale"), [(64, 128, 40, 0.3), (300, 500, 7, 1.0), (30, 50, 1400, 2.0),
                                                    (900, 300, 3, 1.7), (8, 8, 0, 1.0)])
def test_sparse_changes(m: int, n: int, k: int, scale: float, dtype: torch.dtype) -> None:
    _same(adapter_of({"m.weight": _sparse(m, n, k, scale, dtype)}))


@pytest.mark.parametrize("n", [64, 96, 80, 28, 320])
def test_spectral_changes(n: int) -> None:
    s = _sparse(16, n, 60, 0.37, torch.float16)
    _same(adapter_of({"m.weight": Spectral(s.indices, s.values, name_for(n), 0.37, (16, n))}))


def _sparse(m: int, n: int, k: int, scale: float, dtype: torch.dtype) -> Sparse:
    g = torch.Generator().manual_seed(1)
    at = torch.randperm(m * n, generator=g)[:k].sort().values
    return Sparse(at, torch.randn(k, generator=g).to(dtype), scale, (m, n))


def test_sign_planes_around_a_core_are_folded_exactly() -> None:
    low = _random(torch.float32).deltas["m.0.weight"]
    assert isinstance(low, LowRank)
    b, a = low.factors()
    planes = bit_planes(b, a, 1.0, 1.2)
    made: Delta = LowRank(planes.q_codes.float(), planes.p_codes.float(), planes.core, 1.0, low.shape)
    assert exact_product(planes.p_codes, planes.core)
    assert _same(adapter_of({"m.weight": made})) < 3000
    core = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    assert not exact_product(b.float(), core)
    _same(adapter_of({"m.weight": LowRank(a.float(), b.float(), core, 0.3, low.shape)}))


def test_rows_of_integers_are_found_and_floats_are_not() -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-3, 4, (5, 40))
    w = (q * (rng.integers(1, 200, (5, 1)) * 2.0**-9)).astype(np.float32)
    found = integer_rows(w)
    assert found is not None
    back = np.zeros_like(w)
    for g in found:
        back[g.where] = (g.numbers * g.step + g.start).astype(np.float32) * g.scale[:, None]
        assert g.base <= 7
    assert np.array_equal(back, w)
    assert integer_rows(rng.standard_normal((3, 9)).astype(np.float32)) is None
    signs = integer_rows((rng.choice([-0.3, 0.3], (2, 64))).astype(np.float32))
    assert signs is not None
    assert signs[0].base == 2


@pytest.mark.parametrize(("base", "bits"), [(2, 1.0), (3, 1.6), (4, 2.0), (5, 2.4), (7, 3.0), (16, 4.0), (256, 8.0)])
def test_digits_pack_densely_and_come_back(base: int, bits: float) -> None:
    code = radix(base)
    assert 8 * code.nbytes / code.digits == pytest.approx(bits)
    digits = np.random.default_rng(0).integers(0, base, 101)
    words = code.pack(digits).reshape(-1, code.nbytes).astype(np.int64) @ 256 ** np.arange(code.nbytes)
    back = (words[:, None] // code.powers % base).reshape(-1)[:101]
    assert np.array_equal(back, digits)


def test_slots_that_hold_codes_take_no_expander(tmp_path: Path) -> None:
    slot = Slot("m.0", (96, 64), "m.0.lora_A.codes", "m.0.lora_B.codes", "m.0.lora_core")
    with pytest.raises(UnsupportedError, match=r"m\.0\.weight: input m\.0\.lora_A\.codes takes codes"):
        expander(_random(torch.float32), {"m.0.weight": slot}, lambda key: torch.empty(0))
