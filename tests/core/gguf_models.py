"""GGUF files of small random models, made with the gguf package the way llama.cpp's converter makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTS = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}


def hf_model(family: str) -> Any:
    """Return a random transformers model of a GGUF architecture."""
    import transformers as t

    torch.manual_seed(3)
    plain = {k: v for k, v in SIZES.items() if k != "head_dim"}
    made: dict[str, Any] = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, attention_bias=True)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**plain)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES)), "gemma": (t.GemmaForCausalLM, t.GemmaConfig(**SIZES)),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**SIZES)),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**SIZES)),
        "phi2": (t.PhiForCausalLM, t.PhiConfig(**plain | {"num_key_value_heads": 4})),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**plain, pad_token_id=0)),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        "bert": (t.BertModel, t.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                           num_attention_heads=4, max_position_embeddings=32)),
    }
    kind, config = made[family]
    model = kind(config)
    for p in model.parameters():
        p.data = torch.randn_like(p)
    return model


def converted(family: str, name: str, w: Tensor, config: Any) -> Tensor:
    """Return a parameter as the converter stores it: rotary halves in turns, norms plus one, matrices (out, in)."""
    if family == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = w.reshape(heads, 2, -1, *w.shape[1:])
        return torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(w.shape)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return w + 1
    return w.T if family == "gpt2" and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and w.dim() == 2 else w


def write_gguf(path: Path, family: str, model: Any, kind: str = "F32") -> set[str]:
    """Write a model as GGUF, matrices as `kind`; return the names of the parameters that are in it."""
    import gguf

    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family)
    config, names = model.config, gguf.get_tensor_name_map(arch, 2)
    writer = gguf.GGUFWriter(path, family)
    for key, field in FACTS.items():
        value = getattr(config, field, None)
        writer.add_uint32(f"{family}.{key}", 128 if value is None else value)
    if getattr(config, "head_dim", None):
        writer.add_uint32(f"{family}.attention.key_length", config.head_dim)
        writer.add_uint32(f"{family}.rope.dimension_count", config.head_dim)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(64)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 64)
    writer.add_string("general.name", "small")
    written = set()
    for name, w in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is not None and name != "lm_head.weight":  # tied, or left out by the converter (BERT's pooler)
            stored = gguf.GGMLQuantizationType[kind if w.dim() == 2 else "F32"]
            data = converted(family, name, w, config).float().contiguous().numpy()
            writer.add_tensor(theirs, gguf.quantize(data, stored), raw_dtype=stored)
            written.add(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
