"""What llama.cpp calls the modules of a model family, and how its converter reorders the rows of q and k."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.gguf_header import GgufHeader, read_gguf_header

_LLAMA = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
          "ffn_down": "mlp.down_proj"}
_PHI2 = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_PHI3 = {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
         "ffn_down": "mlp.down_proj"}
_GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_BERT = {"attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
         "attn_output": "attention.output.dense", "ffn_up": "intermediate.dense", "ffn_down": "output.dense"}
_STARCODER2 = {**_PHI2, "attn_output": "self_attn.o_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


@dataclass(frozen=True)
class Family:
    """One llama.cpp architecture: module names in a layer, where layers lie, modules outside of layers.

    `permutes`: its converter brings the rows of q and k into the interleaved order of rotary pairs.
    """

    layers: str
    modules: Mapping[str, str]
    outside: Mapping[str, str]
    permutes: bool = False


_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_ROTARY = Family("model.layers", _LLAMA, _TOP)
_TIED = Family("model.layers", _LLAMA, {"token_embd": "model.embed_tokens"})  # llama.cpp has no head of their own
_PERMUTED = Family("model.layers", _LLAMA, _TOP, permutes=True)
FAMILIES: dict[str, Family] = {
    "llama": _PERMUTED, "smollm3": _PERMUTED, "granite": _PERMUTED, "qwen2": _ROTARY, "qwen3": _ROTARY,
    "gemma": _TIED, "gemma2": _TIED, "gemma3": _ROTARY, "command-r": _TIED, "olmo2": _ROTARY,
    "stablelm": _ROTARY, "phi2": Family("model.layers", _PHI2, _TOP), "phi3": Family("model.layers", _PHI3, _TOP),
    "starcoder2": Family("model.layers", _STARCODER2, _TOP),
    "gpt2": Family("transformer.h", _GPT2, {"token_embd": "transformer.wte", "output": "lm_head"}),
    "bert": Family("bert.encoder.layer", _BERT, {"token_embd": "bert.embeddings.word_embeddings"})}
# transformers' model_type -> architecture, where the two differ.
_TYPES = {"mistral": "llama", "gemma3_text": "gemma3", "cohere": "command-r", "phi": "phi2"}
# What may stand before the path of a layer: task wrappers of transformers, none of them for a bare model.
_WRAPPERS = ("", "model.", "transformer.", "bert.", "roberta.", "encoder.", "bert.encoder.", "model.language_model.",
             "language_model.model.", "base_model.model.model.")
_LAYER = re.compile(r"(.*?)(layers|layer|h)\.(\d+)\.(.+)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Target:
    """The model an adapter is written for: architecture, heads and tied embeddings (None where nobody told)."""

    arch: str
    heads: int | None = None
    kv_heads: int | None = None
    tied: bool | None = None

    @property
    def family(self) -> Family:
        """The names of the architecture."""
        return FAMILIES[self.arch]

    @property
    def one_embedding(self) -> bool:
        """Whether the head is the embedding, as far as is known: by the model's config, or by the architecture."""
        return bool(self.tied) or self.family is _TIED


def target_of(base: Path) -> Target:
    """Return what a base model is: a folder with config.json, such a file, or a GGUF model.

    Raises NeedsError where neither is there, UnsupportedError for a family whose names and row order are not known.
    """
    if base.is_file() and base.suffix == ".gguf":
        return target_of_header(read_gguf_header(base), base.name)
    file = base / "config.json" if base.is_dir() else base
    if file.name != "config.json" or not file.is_file():
        raise NeedsError(f"{base} is no model folder with config.json and no GGUF model",
                         hint="--base wants the folder of the base model, or its GGUF file")
    try:
        config = json.loads(file.read_text(encoding="utf8"))
        config = {**config, **(config.get("text_config") or {})}
    except (ValueError, TypeError, AttributeError) as e:
        raise FormatError(f"{file}: is not a JSON object") from e
    kind = str(config.get("model_type", ""))
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv = config.get("num_key_value_heads") or heads
    return Target(_known(_TYPES.get(kind, kind), "model_type"), _whole(heads), _whole(kv),
                  config.get("tie_word_embeddings"))


def target_of_header(header: GgufHeader, name: str) -> Target:
    """Return what the facts of a GGUF file say of its model; of an adapter, what its writer noted."""
    told = header.facts
    arch = _known(str(told.get("general.architecture", "")), f"{name}: architecture")
    heads = _whole(told.get(f"{arch}.attention.head_count"))
    kv = _whole(told.get(f"{arch}.attention.head_count_kv")) or heads
    model = told.get("general.type", "model") == "model"
    return Target(arch, heads, kv, "output.weight" not in header.tensors if model else None)


def _known(arch: str, said: str) -> str:
    if arch not in FAMILIES:
            raise UnsupportedError(f"{said} {arch or '(none)'} has no llama.cpp names here",
                               hint=f"known: {', '.join(FAMILIES)}")
    return arch


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20 else None


def gguf_name(key: str, family: Family) -> str | None:
    """Return llama.cpp's name of parameter `key`, None where the family has no such weight."""
    m = _LAYER.fullmatch(key)
    if m is not None and m[1] in _WRAPPERS:
        leaf = next((g for g, hf in family.modules.items() if hf == m[4]), None)
        return None if leaf is None else f"blk.{int(m[3])}.{leaf}.weight"
    for leaf, module in family.outside.items():
        tail = module.split(".")[-1]
        if key == f"{module}.weight" or key == f"{tail}.weight" or (
                key.endswith(f".{tail}.weight") and key.removesuffix(f"{tail}.weight") in
                (*_WRAPPERS, "embeddings.", "bert.embeddings.", "roberta.embeddings.")):
            return f"{leaf}.weight"
    return None


def parameter_name(name: str, family: Family) -> str | None:
    """Return transformers' name of llama.cpp's tensor `name`, None where it has none; the inverse of gguf_name."""
    m = _BLOCK.fullmatch(name)
    if m is not None:
        return f"{family.layers}.{int(m[1])}.{family.modules[m[2]]}.weight" if m[2] in family.modules else None
    module = family.outside.get(name.removesuffix(".weight"))
    return None if module is None else f"{module}.weight"


def row_order(name: str, rows: int, target: Target) -> Tensor | None:
    """Return order (rows,) with written[i] = b[order[i]] for llama.cpp's tensor `name`, None where rows stay.

    Rotary halves [x1 of a head, x2 of it] become pairs (x1_0, x2_0, x1_1, ...), head by head. Raises NeedsError where
    the number of heads is not known, FormatError where the rows are not whole heads.
    """
    if not target.family.permutes or not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return None
    heads = target.heads if name.endswith(".attn_q.weight") else target.kv_heads
    if heads is None:
        raise NeedsError(f"{name}: llama.cpp reorders its rows by heads, and their number is not known",
                         hint="--base with the model's folder (config.json) or GGUF file tells it")
    if rows % (2 * heads):
        raise FormatError(f"{name}: {rows} rows are not {heads} heads of even size")
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).mT.flatten()
