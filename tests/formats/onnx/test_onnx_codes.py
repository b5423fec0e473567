"""Slots that hold codes: what the graph decodes is what was stored, in few bytes and few nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_tools import adapter_of, cli, run, session, two_layers, two_layers_run, weights

from adaptc.delta import LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.onnx.adapter_file import read_adapter_file
from adaptc.formats.onnx.codes import CODES, decode, encode
from adaptc.formats.onnx.export import Plan, export
from adaptc.formats.onnx.model import open_model

KEYS = ("net.first.weight", "net.second.weight")


def _low(m: int, n: int, rank: int = 4, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, n, generator=g) / 9, torch.randn(m, rank, generator=g) / 9, None, 2.0, (m, n))


def _adapter() -> Any:
    return adapter_of({k: _low(*weights()[k].shape) for k in KEYS})


@pytest.mark.parametrize("store", CODES)
@pytest.mark.parametrize("shape", [(40, 32), (33, 47)])  # whole bytes of levels, and not
def test_packing_is_exact_and_errors_fall_with_bits(store: str, shape: tuple[int, int]) -> None:
    low = _low(*shape)
    b, a = low.factors()
    codes_a, codes_b, core = encode(store, b, a, 4.0)
    code = CODES[store]
    assert codes_a.shape[0 if store == "int8" else 1] == code.nbytes(shape[1])
    assert codes_b.shape[1] == code.nbytes(shape[0])
    back_b, back_a = decode(store, codes_a, codes_b, core, shape)
    error = float((back_b @ back_a - b @ a).norm() / (b @ a).norm())
    assert error < {"sign": 0.45, "ternary": 0.7, "2bit": 0.55, "nf4": 0.17, "int8": 0.02}[store]


@pytest.mark.parametrize("required", [False, True], ids=["optional", "required"])
@pytest.mark.parametrize("store", CODES)
def test_the_graph_computes_with_what_was_stored(store: str, required: bool, tmp_path: Path) -> None:
    base = two_layers(tmp_path / "model.onnx", opset=21, ir=10)
    out = tmp_path / "o"
    out.mkdir()
    made = export(_adapter(), open_model(base), out, Plan("required" if required else "optional", store=store, bits=4.0,
                                                           name="a"))
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(out / "model.onnx"), strict_mode=True)
    stored, w = read_adapter_file(out / "a.onnx_adapter"), weights()
    for key in KEYS:
        stem = key.removesuffix(".weight")
        held = [stored[f"{stem}.{leaf}"] for leaf in ("lora_A.codes", "lora_B.codes", "lora_core")]
        b, a = decode(store, held[0], held[1], held[2], w[key].shape)
        w[key] = w[key] + (b @ a).numpy()
    x = np.random.default_rng(0).standard_normal((5, 20)).astype(np.float32)
    if required:
        found = session(out / "model.onnx").run(None, {"x": x, **stored})[0]
    else:
        found = run(out / "model.onnx", {"x": x}, out / "a.onnx_adapter")
        assert np.array_equal(run(out / "model.onnx", {"x": x}), run(base, {"x": x}))
    assert np.abs(found - two_layers_run(x, w)).max() < 1e-5
    assert made.error is not None
    assert 0 < made.error < 0.7


def test_float16_slots_of_a_float32_graph(tmp_path: Path) -> None:
    out, x = tmp_path / "o", np.ones((2, 20), np.float32)
    out.mkdir()
    made = export(_adapter(), open_model(two_layers(tmp_path / "model.onnx")), out,
                  Plan("optional", store="float16", name="a"))
    assert {a.dtype for a in read_adapter_file(out / "a.onnx_adapter").values()} == {np.dtype(np.float16)}
    w = {**weights(), **{k: weights()[k] + _adapter().deltas[k].dense().numpy() for k in KEYS}}
    assert np.abs(run(out / "model.onnx", {"x": x}, out / "a.onnx_adapter") - two_layers_run(x, w)).max() < 1e-2
    assert made.error is not None
    assert 0 < made.error < 1e-3


@pytest.mark.parametrize("plan", [Plan("optional", name="a"), Plan("optional", store="sign", bits=4.0, name="a"),
                                  Plan("optional", store="int8", name="a"), Plan(merge="load"), Plan(merge="disk")],
                         ids=lambda p: p.merge or p.store or "slots")
def test_a_half_precision_graph(plan: Plan, tmp_path: Path) -> None:
    model = onnx.load(two_layers(tmp_path / "model.onnx"))
    for i, tensor in enumerate(model.graph.initializer):
        array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        model.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = 10
    onnx.save(model, tmp_path / "model.onnx")
    out, x = tmp_path / "o", np.random.default_rng(0).standard_normal((2, 20)).astype(np.float16)
    out.mkdir()
    export(_adapter(), open_model(tmp_path / "model.onnx"), out, plan)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    file = out / "a.onnx_adapter"
    found = run(out / "model.onnx", {"x": x}, file if file.exists() else None)
    w = {**weights(), **{k: weights()[k] + _adapter().deltas[k].dense().numpy() for k in KEYS}}
    assert np.abs(found - two_layers_run(x, w)).max() < (0.6 if plan.store == "sign" else 0.03)
    if file.exists():
        assert np.array_equal(run(out / "model.onnx", {"x": x}), run(tmp_path / "model.onnx", {"x": x}))
        wanted = {"": {"float16"}, "sign": {"uint8", "float16"}, "int8": {"int8", "float16"}}[plan.store]
        assert {str(a.dtype) for a in read_adapter_file(file).values()} == wanted


def test_slots_of_a_fixed_rank_are_filled_up(tmp_path: Path) -> None:
    """As graphs exported with an adapter inside have them; a larger rank is refused with the number."""
    base, out = two_layers(tmp_path / "model.onnx"), tmp_path / "o"
    out.mkdir()
    export(_adapter(), open_model(base), out, Plan("required", name="a"))
    model = onnx.load(out / "model.onnx")
    for value in model.graph.input[1:]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 6
    onnx.save(model, out / "fixed.onnx")
    export(_adapter(), open_model(out / "fixed.onnx"), tmp_path, Plan(adapter_only=True, name="six"))
    arrays = read_adapter_file(tmp_path / "six.onnx_adapter")
    assert arrays["net.first.lora_A.weight"].shape == (20, 6)
    x = np.ones((2, 20), np.float32)
    w = {**weights(), **{k: weights()[k] + _adapter().deltas[k].dense().numpy() for k in KEYS}}
    assert np.abs(session(out / "fixed.onnx").run(None, {"x": x, **arrays})[0] - two_layers_run(x, w)).max() < 1e-5
    wide = adapter_of({k: _low(*weights()[k].shape, rank=7) for k in KEYS})
    with pytest.raises(FormatError, match=r"rank 7, input net\.first\.lora_A\.weight takes 6"):
        export(wide, open_model(out / "fixed.onnx"), tmp_path / "none", Plan(adapter_only=True))


def test_one_bit_file_is_a_sixteenth_and_the_graph_stays_small(tmp_path: Path) -> None:
    """Whole files: 1/16 of the float32 adapter's, 10 KB of graph beside the table of levels for eight modules."""
    n = 384
    held = {k: np.zeros((n, n), np.float32) for k in KEYS} | {"net.second.bias": np.zeros(n, np.float32)}
    base = two_layers(tmp_path / "model.onnx", held)
    adapter = adapter_of({k: _low(n, n, 32, seed) for seed, k in enumerate(KEYS)})
    sizes = {}
    for store in ("float32", "sign"):
        out = tmp_path / store
        out.mkdir()
        export(adapter, open_model(base), out, Plan("optional", store=store, name="a"))
        sizes[store] = (out / "a.onnx_adapter").stat().st_size
        added = (out / "model.onnx").stat().st_size - base.stat().st_size
        table = 256 * 8 * 4 if store == "sign" else 0
        assert added - table < 10_000
        assert (added - table) / len(KEYS) < 1_500
    assert 16 * sizes["sign"] <= sizes["float32"]


