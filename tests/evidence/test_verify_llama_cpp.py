"""llama.cpp itself on a tiny Llama: every tensor type against torch with its roundings, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_models import lora_folder, model_folder, model_gguf

import adaptc
from adaptc.adapter import Adapter
from adaptc.errors import NeedsError, UsageError
from adaptc.evidence import verify_llama_cpp
from adaptc.evidence.llama_rounding import rounded_q8_0, rounded_q8_k
from adaptc.evidence.verify_llama_cpp import run_llama, verify
from adaptc.formats import gguf as writer
from adaptc.formats.gguf import Gguf
from adaptc.formats.gguf_arch import target_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: the real llama.cpp is not run")
    pytest.importorskip("transformers")
    at = tmp_path_factory.mktemp("llama")
    model_folder(at / "hf")
    model_gguf(at / "base.gguf")
    lora_folder(at / "lora")
    return at


@pytest.fixture(scope="module")
def source(bench: Path) -> Adapter:
    return adaptc.load(bench / "lora")


def write(bench: Path, adapter: Adapter, types: str, name: str) -> Path:
    made = Gguf(target_of(bench / "hf"), *types.split()).contents(adapter)[""]
    assert isinstance(made, bytes)
    (bench / name).write_bytes(made)
    return bench / name


@pytest.mark.parametrize(("types", "error"), [("f32 f32", 1e-5), ("f16 f16", 1e-3), ("q4_0 q4_0", 1e-2),
                                              ("tq1_0 bf16", 1e-2), ("tq2_0 q8_0", 1e-2), ("q1_0 q4_0", 1e-2)])
def test_every_type_runs_as_modelled(bench: Path, source: Adapter, types: str, error: float) -> None:
    path = write(bench, source, types, f"{types.replace(' ', '-')}.gguf")
    held, run = verify(path, bench / "base.gguf", source, bench / "hf", ())
    assert held.ok, held.said
    assert run.ok, run.said
    assert run.figures["error"] < error
    if types == "f32 f32":
        assert run.figures["largest"] < 1e-5
        assert run.figures["base_error"] < 1e-5


def test_one_module_agrees_to_the_order_of_summation(bench: Path, source: Adapter) -> None:
    """Rounded activations modelled, logits differ by 1e-5 at most but where a value lies on the edge of two codes."""
    key = "model.layers.1.mlp.down_proj.weight"
    path = write(bench, replace(source, deltas={key: source.deltas[key]}), "q1_0 q4_0", "one.gguf")
    reference = verify_llama_cpp.open_reference(bench / "hf")
    inputs = reference.ids(2, 24)
    made = adaptc.load(path)
    modelled = verify_llama_cpp._modelled(reference, made, {key: (41, 2)}, {}, inputs, 1.0)
    off = (run_llama(bench / "base.gguf", inputs, bench, path) - modelled).abs().amax(1)
    assert float(off.median()) < 1e-5
    assert int((off < 1e-5).sum()) >= 44  # of 48 positions
    plain = (run_llama(bench / "base.gguf", inputs, bench, path) - reference.outputs(inputs, made)).abs().amax(1)
    assert float(plain.median()) > 1e-3  # what it would be without the model of its rounding


def test_a_forgotten_permutation_is_found(bench: Path, source: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "row_order", lambda *a: None)
        path = write(bench, source, "q8_0 q8_0", "order.gguf")
    held, _ = verify(path, bench / "base.gguf", source, bench / "hf", ())
    assert held.cause == "wrong permutation"
    assert held.figures["weight_error"] > 0.3  # of dW over all modules, and llama.cpp says nothing


def test_wrong_scale_in_the_file(bench: Path, source: Adapter) -> None:
    twice = source.map(lambda _, d: replace(d, scale=2 * d.scale))  # type: ignore[type-var]
    held, _ = verify(write(bench, twice, "q1_0 q4_0", "twice.gguf"), bench / "base.gguf", source, bench / "hf", ())
    assert held.cause == "wrong scale"
    assert held.figures["scale"] == pytest.approx(2, rel=0.02)


def test_wrong_base(bench: Path, source: Adapter) -> None:
    path = write(bench, source, "f32 f32", "f32.gguf")
    other = model_gguf(bench / "other.gguf", seed=7)
    assert verify(path, other, None, bench / "hf", ())[0].cause == "wrong base"
    with pytest.raises(UsageError, match="no GGUF model"):
        verify(path, bench / "hf", None, None, ())


def test_a_quantized_base_and_its_own_reference(bench: Path, source: Adapter) -> None:
    path = write(bench, source, "q4_0 q4_0", "q4.gguf")
    (run,) = verify(path, model_gguf(bench / "q4_base.gguf", kind="Q4_0"), None, None, ())
    assert run.ok, run.said
    assert run.figures["base_error"] < 0.1


def test_without_llama_cpp_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_llama_cpp.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NeedsError, match="llama-cpp-python") as e:
        verify(tmp_path / "a.gguf", tmp_path / "b.gguf", None, None, ())
    assert "pip install" in str(e.value.hint)


def test_roundings_have_the_right_step() -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    for rounded, block in ((rounded_q8_0, 32), (rounded_q8_k, 256)):
        off = (rounded(x) - x).reshape(-1, block).abs().amax(1)
        step = x.reshape(-1, block).abs().amax(1) / 127
        assert bool((off <= 0.51 * step + 127 * step / 2048).all())
        assert bool((off > 0.2 * step).all())
        assert torch.equal(rounded(torch.zeros(1, 512)), torch.zeros(1, 512))
