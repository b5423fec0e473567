"""PEFT: a folder of adapter_config.json and adapter_model.safetensors (or .bin), or the bare tensor file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats import peft_lora, peft_scale
from adaptc.formats.format import Content, Evidence, Format, TensorsFile, history_metadata, read_history
from adaptc.formats.peft_keys import PREFIX, split
from adaptc.formats.peft_types import REFUSED, TYPES
from adaptc.formats.source import Source
from adaptc.lowrank import low_rank

BARE = "adaptc.peft_config"  # where a bare file carries the config it has no folder for


class Peft(Format):
    """Read every base-free PEFT type; write LoRA."""

    id: ClassVar[str] = "peft"
    title: ClassVar[str] = "PEFT"
    writes: ClassVar[str] = "folder"

    def sniff(self, source: Source) -> Evidence | None:
        """A peft_type in the config, or lora_A.weight keys with PEFT's prefix."""
        if "peft_type" in source.config:
            return Evidence(3, f"adapter_config.json has peft_type {source.config['peft_type']}")
        if BARE in source.metadata:
            return Evidence(3, "metadata carries a PEFT config")
        keys = [k for k in source.tensors if k.endswith(("lora_A.weight", "lora_A.default.weight"))]
        if keys and any(k.startswith(PREFIX) for k in keys):
            return Evidence(2, f"key {keys[0]}")
        return Evidence(1, f"key {keys[0]}") if keys else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; every tensor is consumed, carried, or the file is refused."""
        config = source.config or self._bare(source)
        kind = str(config.get("peft_type")).upper()
        if kind not in TYPES:
            why = REFUSED.get(kind, f"peft_type {kind} is not known (known: {', '.join(sorted(TYPES))})")
            raise UnsupportedError(why, hint="" if kind in REFUSED else "a type of a fork or of a newer PEFT")
        tensors = {k: v for k, v in source.tensors.items()}
        if not tensors:
            raise FormatError(f"{source.file.name}: holds no tensors")
        modules = split(tensors, TYPES[kind].prefixes)
        read = TYPES[kind].read(modules, config)
        if not read.deltas and not modules.other:
            raise FormatError(f"{source.file.name}: none of its {len(tensors)} tensors belongs to a {kind} adapter")
        replaced, names = _replaced(modules.other, modules.names, config)
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        origin = Origin("peft", dict(config), metadata, config.get("base_model_name_or_path"), source.files, names,
                        read.layout, tuple(read.notes))
        return Adapter(read.deltas, replaced, origin, read_history(source.metadata), read.extra)

    def _bare(self, source: Source) -> Mapping[str, Any]:
        if BARE in source.metadata:
            try:
                return dict(json.loads(source.metadata[BARE]))
            except ValueError as e:
                raise FormatError(f"{source.file.name}: metadata {BARE} is not JSON") from e
        if source.alpha is None:
            raise NeedsError(f"{source.file.name}: a bare file cannot tell its scale",
                             hint="pass --alpha (lora_alpha of the training run), or the folder with adapter_config.json")
        return {"peft_type": "LORA", "lora_alpha": source.alpha}

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """PEFT LoRA has no sparse deltas, no biases of its own, and DoRA only for all modules or none."""
        lost = []
        stored = {k: d for k, d in adapter.deltas.items() if d.nbytes}
        dora = [k for k, d in stored.items() if isinstance(d, NeedsBase) and d.kind == "dora"]
        lora = [k for k, d in stored.items() if not isinstance(d, NeedsBase) and not _is_bias(k, stored)]
        if dora and lora:
            lost.append(f"DoRA on {len(dora)} modules but not on {len(lora)}: PEFT has one switch for all")
        for key, d in stored.items():
            if isinstance(d, NeedsBase) and d.kind != "dora":
                lost.append(f"{key}: {d.kind} changes the base weight")
            elif not isinstance(d, NeedsBase) and not _is_bias(key, stored) and low_rank(d) is None:
                lost.append(f"{key}: {type(d).__name__.lower()} delta has no low-rank factors")
        return tuple(lost)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return adapter_config.json and adapter_model.safetensors."""
        tensors, config = self._tensors(adapter)
        text = json.dumps(config, indent=2, sort_keys=True, default=list) + "\n"
        return {"adapter_config.json": text.encode(), "adapter_model.safetensors": self._file(adapter, tensors)}

    def bare(self, adapter: Adapter) -> Content:
        """Return the tensor file alone, its config in the metadata."""
        tensors, config = self._tensors(adapter)
        return self._file(adapter, tensors, {BARE: json.dumps(config, separators=(",", ":"), default=list)})

    def _file(self, adapter: Adapter, tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None
              ) -> TensorsFile:
        return TensorsFile(tensors, {"format": "pt", **adapter.origin.metadata, **history_metadata(adapter),
                                     **(more or {})})

    def _tensors(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        settings: dict[str, tuple[int, float]] = {}
        biases: dict[str, Dense] = {}
        dropped = []
        lost = set(self.cannot(adapter))
        for key, delta in adapter.deltas.items():
            if not delta.nbytes:
                dropped.append(key.removesuffix(".weight"))
            elif isinstance(delta, Dense) and _is_bias(key, adapter.deltas):
                biases[key] = delta
            elif not any(note.startswith(f"{key}:") for note in lost):
                module, rank, s, made = peft_lora.write_module(key, _as_lora(delta), adapter.origin.layout.get(key, ""))
                settings[module] = (rank, s)
                tensors |= {f"{PREFIX}{module}.{p}": t for p, t in made.items()}
        for key, delta in biases.items():
            module = key.removesuffix(".bias")
            tensors[f"{PREFIX}{module}.lora_B.bias"] = _bias(delta, settings[module][1])
        for key, value in adapter.replaced.items():
            tensors[adapter.origin.names.get(key, PREFIX + key)] = value.values if isinstance(value, Rows) else value
        tensors |= {PREFIX + k: t for k, t in adapter.extra.items()}
        return tensors, _config(adapter, settings, dropped, bool(biases))


def _as_lora(delta: Delta) -> Delta:
    """Return the delta with LowRank factors in place of any other base-free kind that has them exactly."""
    if isinstance(delta, (NeedsBase, LowRank)):
        return delta
    factors = low_rank(delta)
    if factors is None:
        raise UnsupportedError(f"{delta!r} has no low-rank factors")
    return factors


def _is_bias(key: str, deltas: Mapping[str, Delta]) -> bool:
    return key.endswith(".bias") and key.removesuffix("bias") + "weight" in deltas


def _bias(delta: Dense, s: float) -> Tensor:
    """Return the stored lora_B.bias for a bias delta beside factors of scale s."""
    weight = peft_lora.factor(delta.weight)
    return weight if delta.scale == s or s == 0 else (weight.double() * (delta.scale / s)).to(weight.dtype)


def _replaced(other: Mapping[str, Tensor], keys: Mapping[str, str], config: Mapping[str, Any]
              ) -> tuple[dict[str, Replacement], dict[str, str]]:
    """Return replacement tensors by parameter name, and the file key of each."""
    replaced: dict[str, Replacement] = {}
    names: dict[str, str] = {}
    for bare, t in other.items():
        if bare.endswith("trainable_tokens_delta"):  # despite the name: replacement rows
            module = bare.split(".token_adapter")[0].removesuffix(".trainable_tokens_delta")
            name, value = f"{module}.weight", _rows(module, t, config)
        else:
            name, value = bare.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), t
        if name in replaced:
            raise FormatError(f"{keys[bare]} and {names[name]} both replace {name}")
        replaced[name], names[name] = value, keys[bare]
    return replaced, names


