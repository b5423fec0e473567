"""Models that ORT GenAI's builder made: fused q, k and v, float and int4, patched in place."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_tools import cli, run

from adaptc.formats.onnx.slots import slots_of

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]  # without k: its rows of the fused product get nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder with `fp32` and `int4` models and a PEFT adapter `lora`, ids, and PEFT's logits."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root, n = tmp_path_factory.mktemp("genai"), 160
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=n, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(root / "hf")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0").save_pretrained(
        root / "hf")
    for precision in ("fp32", "int4"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            where = ("hf", root / "hf", root / precision, precision, "cpu", root / "cache")
            arguments = (None, *map(str, where[1:3]), precision, "cpu", str(root / "cache"))
            create_model(*arguments, **parse_extra_options(*arguments, None))
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS)).eval()
    ids = torch.randint(3, n, (1, 6))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        logits = wrapped(input_ids=ids).logits.numpy()
    wrapped.save_pretrained(root / "lora")
    return root, ids.numpy(), logits


def _feed(ids: Any) -> dict[str, Any]:
    past = np.zeros((1, 2, 0, 16), np.float32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "past_key_values.0.key": past,
            "past_key_values.0.value": past}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_patched_in_place(made: tuple[Path, Any, Any], precision: str, tmp_path: Path, capsys: Any) -> None:
    root, ids, logits = made
    code, said, _ = cli(capsys, "export", root / "lora", "--onnx", "--base", root / precision, "-o", tmp_path / "o",
                        "--json")
    assert code == 0
    assert [m["how"] for m in said["modules"]].count("fused qkv_proj, ORT GenAI name") == 2
    file, feed = tmp_path / "o" / "model.onnx", _feed(ids)
    plain = run(root / precision / "model.onnx", feed)
    assert np.array_equal(run(file, feed), plain)
    with_it = run(file, feed, tmp_path / "o" / "lora.onnx_adapter")
    assert np.abs(with_it - plain).max() > 0.05
    # int4 weights move the logits themselves; what the adapter adds to them stays close to what PEFT adds.
    assert np.abs(with_it - logits).max() < (1e-4 if precision == "fp32" else 1.0)
    data = tmp_path / "o" / "model.onnx.data"
    assert data.read_bytes() == (root / precision / "model.onnx.data").read_bytes()
    assert file.stat().st_size - (root / precision / "model.onnx").stat().st_size < 4000


def test_names_are_those_of_genai(made: tuple[Path, Any, Any], tmp_path: Path, capsys: Any) -> None:
    root, ids, logits = made
    assert cli(capsys, "export", root / "lora", "--onnx", "--base", root / "fp32", "-o", tmp_path / "o")[0] == 0
    from adaptc.formats.onnx.model import open_model

    slots = slots_of(open_model(tmp_path / "o" / "model.onnx"))
    assert slots["model.layers.0.attn.q_proj"].a == "model.layers.0.attn.q_proj.lora_A.MatMul.weight"
    assert cli(capsys, "export", root / "lora", "--onnx", "--base", tmp_path / "o", "--adapter-only", "-o",
               tmp_path / "a")[0] == 0
    found = run(tmp_path / "o" / "model.onnx", _feed(ids), tmp_path / "a" / "lora.onnx_adapter")
    assert np.abs(found - logits).max() < 1e-4


def test_fused_weights_merge_where_they_are_floats(made: tuple[Path, Any, Any], tmp_path: Path, capsys: Any) -> None:
    root, ids, logits = made
    for how in ("load", "disk"):
        args = ("--onnx", "--base", root / "fp32", "--merge", how, "-o", tmp_path / how)
        assert cli(capsys, "export", root / "lora", *args)[0] == 0
        assert np.abs(run(tmp_path / how / "model.onnx", _feed(ids)) - logits).max() < 1e-4
    args = ("--onnx", "--base", root / "int4", "--merge", "disk", "-o", tmp_path / "no")
    code, _, err = cli(capsys, "export", root / "lora", *args)
    assert code == 1
    assert "MatMul_Q4 holds its weight in codes, which nothing can be folded into" in err
    assert "--slots" in err


def test_the_runtime_itself_loads_the_adapter(made: tuple[Path, Any, Any], tmp_path: Path, capsys: Any) -> None:
    """og.Adapters, as an application uses it."""
    import onnxruntime_genai as og

    root, ids, logits = made
    assert cli(capsys, "export", root / "lora", "--onnx", "--base", root / "fp32", "-o", tmp_path / "o")[0] == 0
    for beside in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "o" / beside).write_bytes((root / "fp32" / beside).read_bytes())
    model = og.Model(str(tmp_path / "o"))
    held = og.Adapters(model)
    held.load(str(tmp_path / "o" / "lora.onnx_adapter"), "lora")
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=20)
    generator = og.Generator(model, settings)
    generator.set_active_adapter(held, "lora")
    generator.append_tokens(ids.astype(np.int32))
    assert np.abs(generator.get_logits()[0, -1] - logits[0, -1]).max() < 1e-4
    assert onnx.load(tmp_path / "o" / "model.onnx", load_external_data=False).ir_version == 10
