"""Exported bases with adapters in ONNX Runtime against PEFT, and without them against the untouched base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_tools import Tuned, cli, expanded, run, session

from adaptc.formats.onnx.adapter_file import read_adapter_file

TOLERANCE = 1e-4
EVERY = ("llama", "llama-dora", "bert", "gpt2")


@pytest.fixture
def case(request: pytest.FixtureRequest, tuned: dict[str, Tuned]) -> Tuned:
    return tuned[request.param]


@pytest.mark.parametrize("case", EVERY, indirect=True)
def test_optional_slots_leave_the_base_as_it_was(case: Tuned, tmp_path: Path, capsys: Any) -> None:
    code, said, _ = cli(capsys, "export", case.folder, "--onnx", "--base", case.base, "-o", tmp_path / "o", "--json")
    assert code == 0
    assert {m["how"] for m in said["modules"]} <= {"name scope", "replaced or folded whole"}
    plain = run(case.base, case.feed)
    assert np.array_equal(run(tmp_path / "o" / "model.onnx", case.feed), plain)
    with_it = run(tmp_path / "o" / "model.onnx", case.feed, tmp_path / "o" / f"{case.folder.name}.onnx_adapter")
    assert np.abs(with_it - case.logits).max() < TOLERANCE
    assert np.abs(plain - case.logits).max() > 100 * TOLERANCE  # the adapter does something


@pytest.mark.parametrize("case", EVERY, indirect=True)
def test_required_slots_are_fed_by_file_or_expander(case: Tuned, tmp_path: Path, capsys: Any) -> None:
    args = ("--onnx", "--base", case.base, "--slots", "required")
    assert cli(capsys, "export", case.folder, *args, "-o", tmp_path / "f")[0] == 0
    assert cli(capsys, "export", case.folder, *args, "--expander", "-o", tmp_path / "e")[0] == 0
    model = session(tmp_path / "f" / "model.onnx")
    assert all(i.name in case.feed or "lora" in i.name or i.name.endswith(".replaced") for i in model.get_inputs())
    for fed in (read_adapter_file(tmp_path / "f" / f"{case.folder.name}.onnx_adapter"),
                expanded(tmp_path / "e" / "expander.onnx")):
        found = model.run(None, {**case.feed, **fed})[0]
        assert np.abs(found - case.logits).max() < TOLERANCE


@pytest.mark.parametrize("how", ["load", "disk"])
@pytest.mark.parametrize("case", EVERY, indirect=True)
def test_merged(case: Tuned, how: str, tmp_path: Path, capsys: Any) -> None:
    args = ("--onnx", "--base", case.base, "--merge", how, "-o", tmp_path / "o")
    assert cli(capsys, "export", case.folder, *args)[0] == 0
    assert np.abs(run(tmp_path / "o" / "model.onnx", case.feed) - case.logits).max() < TOLERANCE


def test_base_exported_from_its_folder(tuned: dict[str, Tuned], bases: dict[str, Path], tmp_path: Path, capsys: Any
                                       ) -> None:
    case = tuned["bert"]
    code, said, _ = cli(capsys, "export", case.folder, "--onnx", "--base", bases["bert"], "-o", tmp_path / "o",
                        "--json")
    assert code == 0
    assert said["notes"] == ["bert exported as a classifier, opset 20, IR 10"]
    found = run(tmp_path / "o" / "model.onnx", case.feed, tmp_path / "o" / "bert.onnx_adapter")
    assert np.abs(found - case.logits).max() < TOLERANCE


def test_files_are_valid_and_say_what_they_are(tuned: dict[str, Tuned], tmp_path: Path, capsys: Any) -> None:
    case = tuned["llama"]
    cli(capsys, "export", case.folder, "--onnx", "--base", case.base, "--slots", "required", "--expander", "-o",
        tmp_path / "o")
    for name in ("model.onnx", "expander.onnx"):
        file = tmp_path / "o" / name
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
        said = {p.key: p.value for p in model.metadata_props}
        assert said["adaptc.adapter"] == "llama"
        assert said["adaptc.history"] == "[]"
        assert said["adaptc.base"]
        assert model.ir_version == 10
        assert {o.version for o in model.opset_import if not o.domain} <= {20, 21}


def test_second_adapter_of_another_rank_for_the_same_slots(tuned: dict[str, Tuned], tmp_path: Path, capsys: Any
                                                           ) -> None:
    case = tuned["llama"]
    cli(capsys, "export", case.folder, "--onnx", "--base", case.base, "-o", tmp_path / "o")
    assert cli(capsys, "compress", case.folder, "-o", tmp_path / "small", "--rank", "2")[0] == 0
    code, said, _ = cli(capsys, "export", tmp_path / "small", "--onnx", "--base", tmp_path / "o" / "model.onnx",
                        "--adapter-only", "-o", tmp_path / "a", "--json")
    assert code == 0
    assert list(said["files"]) == ["small.onnx_adapter"]
    cli(capsys, "export", tmp_path / "small", "--onnx", "--base", case.base, "--merge", "disk", "-o", tmp_path / "m")
    found = run(tmp_path / "o" / "model.onnx", case.feed, tmp_path / "a" / "small.onnx_adapter")
    assert np.abs(found - run(tmp_path / "m" / "model.onnx", case.feed)).max() < TOLERANCE


def test_modules_found_by_value_where_all_names_are_gone(tuned: dict[str, Tuned], bases: dict[str, Path],
                                                         tmp_path: Path, capsys: Any) -> None:
    case = tuned["llama"]
    model = onnx.load(case.base)
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    for number, tensor in enumerate(model.graph.initializer):
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == tensor.name:
                    node.input[i] = f"t{number}"
        tensor.name = f"t{number}"
    onnx.save(model, tmp_path / "bare.onnx")
    args = ("export", case.folder, "--onnx", "--base", tmp_path / "bare.onnx", "-o", tmp_path / "o")
    code, _, err = cli(capsys, *args)
    assert code == 1
    assert "no linear node of bare.onnx has its name, nor have 6 others of 7" in err
    assert "pass --weights" in err
    code, said, _ = cli(capsys, *args, "--weights", bases["llama"], "--json")
    assert code == 0
    assert {m["how"] for m in said["modules"]} == {"transposed weight values"}
    found = run(tmp_path / "o" / "bare.onnx", case.feed, tmp_path / "o" / "llama.onnx_adapter")
    assert np.abs(found - case.logits).max() < TOLERANCE