def _rows(module: str, t: Tensor, config: Mapping[str, Any]) -> Rows:
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(indices, Mapping):
        indices = peft_scale.pattern(indices, module, None)
    if not isinstance(indices, (list, tuple)) or len(indices) != t.shape[0]:
        raise FormatError(f"{module}: {t.shape[0]} token rows, but trainable_token_indices does not list as many")
    return Rows(tuple(int(i) for i in indices), t)


def _config(adapter: Adapter, settings: Mapping[str, tuple[int, float]], dropped: list[str], bias: bool
            ) -> dict[str, Any]:
    origin = adapter.origin
    mine = origin.dialect == "peft" and str(origin.config.get("peft_type")).upper() == "LORA"
    config: dict[str, Any] = dict(origin.config) if mine else {
        "peft_type": "LORA", "task_type": origin.config.get("task_type") if origin.dialect == "peft" else None,
        "base_model_name_or_path": origin.base_model, "bias": "none", "inference_mode": True, "fan_in_fan_out": False,
        "modules_to_save": origin.config.get("modules_to_save") if origin.dialect == "peft" else None,
        "target_modules": sorted(m for m in settings if not origin.layout.get(f"{m}.weight", "").startswith("experts")),
    }
    config |= peft_scale.rules(settings, config)
    dora = any(isinstance(d, NeedsBase) and d.kind == "dora" for d in adapter.deltas.values())
    if dora or config.get("use_dora"):
        config["use_dora"] = dora
    if bias or config.get("lora_bias"):
        config["lora_bias"] = bias
    if dropped:  # modules that a byte budget left nothing of: PEFT must not inject them
        config["exclude_modules"] = sorted({*(config.get("exclude_modules") or []), *dropped})
    return config
