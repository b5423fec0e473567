"""ONNX Runtime, ORT GenAI and PEFT on a tiny Llama: what verify finds in slots, expanders, merged models, folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_models import lora_folder, model_folder

import adaptc
from adaptc.adapter import Adapter
from adaptc.cli.main import main
from adaptc.errors import FormatError, NeedsError, UsageError

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("transformers")

from adaptc.evidence import verify_ort, verify_ort_genai, verify_peft  # noqa: E402
from adaptc.formats.onnx.export import Plan, export  # noqa: E402
from adaptc.formats.onnx.hf import export_model  # noqa: E402
from adaptc.formats.onnx.model import open_model  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its ONNX export, an adapter, and what --onnx makes of the two."""
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    at = tmp_path_factory.mktemp("ort")
    model_folder(at / "hf")
    lora_folder(at / "lora", rank=4)
    (at / "onnx").mkdir()
    export_model(at / "hf", at / "onnx" / "model.onnx", "lm")
    adapter = adaptc.load(at / "lora")
    for name, plan in {"slots": Plan("optional", name="lora"), "merged": Plan(merge="disk"),
                       "web": Plan("required", expander=True)}.items():
        (at / name).mkdir()
        export(adapter, open_model(at / "onnx" / "model.onnx"), at / name, plan)
    return at


@pytest.fixture(scope="module")
def source(bench: Path) -> Adapter:
    return adaptc.load(bench / "lora")


def refit(bench: Path, adapter: Adapter, name: str, store: str = "") -> Path:
    """Write what the slots would be fed for another adapter."""
    out = bench / name
    out.mkdir()
    export(adapter, open_model(bench / "slots" / "model.onnx"), out, Plan(adapter_only=True, store=store, name=name))
    return out / f"{name}.onnx_adapter"


@pytest.mark.parametrize("folder", ["slots", "web", "merged"])
def test_what_onnx_export_writes_does_what_torch_does(bench: Path, source: Adapter, folder: str) -> None:
    found = verify_ort.verify(bench / folder, bench / "hf", source, None, ())
    assert all(v.ok for v in found), [v.said for v in found]
    assert found[-1].figures["largest"] < 1e-4
    assert found[-1].figures["effect"] > 0.1


def test_without_the_source_it_runs_too(bench: Path) -> None:
    (run,) = verify_ort.verify(bench / "slots" / "lora.onnx_adapter", bench / "slots" / "model.onnx", None,
                               bench / "hf", ())
    assert run.ok
    with pytest.raises(NeedsError, match="does not tell its adapter"):
        verify_ort.verify(bench / "merged", bench / "hf", None, None, ())
    with pytest.raises(NeedsError, match="in torch is not known"):
        verify_ort.verify(bench / "slots" / "lora.onnx_adapter", bench / "slots" / "model.onnx", None, None, ())


def test_mistakes_by_name(bench: Path, source: Adapter) -> None:
    twice = source.map(lambda _, d: replace(d, scale=2 * d.scale))  # type: ignore[type-var]
    base = bench / "slots" / "model.onnx"
    held, run = verify_ort.verify(refit(bench, twice, "twice"), base, source, bench / "hf", ())
    assert held.cause == "wrong scale"
    assert run.ok
    nothing = source.map(lambda _, d: replace(d, b=torch.zeros_like(d.b)))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="changes no output"):
        verify_ort.verify(refit(bench, nothing, "nothing"), base, None, bench / "hf", ())
    other = model_folder(bench / "other", seed=5)
    assert verify_ort.verify(bench / "slots", other, None, None, ())[0].cause == "wrong base"
    plain = verify_ort.verify(bench / "slots" / "lora.onnx_adapter", bench / "onnx" / "model.onnx", None,
                              bench / "hf", ())
    assert "has no input" in plain[0].said


def test_a_merged_model_of_twice_the_adapter_is_measured(bench: Path, source: Adapter) -> None:
    half = source.map(lambda _, d: replace(d, scale=d.scale / 2))  # type: ignore[type-var]
    (run,) = verify_ort.verify(bench / "merged", bench / "hf", half, None, ())
    assert run.cause == "wrong scale"
    assert run.figures["scale"] == pytest.approx(2, rel=1e-2)


def test_peft_and_its_silent_mistakes(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert main(["verify", str(bench / "lora"), "--runtime", "peft", "--base", str(bench / "hf"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert said["checks"][0]["figures"]["error"] < 1e-4
    source = adaptc.load(bench / "lora")
    odd = tmp_path / "odd"
    shutil.copytree(bench / "lora", odd)
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16.0}))
    assert verify_peft.verify(odd, bench / "hf", source, None, ())[0].cause == "wrong scale"
    assert main(["verify", str(odd), "--runtime", "peft", "--base", str(bench / "hf"), "--adapter",
                 str(bench / "lora")]) == 1
    assert "wrong scale" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no PEFT folder"):
        verify_peft.verify(bench / "hf", bench / "hf", None, None, ())


def test_ort_genai_loads_what_is_exported(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from transformers import PreTrainedTokenizerFast

    hf, out = tmp_path / "hf", tmp_path / "gen"
    shutil.copytree(bench / "hf", hf)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(320)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2",
                            pad_token="t0").save_pretrained(hf)
    args = (None, str(hf), str(out), "fp32", "cpu", str(tmp_path / "cache"))
    create_model(*args, **parse_extra_options(*args, []))
    made = tmp_path / "made"
    assert main(["export", str(bench / "lora"), "--ort-genai", "--base", str(out), "-o", str(made)]) == 0
    assert "og.Adapters(model).load" in capsys.readouterr().out
    held, run = verify_ort_genai.verify(made, made, adaptc.load(bench / "lora"), hf, ())
    assert held.ok
    assert run.ok
    assert run.figures["largest"] < 1e-4
    only = tmp_path / "only"
    assert main(["export", str(bench / "lora"), "--ort-genai", "--base", str(made), "-o", str(only)]) == 0
    assert [p.name for p in only.iterdir()] == ["lora.onnx_adapter"]
    assert "has no input" in verify_ort_genai.verify(made, out, None, hf, ())[0].said
    with pytest.raises(UsageError, match=r"no genai_config\.json"):
        verify_ort_genai.verify(made, hf, None, hf, ())
    (out / "genai_config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"names no model\.decoder"):
        verify_ort_genai.verify(made, out, None, hf, ())


def test_a_head_that_the_base_lacks_is_the_adapters_on_both_sides(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=48)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    tuned = peft.get_peft_model(
        transformers.BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3),
        peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p += torch.randn_like(p) * 0.3
    tuned.save_pretrained(tmp_path / "lora")
    source = adaptc.load(tmp_path / "lora")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "out").mkdir()
    model = export_model(tmp_path / "encoder", tmp_path / "onnx" / "model.onnx", "classify", 3)
    export(source, model, tmp_path / "out", Plan("optional", name="lora"))
    found = verify_ort.verify(tmp_path / "out", tmp_path / "encoder", source, None, ())
    assert all(v.ok for v in found), [v.said for v in found]
    assert found[-1].figures["base_error"] < 1e-4
