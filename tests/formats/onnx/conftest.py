"""Tiny transformers models, their ONNX exports and PEFT adapters, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("onnxscript", reason="the onnx extra is not installed")

from onnx_tools import Tuned, tune

from adaptc.formats.onnx.hf import export_module

VOCABULARY = 61


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2))


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, num_labels=3))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=32,
                                      bos_token_id=1, eos_token_id=2))


MADE = {"llama": (_llama, "lm"), "bert": (_bert, "classify"), "gpt2": (_gpt2, "lm")}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models with random weights, `model.onnx` in a folder `onnx` beside."""
    root = tmp_path_factory.mktemp("bases")
    out = {}
    for kind, (make, task) in MADE.items():
        torch.manual_seed(0)
        model = make().eval()
        model.save_pretrained(root / kind)
        (root / kind / "onnx").mkdir()
        export_module(model, root / kind / "onnx" / "model.onnx", task)
        out[kind] = root / kind
    return out


@pytest.fixture(scope="session")
def tuned(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tuned]:
    """Adapters by name, with what PEFT computes with them."""
    root = tmp_path_factory.mktemp("adapters")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", {"target_modules": every, "use_rslora": True}),
        "llama-dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
        "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    }
    return {name: tune(bases[kind], MADE[kind][1], root / name, config) for name, (kind, config) in wanted.items()}
