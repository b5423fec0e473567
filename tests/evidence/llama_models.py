"""A tiny random Llama as transformers keeps it and as a GGUF model without a tokenizer, and a LoRA on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptc.tensorfile import write_tensors

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2}
_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Return the parameters of a random model."""
    random = torch.Generator().manual_seed(seed)
    width, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (320, width), "lm_head": (320, width),
                                          "model.norm": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        for name, shape in (("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (kv, width)),
                            ("self_attn.v_proj", (kv, width)), ("self_attn.o_proj", (width, width)),
                            ("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)),
                            ("mlp.down_proj", (width, inner)), ("input_layernorm", (width,)),
                            ("post_attention_layernorm", (width,))):
            shapes[f"model.layers.{i}.{name}"] = shape
    return {f"{k}.weight": torch.ones(s) if len(s) == 1 else torch.randn(*s, generator=random) * 0.06
            for k, s in shapes.items()}


def model_folder(at: Path, seed: int = 0) -> Path:
    """Write the folder transformers loads."""
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps(CONFIG))
    with (at / "model.safetensors").open("wb") as f:
        write_tensors(f, weights(seed), {"format": "pt"})
    return at


def model_gguf(at: Path, seed: int = 0, kind: str = "F32") -> Path:
    """Write the GGUF model by gguf's own writer: q and k reordered as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    out = gguf.GGUFWriter(str(at), "llama")
    for add, key in (("context_length", "max_position_embeddings"), ("embedding_length", "hidden_size"),
                     ("block_count", "num_hidden_layers"), ("feed_forward_length", "intermediate_size"),
                     ("head_count", "num_attention_heads"), ("head_count_kv", "num_key_value_heads"),
                     ("layer_norm_rms_eps", "rms_norm_eps"), ("rope_dimension_count", "head_dim"),
                     ("rope_freq_base", "rope_theta"), ("vocab_size", "vocab_size")):
        getattr(out, f"add_{add}")(CONFIG[key])
    out.add_tokenizer_model("no_vocab")
    for name, w in weights(seed).items():
        module = name.removesuffix(".weight")
        x = w.numpy()
        if module.endswith(("q_proj", "k_proj")):
            heads = CONFIG["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        layer = module.split(".layers.")
        theirs = ({"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}[module]
                  if len(layer) == 1 else f"blk.{layer[1].split('.')[0]}.{_NAMES[layer[1].split('.', 1)[1]]}")
        if x.ndim == 2 and kind != "F32":
            q = gguf.GGMLQuantizationType[kind]
            out.add_tensor(f"{theirs}.weight", gguf.quants.quantize(x, q), raw_dtype=q)
        else:
            out.add_tensor(f"{theirs}.weight", np.ascontiguousarray(x, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return at


def lora_folder(at: Path, rank: int = 16, alpha: float = 8.0, seed: int = 3, base: str = "tiny/llama",
                modules: tuple[str, ...] = tuple(_NAMES)[:7], **config: Any) -> Path:
    """Write a PEFT LoRA on every projection."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, w in weights().items():
        module = name.removesuffix(".weight")
        if w.dim() == 2 and module.endswith(modules):
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, w.shape[1], generator=random) / 16
            tensors[f"{stem}.lora_B.weight"] = torch.randn(w.shape[0], rank, generator=random) / 6
    at.mkdir(parents=True)
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
            "target_modules": sorted({m.rpartition(".")[2] for m in modules}), "base_model_name_or_path": base,
            **config}
    (at / "adapter_config.json").write_text(json.dumps(told))
    with (at / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, tensors, {"format": "pt"})
    return at
