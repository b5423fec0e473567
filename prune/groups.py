"""Coupled groups: which rows and columns of which parameters stand or fall together, read from a model's config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adaptc.errors import FormatError, UnsupportedError

Kind = Literal["heads", "ffn"]
Unit = Literal["auto", "kv", "query"]
ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True)
class Family:
    """How the layers of an architecture are called, and the config's words for their sizes.

    A module named twice holds several blocks of rows one after the other (fused QKV, fused gate and up). `heads` says
    whether the config can tell a number of heads and a head size apart from the hidden width, `transposed` that
    weights are stored (in, out), `divides` that a config is refused unless the heads divide the hidden width.
    """

    models: tuple[str, ...]
    layer: str
    qkv: tuple[str, str, str]
    o: str
    up: tuple[str, ...]
    down: str
    words: Mapping[str, str]
    heads: bool = True
    transposed: bool = False
    divides: bool = False


_LLAMA = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
          "kv": "num_key_value_heads", "ffn": "intermediate_size"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED = ("self_attn.qkv_proj",) * 3
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_OUT, _DOWN = "self_attn.o_proj", "mlp.down_proj"
FAMILIES = (
    Family(("llama", "gemma2", "gemma3_text"), "layers.{}", _QKV, _OUT, _GATED, _DOWN, _LLAMA, divides=True),
    Family(("mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"), "layers.{}", _QKV, _OUT, _GATED, _DOWN,
           _LLAMA),
    Family(("phi3",), "layers.{}", _FUSED, _OUT, ("mlp.gate_up_proj",) * 2, _DOWN, _LLAMA),
    Family(("starcoder2",), "layers.{}", _QKV, _OUT, ("mlp.c_fc",), "mlp.c_proj", _LLAMA),
    Family(("gpt2",), "h.{}", ("attn.c_attn",) * 3, "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj",
           {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "ffn": "n_inner"}, heads=False,
           transposed=True),
    Family(("bert", "roberta", "xlm-roberta", "camembert", "electra"), "encoder.layer.{}",
           ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
           ("intermediate.dense",), "output.dense", {k: v for k, v in _LLAMA.items() if k != "kv"}, heads=False),
    Family(("distilbert",), "transformer.layer.{}", ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
           "attention.out_lin", ("ffn.lin1",), "ffn.lin2",
           {"layers": "n_layers", "hidden": "dim", "heads": "n_heads", "ffn": "hidden_dim"}, heads=False),
)
KNOWN = tuple(sorted(m for family in FAMILIES for m in family.models))


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one parameter in a group: unit u has entries start + u size ... start + (u + 1) size of `axis`.

    Axes are those of the logical orientation: 0 are outputs (rows), 1 inputs (columns); a bias has outputs only.
    """

    key: str
    axis: int
    size: int
    start: int = 0

    def entries(self, units: Tensor) -> Tensor:
        """Return the entries (k size,) of `axis` that belong to `units` (k,)."""
        return (self.start + units[:, None] * self.size + torch.arange(self.size)).flatten()

    def sums(self, entries: Tensor, units: int) -> Tensor:
        """Return the sum of `entries` (width of the axis,) over each of `units` units."""
        return entries[self.start : self.start + units * self.size].reshape(units, self.size).sum(1)


@dataclass(frozen=True, slots=True)
class Coupling:
    """One group of units in a layer: removing unit u removes its entries of every part.

    Units are cut into `blocks` equal runs, of which the same number must stay: one run for key-value heads with their
    queries and for channels, a run for each key-value head where single query heads are removed.
    """

    layer: int
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    blocks: int = 1

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"layer {self.layer} {self.kind}"

    @property
    def weights(self) -> tuple[Part, ...]:
        """The parts that are matrices."""
        return tuple(p for p in self.parts if p.key.endswith(".weight"))


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family with the sizes of one model; `prefix` is what stands before a layer's name."""

    family: Family
    model: str
    prefix: str
    layers: int
    hidden: int
    heads: int
    kv: int
    head_dim: int
    ffn: int

    @property
    def queries(self) -> int:
        """Query heads a key-value head serves."""
        return self.heads // self.kv


