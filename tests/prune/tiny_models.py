"""Tiny random models of every known family, and adapters on them, written as transformers and PEFT write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

WORDS = 61
_LLAMA = {"vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
          "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BERT = {"vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 3, "max_position_embeddings": 66, "pad_token_id": 0}
_BERT_TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]

CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": ({**_LLAMA, "attention_bias": True, "mlp_bias": True}, _ALL),
    "mistral": (_LLAMA, _ALL),
    "qwen2": (_LLAMA, _ALL),
    "qwen3": ({**_LLAMA, "num_attention_heads": 9, "hidden_size": 32}, _ALL),
    "gemma": ({**_LLAMA, "head_dim": 16, "intermediate_size": 48}, _ALL),
    "gemma2": ({**_LLAMA, "query_pre_attn_scalar": 16}, _ALL),
    "gemma3_text": ({**_LLAMA, "query_pre_attn_scalar": 16}, _ALL),
    "granite": (_LLAMA, _ALL),
    "smollm3": (_LLAMA, _ALL),
    "phi3": ({**_LLAMA, "hidden_size": 48}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "starcoder2": (_LLAMA, ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    "gpt2": ({"vocab_size": WORDS, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "n_inner": 20,
              "bos_token_id": 1, "eos_token_id": 2}, ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
    "bert": (_BERT, _BERT_TARGETS),
    "roberta": (_BERT, _BERT_TARGETS),
    "xlm-roberta": (_BERT, _BERT_TARGETS),
    "camembert": (_BERT, _BERT_TARGETS),
    "electra": ({**_BERT, "embedding_size": 24}, _BERT_TARGETS),
    "distilbert": ({"vocab_size": WORDS, "dim": 24, "hidden_dim": 20, "n_layers": 2, "n_heads": 3,
                    "max_position_embeddings": 64, "pad_token_id": 0}, ["q_lin", "v_lin", "lin1", "lin2"]),
}
DECODERS = tuple(k for k in CONFIGS if k not in ("bert", "roberta", "xlm-roberta", "camembert", "electra",
                                                 "distilbert"))
SLIM_HEADS = tuple(k for k in DECODERS if k != "gpt2")


def model_class(kind: str) -> Any:
    return transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModelForMaskedLM


def write_base(folder: Path, kind: str = "llama", seed: int = 0, shard: str = "5GB", **changes: Any) -> Path:
    """Write a random model whose weights, norms and biases are all far from their initial values."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind][0], **changes})
    model = model_class(kind).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.25 if p.dim() == 2 else 0.1))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def write_lora(folder: Path, base: Path, kind: str = "llama", seed: int = 1, rank: int = 4, **changes: Any) -> Path:
    """Write a PEFT LoRA on every projection of a base, both factors far from zero."""
    torch.manual_seed(seed)
    model = model_class(kind).from_pretrained(base)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": CONFIGS[kind][1], **changes}
    tuned = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    tuned.save_pretrained(folder)
    return folder


def tokens(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
