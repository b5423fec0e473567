"""MLX (mlx-lm): adapters.safetensors with lora_a (in, r), lora_b (r, out), and adapter_config.json with `scale`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows
from adaptc.delta import BaseFree, Delta, LowRank, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.config_json import parse_config
from adaptc.formats.format import Content, Evidence, Format, TensorsFile, history_metadata, read_history
from adaptc.formats.lora_r import padded
from adaptc.formats.peft_parts import pair
from adaptc.formats.peft_write import stored
from adaptc.formats.source import Source
from adaptc.lowrank import low_rank
from adaptc.squeeze.factored import truncate

BARE = "adaptc.mlx_config"  # where a bare file carries the config it has no folder for
# Last path elements of embeddings, whose lora_a is (vocab, r) and whose delta is not transposed.
EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embed_in",
                        "embedding"})


class Mlx(Format):
    """mlx-lm LoRA, DoRA, expert (SwitchLinear) and full fine-tunes.

    dW = scale (lora_a lora_b)^T: `scale` is the multiplier itself, whatever `alpha` or `rank` say beside it, so a new
    rank needs no new scale. mlx-lm builds every module at the config's rank and refuses other shapes, so smaller ranks
    are padded with zeros. A bare file takes it from --alpha, which here is MLX's scale and not divided by the rank.
    """

    id: ClassVar[str] = "mlx"
    title: ClassVar[str] = "MLX"
    writes: ClassVar[str] = "folder"

    def sniff(self, source: Source) -> Evidence | None:
        """A config with fine_tune_type or lora_parameters and no peft_type, or lora_a without .weight."""
        fields = [f for f in ("fine_tune_type", "lora_parameters") if f in source.config]
        if fields and "peft_type" not in source.config:
            return Evidence(3, f"adapter_config.json has {fields[0]}")
        if BARE in source.metadata:
            return Evidence(3, "metadata carries an MLX config")
        found = next((k for k in source.tensors if k.endswith(".lora_a")), None)
        if found is None and {"rank", "alpha"} <= set(source.config) and "peft_type" not in source.config:
            found = next((k for k in source.tensors if k.endswith(".A")), None)
        return Evidence(2, f"key {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; plain weights of a full fine-tune, or beside the factors, are replacements."""
        config = dict(source.config) or dict(parse_config(source.metadata.get(BARE, "{}"), f"metadata {BARE}"))
        modules: dict[str, dict[str, Tensor]] = {}
        replaced: dict[str, Replacement] = {}
        for key, t in source.tensors.items():
            module, _, leaf = key.rpartition(".")
            if leaf in ("lora_a", "lora_b", "m") and module:
                modules.setdefault(module, {})[leaf] = t
            elif leaf in ("A", "B") and "fine_tune_type" not in config:
                raise UnsupportedError(f"{key}: mlx-vlm adapters are not read, what alpha means differs by version")
            else:
                replaced[key] = t
        if not modules and config.get("fine_tune_type") != "full":
            raise FormatError(f"{source.file.name}: none of its {len(replaced)} tensors is lora_a or lora_b")
        scale = _scale(config, source) if modules else 1.0
        said = (config.get("lora_parameters") or {}).get("rank")
        made = {f"{m}.weight": _module(m, t, scale, said) for m, t in modules.items()}
        _check_ranks({k: d for k, (d, _) in made.items()}, config)
        layout = {k: where for k, (_, where) in made.items() if where}
        clash = next((k for k in made if k in replaced), None)
        if clash:
            raise FormatError(f"{clash}: both factors and a full weight")
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        notes = tuple(f"{k}: taken for an embedding by its name" for k, w in layout.items() if w == "embedding")
        origin = Origin("mlx", config, metadata, config.get("model"), source.files, {}, layout, notes)
        return Adapter({k: d for k, (d, _) in made.items()}, replaced, origin, read_history(source.metadata))

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """MLX has one kind and one scale for all modules, and no bias, convolution, row or sparse deltas."""
        stored = {k: d for k, d in adapter.deltas.items() if d.nbytes}
        lost = [f"{k}: {why}" for k, d in stored.items() if (why := _unsayable(k, d))]
        dora = sum(isinstance(d, NeedsBase) for d in stored.values())
        if dora and dora < len(stored):
            lost.append(f"DoRA on {dora} modules but not on {len(stored) - dora}: MLX has one fine_tune_type for all")
        lost += [f"{k}: replaces rows only" for k, r in adapter.replaced.items() if isinstance(r, Rows)]
        return tuple(lost)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return adapter_config.json and adapters.safetensors."""
        tensors, config = _written(adapter, set(self.cannot(adapter)))
        metadata = {**(adapter.origin.metadata if adapter.origin.dialect == "mlx" else {}), **history_metadata(adapter)}
        text = json.dumps(config, indent=4, sort_keys=True) + "\n"
        return {"adapter_config.json": text.encode(), "adapters.safetensors": TensorsFile(tensors, metadata)}

    def bare(self, adapter: Adapter) -> Content:
        """Return one safetensors file that carries the config in its metadata."""
        files = self.contents(adapter)
        config, tensors = files["adapter_config.json"], files["adapters.safetensors"]
        assert isinstance(config, bytes)
        assert isinstance(tensors, TensorsFile)
        text = json.dumps(json.loads(config), separators=(",", ":"))
        return replace(tensors, metadata={**tensors.metadata, BARE: text})


def _scale(config: Mapping[str, Any], source: Source) -> float:
    value = (config.get("lora_parameters") or {}).get("scale")
    if value is None:
        if source.alpha is None:
            raise NeedsError(f"{source.file.name}: an MLX file without its config cannot tell its scale",
                             hint="pass --alpha with MLX's scale, the multiplier itself (20 or 10 by default)")
        return source.alpha
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise FormatError(f"lora_parameters.scale in adapter_config.json is {value!r}, not a number")
    return float(value)


def _module(module: str, tensors: Mapping[str, Tensor], scale: float, said: Any) -> tuple[Delta, str]:
    """Return the delta of one module and its layout mark. Raises FormatError for halves and shapes that disagree.

    A rank above both sides of the weight is that of factors the wrong way around, unless the config `said` so.
    """
    a, b = pair(module, tensors, "lora_a", "lora_b")
    if a.dim() != b.dim() or a.dim() > 3:
        raise FormatError(f"{module}: lora_a has shape {tuple(a.shape)}, lora_b {tuple(b.shape)}")
    layout = "experts" if a.dim() == 3 else "embedding" if module.rpartition(".")[2] in EMBEDDINGS else ""
    if layout == "experts":  # (E, r, in), (E, out, r): already in output, input order
        left, right = b, a
    elif layout == "embedding":  # (vocab, r), (r, dim)
        left, right = a, b
    else:  # (in, r), (r, out)
        left, right = b.mT, a.mT
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise FormatError(f"{module}: lora_a has shape {tuple(a.shape)}, lora_b {tuple(b.shape)}, no common rank")
    shape = (*left.shape[:-1], right.shape[-1])
    if left.shape[-1] > max(shape[-2:]) and left.shape[-1] != said:
        raise FormatError(f"{module}: reads as rank {left.shape[-1]} on a {shape[-2]} x {shape[-1]} weight, "
                          "these factors are not in MLX's order")
    inner = LowRank(right, left, None, scale, shape)
    if "m" in tensors:
        if tensors["m"].numel() != shape[0]:
            raise FormatError(f"{module}: m has {tensors['m'].numel()} entries for {shape[0]} outputs")
        return NeedsBase("dora", {"magnitude": tensors["m"]}, {"axis": 0}, shape, inner), layout
    return inner, layout


def _check_ranks(deltas: Mapping[str, Delta], config: Mapping[str, Any]) -> None:
    """Raise FormatError unless the largest rank is the one the config names."""
    said = (config.get("lora_parameters") or {}).get("rank")
    ranks = {k: d.rank for k, d in ((k, _direction(d)) for k, d in deltas.items()) if d is not None}
    if said is None or not ranks:
        return
    key = max(ranks, key=lambda k: ranks[k])
    if said != ranks[key]:
        raise FormatError(f"{key}: adapter_config.json says rank {said}, the factors have rank {ranks[key]}")


def _direction(delta: Delta) -> LowRank | None:
    """Return the factors MLX would store, None where there are none exactly."""
    inner: BaseFree | None = delta.inner if isinstance(delta, NeedsBase) else delta
    return None if inner is None else low_rank(inner)


def _unsayable(key: str, delta: Delta) -> str:
    experts = isinstance(delta, LowRank) and len(delta.a.shape) == 3
    if isinstance(delta, NeedsBase) and (delta.kind != "dora" or delta.config.get("axis", 0) != 0):
        return f"{delta.kind} changes the base weight in a way MLX does not know"
    if not key.endswith(".weight"):
        return "MLX adapts the weights of modules only"
    if len(delta.shape) != 2 and not experts:
        return f"MLX adapts no {len(delta.shape)}-dimensional weight"
    return "" if _direction(delta) is not None else f"{type(delta).__name__.lower()} delta has no low-rank factors"


def _written(adapter: Adapter, lost: set[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    kept = {k: _narrow(low) for k, d in adapter.deltas.items() if d.nbytes
            and not any(w.startswith(f"{k}:") for w in lost) and (low := _direction(d)) is not None}
    scale = Counter(low.scale for low in kept.values()).most_common(1)[0][0] if kept else 1.0
    rank = max((low.rank for low in kept.values()), default=0)
    tensors: dict[str, Tensor] = {}
    for key, low in kept.items():
        module, layout = key.removesuffix(".weight"), adapter.origin.layout.get(key, "")
        right, left = padded(*stored(low), rank)
        if low.scale != scale:  # one scale for the whole file
            left = (left.double() * (low.scale / scale if scale else 1.0)).to(left.dtype)
        a, b = (right, left) if right.dim() == 3 else (left, right) if layout == "embedding" else (right.mT, left.mT)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        delta = adapter.deltas[key]
        if isinstance(delta, NeedsBase):
            tensors[f"{module}.m"] = delta.tensors["magnitude"].flatten()
    tensors |= {k: v for k, v in adapter.replaced.items() if isinstance(v, torch.Tensor)} | dict(adapter.extra)
    return tensors, _config(adapter, kept, rank, scale)


def _narrow(low: LowRank) -> LowRank:
    """Return factors no wider than the weight, exactly: products of factors may be, and all modules share one rank."""
    least = min(low.shape[-2:])
    if low.rank <= least or len(low.a.shape) == 3:
        return low
    b, a = low.factors()
    if b.is_meta:  # only the size is asked for
        return LowRank(a[:least], b[:, :least], None, 1.0, low.shape)
    cut = truncate(b, a, least)
    return LowRank(cut.a, cut.b, None, 1.0, low.shape)


def _config(adapter: Adapter, parts: Mapping[str, LowRank], rank: int, scale: float) -> dict[str, Any]:
    origin = adapter.origin
    mine = origin.dialect == "mlx"
    config: dict[str, Any] = dict(origin.config) if mine else {
        "fine_tune_type": "dora" if any(isinstance(d, NeedsBase) for d in adapter.deltas.values()) else "lora",
        "model": origin.base_model, "num_layers": -1}  # -1: mlx-lm looks at every layer
    if not parts:
        return config
    said = dict(config.get("lora_parameters") or {"dropout": 0.0})
    if not mine:
        said["keys"] = sorted({_within_layer(k.removesuffix(".weight")) for k in parts})
    if said.get("rank") != rank:
        said["rank"] = rank
    if said.get("scale") != scale:
        said["scale"] = scale
    return config | {"lora_parameters": said}


def _within_layer(module: str) -> str:
    """Return the path below "...layers.N.", as `keys` wants it, or the whole path for modules outside of layers."""
    _, found, tail = module.partition(".layers.")
    number, _, rest = tail.partition(".")
    return rest if found and number.isdigit() and rest else module
