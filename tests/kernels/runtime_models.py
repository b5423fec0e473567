"""Toy models of three families with random weights, and PEFT adapters on them as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def model(family: str) -> nn.Module:
    """Return a model of a family, the same at every call."""
    import transformers as t

    torch.manual_seed(3)
    made: nn.Module
    if family == "llama":
        made = t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2))
    elif family == "bert":
        made = t.BertForSequenceClassification(t.BertConfig(
            vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4))
    else:
        made = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64))
    return made.eval()


def ids(rows: int = 2, length: int = 7) -> Tensor:
    torch.manual_seed(11)
    return torch.randint(0, 96, (rows, length))


def trained(base: nn.Module, config: Any, seed: int = 5) -> Any:
    """Return a PEFT model with every trainable tensor random."""
    made = peft.get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad:
                p += torch.randn_like(p) * (0.02 if "magnitude" in name or "modules_to_save" in name else 0.1)
    return made


def lora(family: str, **options: Any) -> Any:
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": task, **options})


def saved(family: str, folder: Path, seed: int = 5, config: Any = None) -> Tensor:
    """Write an adapter on the family's model; return PEFT's own logits."""
    made = trained(model(family), config or lora(family), seed)
    with torch.no_grad():
        out: Tensor = made(ids()).logits
    made.save_pretrained(str(folder))
    return out