def architecture(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Return the architecture of a model from its config.json and the stored shapes of its parameters.

    Raises UnsupportedError for a model type that is not known, FormatError where config and shapes disagree.
    """
    model = str(config.get("model_type"))
    family = next((f for f in FAMILIES if model in f.models), None)
    if family is None:
        raise UnsupportedError(f"model_type {model} is not known to pruning (known: {', '.join(KNOWN)})")
    if config.get("quantization_config"):
        method = str(config["quantization_config"].get("quant_method", "some method"))
        raise UnsupportedError(f"weights are stored quantised ({method}), pruning slices plain ones",
                               hint="prune the original model and quantise the result")
    tail = re.compile(rf"(.*?){re.escape(family.layer.format(0))}\.{re.escape(family.down)}\.weight")
    prefixes = {m[1] for name in shapes if (m := tail.fullmatch(name))}
    if len(prefixes) != 1:
        raise FormatError(f"base has {len(prefixes)} parameters called {family.layer.format(0)}.{family.down}.weight, "
                          f"a {model} model has one")
    prefix = prefixes.pop()
    words, stem = family.words, prefix + family.layer.format(0)

    def rows(module: str, axis: int = ROWS) -> int:
        shape = shapes.get(f"{stem}.{module}.weight", ())
        if len(shape) != 2:
            raise FormatError(f"{stem}.{module}.weight: base has shape {shape or 'none'}, expected a matrix")
        return shape[1 - axis] if family.transposed else shape[axis]

    heads = _whole(config, words["heads"])
    width = rows(family.o, COLUMNS)
    head_dim = int(config.get("head_dim") or width // heads)
    found = rows(family.qkv[1]) // head_dim if family.qkv[0] != family.qkv[1] else heads
    kv = int(config.get(words.get("kv", ""), None) or found)
    made = Architecture(family, model, prefix, _whole(config, words["layers"]), _whole(config, words["hidden"]), heads,
                        kv, head_dim, rows(family.down, COLUMNS))
    if heads % kv:
        raise FormatError(f"config promises {heads} heads for {kv} key-value heads, which they do not divide")
    return made


def couplings(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], unit: Unit = "auto") -> list[Coupling]:
    """Return every coupled group: per layer one of heads and one of channels.

    `unit` says what a head unit is: "kv" a key-value head with the queries it serves, "query" single query heads, the
    same number for each key-value head; "auto" is the first where there are several key-value heads. Raises
    FormatError for parameters that are missing or of other sizes than the config promises.
    """
    whole = arch.kv > 1 if unit == "auto" else unit == "kv"
    out = []
    for layer in range(arch.layers):
        stem = arch.prefix + arch.family.layer.format(layer)
        out += [_heads(arch, shapes, stem, layer, whole), _channels(arch, shapes, stem, layer)]
    return out


def _heads(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], stem: str, layer: int, whole: bool) -> Coupling:
    d, per = arch.head_dim, arch.queries if whole else 1
    q, k, v = arch.family.qkv
    wide, narrow = arch.heads * d, arch.kv * d
    starts = (0, wide, wide + narrow) if q == k else (0, 0, 0)
    total = wide + 2 * narrow if q == k else None
    parts = _rows(arch, shapes, f"{stem}.{q}", per * d, starts[0], total or wide)
    if whole:
        parts += _rows(arch, shapes, f"{stem}.{k}", d, starts[1], total or narrow)
        parts += _rows(arch, shapes, f"{stem}.{v}", d, starts[2], total or narrow)
    parts += _columns(arch, shapes, f"{stem}.{arch.family.o}", per * d, wide)
    return Coupling(layer, "heads", arch.kv if whole else arch.heads, tuple(parts), 1 if whole else arch.kv)


def _channels(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], stem: str, layer: int) -> Coupling:
    parts: list[Part] = []
    for i, module in enumerate(arch.family.up):
        fused = arch.family.up.count(module) > 1
        parts += _rows(arch, shapes, f"{stem}.{module}", 1, i * arch.ffn if fused else 0,
                       arch.ffn * (len(arch.family.up) if fused else 1))
    parts += _columns(arch, shapes, f"{stem}.{arch.family.down}", 1, arch.ffn)
    return Coupling(layer, "ffn", arch.ffn, tuple(parts))


def _rows(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], module: str, size: int, start: int, total: int
          ) -> list[Part]:
    _expect(arch, shapes, f"{module}.weight", ROWS, total)
    bias = [Part(f"{module}.bias", ROWS, size, start)] if f"{module}.bias" in shapes else []
    return [Part(f"{module}.weight", ROWS, size, start), *bias]


def _columns(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], module: str, size: int, total: int
             ) -> list[Part]:
    _expect(arch, shapes, f"{module}.weight", COLUMNS, total)
    return [Part(f"{module}.weight", COLUMNS, size)]


def _expect(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], key: str, axis: int, size: int) -> None:
    shape = shapes.get(key)
    if shape is None or len(shape) != 2:
        raise FormatError(f"{key}: base has {'no such matrix' if shape is None else f'shape {shape}'}")
    found = shape[1 - axis if arch.family.transposed else axis]
    if found != size:
        raise FormatError(f"{key}: base has {found} {('rows', 'columns')[axis]}, its config promises {size}")


def _whole(config: Mapping[str, Any], word: str) -> int:
    value = config.get(word)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"config.json has {word} {value!r}, a positive whole number is wanted")
    return value
