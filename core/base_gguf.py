"""Weights of a GGUF model as transformers names, orients and scales them, dequantised by the gguf package."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.gguf_header import GgufTensor, read_gguf_header, stored_nbytes

_ROTARY = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_LLAMA = (*_OUTER, *(f"model.layers.{{}}.{p}" for p in (*_ROTARY, *_GATED, *_NORMS)))
_GEMMA2 = (*_LLAMA, *(f"model.layers.{{}}.{p}" for p in _SANDWICH))

# Module names that transformers gives each family; gguf's own map says which tensor each became.
MODULES: dict[str, tuple[str, ...]] = {
    "llama": _LLAMA, "qwen2": _LLAMA, "gemma": _LLAMA, "gemma2": _GEMMA2,
    "qwen3": (*_LLAMA, *(f"model.layers.{{}}.{p}" for p in _HEAD_NORMS)),
    "gemma3": (*_GEMMA2, *(f"model.layers.{{}}.{p}" for p in _HEAD_NORMS)),
    "phi2": ("model.embed_tokens", "model.final_layernorm", "lm_head", *(f"model.layers.{{}}.{p}" for p in (
        *_ROTARY[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2", "input_layernorm"))),
    "phi3": (*_OUTER, *(f"model.layers.{{}}.{p}" for p in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS))),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head", *(f"transformer.h.{{}}.{p}" for p in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"))),
    "bert": ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings",
             "embeddings.LayerNorm", *(f"encoder.layer.{{}}.{p}" for p in (
                 "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"))),
}
_TYPES = {"phi2": "phi", "gemma3": "gemma3_text"}
_FACTS = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size",
          "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
          "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
          "context_length": "max_position_embeddings"}


class GgufWeights(Mapping[str, Tensor]):
    """Parameters of a GGUF file (all parts of a split one) by their transformers names, float32, one at a time.

    What the converter did to the weights is undone: rotary rows of llama's q and k interleaved, 1 added to gemma's
    norms, gpt2's matrices transposed. Tensors outside the family's table keep their GGUF names. `config` holds the
    facts of the header under the names of config.json. Raises NeedsError without the gguf package, FormatError for a
    damaged file, UnsupportedError for a family that is not in MODULES.
    """

    def __init__(self, path: Path) -> None:
        _package(path)
        headers = [read_gguf_header(p) for p in _parts(path)]
        facts = headers[0].facts
        self.family = str(facts.get("general.architecture"))
        if self.family not in MODULES:
            raise UnsupportedError(f"{path.name}: GGUF of architecture {self.family}, whose names are not known here",
                                   hint=f"known: {', '.join(MODULES)}")
        self.config: dict[str, Any] = {"model_type": _TYPES.get(self.family, self.family)}
        said = {v: facts.get(f"{self.family}.{k}") for k, v in _FACTS.items()}
        self.config |= {k: v for k, v in said.items() if isinstance(v, int)}
        stored = {name: t for header in headers for name, t in header.tensors.items()}
        blocks = self.config.get("num_hidden_layers", 0)
        if blocks > len(stored):
            raise FormatError(f"{path.name}: {blocks} blocks, but {len(stored)} tensors")
        names = _names(self.family, blocks)
        self._stored = {names.get(name, name): t for name, t in stored.items()}

    def __getitem__(self, name: str) -> Tensor:
        w = _decoded(name, self._stored[name])
        if self.family == "gpt2" and w.dim() == 2 and name.startswith("transformer.h."):
            return w.T.contiguous()
        if self.family.startswith("gemma") and name.endswith("norm.weight"):
            return w - 1
        if self.family == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            queries = self.config.get("num_attention_heads", 0)
            heads = queries if ".q_proj." in name else self.config.get("num_key_value_heads", queries)
            return _interleaved_back(name, w, heads)
        return w

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as e:
        raise NeedsError(f"{path.name} is GGUF, which needs the gguf package", hint="pip install 'adaptc[gguf]'") from e
    return gguf


def _decoded(name: str, tensor: GgufTensor) -> Tensor:
    """Return one tensor as float32 in its shape, read from the file now."""
    gguf = _package(tensor.path)
    try:
        kind = gguf.GGMLQuantizationType(tensor.type)
        data = np.fromfile(tensor.path, np.uint8, stored_nbytes(tensor, *gguf.GGML_QUANT_SIZES[kind]),
                           offset=tensor.begin)
        plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16,
                 gguf.GGMLQuantizationType.F64: np.float64}.get(kind)
        rows = data.view(plain) if plain else gguf.dequantize(data.reshape(math.prod(tensor.shape[:-1]), -1), kind)
    except (ValueError, KeyError, NotImplementedError) as e:
        raise UnsupportedError(f"{name}: {tensor.path.name} stores it as ggml type {tensor.type}, which the gguf "
                               "package cannot decode") from e
    return torch.from_numpy(np.array(rows, np.float32)).reshape(tensor.shape)


def _interleaved_back(name: str, w: Tensor, heads: int) -> Tensor:
    """Return rows in transformers' order: a head's first half then its second, which GGUF has in turns."""
    if heads < 1 or w.shape[0] % (2 * heads):
        raise FormatError(f"{name}: {w.shape[0]} rows are no {heads} heads of even width")
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _names(family: str, blocks: int) -> dict[str, str]:
    """Return GGUF tensor name -> transformers parameter name, by asking gguf what it calls each of ours."""
    import gguf

    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family)
    known, out = gguf.get_tensor_name_map(arch, blocks), {}
    for pattern in MODULES[family]:
        for i in range(blocks if "{}" in pattern else 1):
            for suffix in (".weight", ".bias"):
                name = pattern.format(i) + suffix
                theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
                if theirs is not None:
                    out[theirs] = name
    return out


def _parts(path: Path) -> list[Path]:
    """Return all parts of a split GGUF ("-00001-of-00003"), or the one file. Raises NeedsError for a missing part."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if found is None:
        return [path]
    count = int(found[2])
    parts = [path.with_name(f"{found[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    lost = [p.name for p in parts if not p.is_file()]
    if lost:
        raise NeedsError(f"{path.name} is one of {count} parts, {lost[0]} is missing")
    return parts
