"""How modules are found in graphs, and what is said when they are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_tools import two_layers, weights

from adaptc.base import Base
from adaptc.errors import AdaptcError, FormatError, NeedsError, UnsupportedError
from adaptc.formats.onnx.match import match
from adaptc.formats.onnx.model import open_model
from adaptc.formats.onnx.names import distance
from adaptc.tensorfile import write_tensors

SHAPES = {"net.first.weight": (24, 20), "net.second.weight": (20, 24)}
ANONYMOUS = ("onnx::MatMul_1", "onnx::Gemm_2")


def _base(file: Path, held: Mapping[str, Any]) -> Base:
    with file.open("wb") as f:
        write_tensors(f, {k: torch.as_tensor(w) for k, w in held.items()}, {})
    return Base(file)


def test_every_way(tmp_path: Path) -> None:
    cases = [("initializer name", two_layers(tmp_path / "a.onnx"), None),
             ("name scope", two_layers(tmp_path / "b.onnx", names=ANONYMOUS, scopes=True), None),
             ("node name", two_layers(tmp_path / "c.onnx", names=ANONYMOUS,
                                      nodes=("/net/first/MatMul", "/net/second/Gemm")), None),
             ("transposed weight values", two_layers(tmp_path / "d.onnx", names=ANONYMOUS),
              _base(tmp_path / "d.safetensors", weights()))]
    for how, path, held in cases:
        sites = match(open_model(path), SHAPES, held)
        assert sites["net.first.weight"].how == how
        assert sites["net.second.weight"].how == how.removeprefix("transposed ")
        assert [s.linears[0].turned for s in sites.values()] == [False, True]
        assert [s.linears[0].shape for s in sites.values()] == list(SHAPES.values())


def test_folded_from(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "a.onnx", names=ANONYMOUS)
    model = onnx.load(path)
    for name, module in zip(ANONYMOUS, SHAPES, strict=True):
        info = helper.make_tensor_value_info(name, 1, SHAPES[module][::-1] if "first" in module else SHAPES[module])
        info.metadata_props.add(key="pkg.onnxscript.optimizer.folded_from", value=str(["model." + module]))
        model.graph.value_info.append(info)
    onnx.save(model, path)
    assert {s.how for s in match(open_model(path), SHAPES).values()} == {"folded_from"}


def test_quantised_and_half_precision_weights(tmp_path: Path) -> None:
    """DequantizeLinear before a MatMul, and a bfloat16 checkpoint of a float32 graph."""
    w = weights()["net.first.weight"]
    codes = np.clip(np.round(w.T * 64), -127, 127).astype(np.int8)
    nodes = [helper.make_node("DequantizeLinear", ["net.first.weight", "scale"], ["w"]),
             helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, ["b", 20])],
                              [helper.make_tensor_value_info("y", 1, ["b", 24])],
                              [numpy_helper.from_array(codes, "net.first.weight"),
                               numpy_helper.from_array(np.array(1 / 64, np.float32), "scale")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "q.onnx")
    site = match(open_model(tmp_path / "q.onnx"), {"net.first.weight": (24, 20)})["net.first.weight"]
    assert not site.linears[0].direct
    half = {k: torch.from_numpy(v).bfloat16() for k, v in weights().items()}
    path = two_layers(tmp_path / "h.onnx", {k: v.float().numpy() for k, v in half.items()}, names=ANONYMOUS)
    assert len(match(open_model(path), SHAPES, _base(tmp_path / "half.safetensors", half))) == 2


@pytest.mark.parametrize(("path", "module", "apart"), [
    ("model.layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj", 0),
    ("base.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", 1),
    ("model.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.dense", 2),
    ("layers.1.mlp.up_proj", "layers.0.mlp.up_proj", None), ("dense", "encoder.layer.0.output.dense", None),
    ("decoder.layers.0.fc1", "encoder.layers.0.fc1", None),
])
def test_names_of_one_module(path: str, module: str, apart: int | None) -> None:
    assert distance(path, module) == apart


def test_errors_name_the_first_and_what_to_pass(tmp_path: Path) -> None:
    plain = open_model(two_layers(tmp_path / "a.onnx"))
    with pytest.raises(FormatError, match=r"net\.first\.weight: adapter is for shape \(24, 21\), node MatMul of h has"):
        match(plain, {"net.first.weight": (24, 21)})
    renamed = open_model(two_layers(tmp_path / "b.onnx", names=ANONYMOUS, nodes=("n1", "n2")))
    said = r"net\.first\.weight: no linear node of b\.onnx has its name, nor have 1 others of 2; the first node"
    with pytest.raises(NeedsError, match=said + " without a module is n1") as caught:
        match(renamed, SHAPES)
    assert caught.value.hint is not None
    assert "--weights" in caught.value.hint
    with pytest.raises(NeedsError, match="has its name or values") as other:
        match(renamed, SHAPES, _base(tmp_path / "other.safetensors", weights(1)))
    assert other.value.hint == "is this the base the adapter was made for?"
    same = weights()
    same["net.second.weight"] = np.ascontiguousarray(same["net.first.weight"].T)
    square = {k: np.ones((20, 20), np.float32) if k.endswith("weight") else v for k, v in same.items()}
    twice = open_model(two_layers(tmp_path / "s.onnx", square, names=ANONYMOUS, nodes=("n1", "n2")))
    with pytest.raises(FormatError, match=r"net\.first\.weight: nodes n1 and n2 hold the same values"):
        match(twice, {"net.first.weight": (20, 20)}, _base(tmp_path / "s.safetensors", square))


def test_a_parameter_that_no_linear_layer_reads(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Gather", ["wte.weight", "ids"], ["e"], name="lookup"),
                               helper.make_node("MatMul", ["e", "net.first.weight"], ["y"])], "g",
                              [helper.make_tensor_value_info("ids", 7, ["b"])],
                              [helper.make_tensor_value_info("y", 1, ["b", 24])],
                              [numpy_helper.from_array(np.ones((9, 20), np.float32), "wte.weight"),
                               numpy_helper.from_array(np.ones((20, 24), np.float32), "net.first.weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "g.onnx")
    with pytest.raises(NeedsError, match=r"wte\.weight is used by node lookup \(Gather\)") as caught:
        match(open_model(tmp_path / "g.onnx"), {"wte.weight": (9, 20)})
    assert caught.value.hint is not None
    assert "--merge disk" in caught.value.hint


def test_files_that_are_no_base(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "a.onnx", opset=12)
    with pytest.raises(UnsupportedError, match=r"a\.onnx: opset 12 at node MatMul, adaptc patches 13 to 26"):
        open_model(path)
    model = onnx.load(two_layers(tmp_path / "b.onnx"))
    model.ir_version = 14
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="IR version 14, ONNX Runtime takes up to 13"):
        open_model(tmp_path / "b.onnx")
    (tmp_path / "c.onnx").write_bytes(b"no model at all")
    cases: list[tuple[Path, type[AdaptcError], str]] = [
        (tmp_path / "c.onnx", FormatError, "no ONNX model"), (tmp_path / "none.onnx", NeedsError, "does not exist")]
    for file, kind, said in cases:
        with pytest.raises(kind, match=said):
            open_model(file)


def test_external_data(tmp_path: Path) -> None:
    model = onnx.load(two_layers(tmp_path / "a.onnx", nodes=("n1", "n2")))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=64)
    data = tmp_path / "b.data"
    opened = open_model(tmp_path / "b.onnx")
    assert np.array_equal(opened.values("net.second.weight"), weights()["net.second.weight"])
    whole = data.read_bytes()
    data.write_bytes(whole[:-5])
    with pytest.raises(FormatError, match=r"ends at byte 3920 of b\.data, which has 3915"):
        open_model(tmp_path / "b.onnx")
    data.unlink()
    with pytest.raises(NeedsError, match=r"net\.first\.weight of node n1 lies in b\.data, which is missing") as caught:
        open_model(tmp_path / "b.onnx")
    assert caught.value.hint == "put b.data beside b.onnx"