def test_constant_folding_can_be_switched_off(tmp_path: Path) -> None:
    """Folded, codes become a float matrix when the session is made; the config entry keeps them as they are."""
    out, x = tmp_path / "o", np.ones((2, 20), np.float32)
    out.mkdir()
    export(_adapter(), open_model(two_layers(tmp_path / "model.onnx")), out, Plan(merge="load"))
    shapes = {}
    for name, config in (("folded", {}), ("kept", {"optimization.disable_specified_optimizers": "ConstantFolding"})):
        options, optimised = {**config}, tmp_path / f"{name}.onnx"
        made = _optimised(out / "model.onnx", optimised, options)
        shapes[name] = [n.op_type for n in onnx.load(optimised).graph.node]
        w = {**weights(), **{k: weights()[k] + _adapter().deltas[k].dense().numpy() for k in KEYS}}
        assert np.abs(made.run(None, {"x": x})[0] - two_layers_run(x, w)).max() < 1e-5
    assert len(shapes["folded"]) == 3
    assert len(shapes["kept"]) > 5


def _optimised(model: Path, out: Path, config: dict[str, str]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.optimized_model_filepath = 1, 3, str(out)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("how", ["load", "disk"])
def test_sparse_changes_are_merged_and_refused_as_files(how: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    deltas = {k: Sparse(torch.randperm(480, generator=g)[:30].sort().values, torch.randn(30, generator=g).half(), 0.3,
                        weights()[k].shape) for k in KEYS}
    out, x = tmp_path / "o", np.ones((2, 20), np.float32)
    out.mkdir()
    base = two_layers(tmp_path / "model.onnx")
    export(adapter_of(deltas), open_model(base), out, Plan(merge=how))
    w = {**weights(), **{k: weights()[k] + deltas[k].dense().numpy() for k in KEYS}}
    assert np.abs(run(out / "model.onnx", {"x": x}) - two_layers_run(x, w)).max() < 1e-5
    with pytest.raises(UnsupportedError, match=r"net\.first\.weight: a sparse change fed as a matrix"):
        export(adapter_of(deltas), open_model(base), tmp_path / "none", Plan("optional"))
    fed = tmp_path / "e"
    fed.mkdir()
    export(adapter_of(deltas), open_model(base), fed, Plan("optional", expander=True))
    values = {o.name: v for e in [session(fed / "expander.onnx")] for o, v in zip(e.get_outputs(), e.run(None, {}),
                                                                                 strict=True)}
    found = session(fed / "model.onnx").run(None, {"x": x, **values})[0]
    assert np.abs(found - two_layers_run(x, w)).max() < 1e-5
    assert np.array_equal(run(fed / "model.onnx", {"x": x}), run(base, {"x": x}))


def test_a_model_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged weights move to a file of their own where a protobuf could not hold them."""
    monkeypatch.setattr("adaptc.formats.onnx.model.LARGEST_PROTO", 1000)
    out, x = tmp_path / "o", np.ones((2, 20), np.float32)
    out.mkdir()
    export(_adapter(), open_model(two_layers(tmp_path / "model.onnx")), out, Plan(merge="disk"))
    assert (out / "model.onnx").stat().st_size < 2000
    assert (out / "model.onnx.added").stat().st_size >= 2 * 24 * 20 * 4
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    w = {**weights(), **{k: weights()[k] + _adapter().deltas[k].dense().numpy() for k in KEYS}}
    assert np.abs(run(out / "model.onnx", {"x": x}) - two_layers_run(x, w)).max() < 1e-5


def test_refusals(tmp_path: Path, capsys: Any) -> None:
    base = two_layers(tmp_path / "model.onnx")
    out = tmp_path / "o"
    out.mkdir()
    export(_adapter(), open_model(base), out, Plan("optional", name="a"))
    other = adapter_of({"net.third.weight": _low(24, 20)})
    with pytest.raises(NeedsError, match=r"net\.third\.weight: none of the 2 slots of model\.onnx is for it"):
        export(other, open_model(out / "model.onnx"), tmp_path / "none", Plan(adapter_only=True))
    with pytest.raises(NeedsError, match=r"model\.onnx has no adapter inputs"):
        export(_adapter(), open_model(base), tmp_path / "none", Plan(adapter_only=True))
    wrong = adapter_of({"net.first.weight": _low(24, 21)})
    with pytest.raises(FormatError, match=r"adapter is for shape \(24, 21\), input net\.first\.lora_A\.weight for"):
        export(wrong, open_model(out / "model.onnx"), tmp_path / "none", Plan(adapter_only=True))
    dense = adapter_of({"net.first.weight": _low(24, 20, 24)})
    with pytest.raises(UnsupportedError, match="has no factors for a slot"):
        export(dense, open_model(base), tmp_path / "none", Plan("optional"))
    ia3 = adapter_of({"net.first.weight": NeedsBase("ia3", {"l": torch.ones(24)}, {"axis": 0}, (24, 20))})
    with pytest.raises(NeedsError, match=r"net\.first\.weight: ia3 is only defined on base weights"):
        export(ia3, open_model(base), tmp_path / "none", Plan("optional"))
    marked = adapter_of(dict(_adapter().deltas), fingerprint="0" * 16)
    with pytest.raises(FormatError, match=r"have fingerprint .*, the adapter was made for 0000"):
        export(marked, open_model(base), tmp_path / "none", Plan("optional"))
    code, _, err = cli(capsys, "export", out, "--onnx", "--base", base, "--slots", "optional", "--target", "ort-web")
    assert code == 2
    assert "ort-web cannot feed optional inputs" in err
