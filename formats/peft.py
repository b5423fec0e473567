"""PEFT: a folder of adapter_config.json and adapter_model.safetensors (or .bin), or the bare tensor file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement, Rows
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.formats import peft_loss, peft_scale, peft_write
from adaptc.formats.config_json import parse_config
from adaptc.formats.format import Content, Evidence, Format, TensorsFile, history_metadata, read_history
from adaptc.formats.peft_keys import PREFIX, split
from adaptc.formats.peft_types import REFUSED, TYPES
from adaptc.formats.source import Source

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
        config = self._config(source)
        kind = str(config.get("peft_type")).rpartition(".")[2].upper()
        if kind not in TYPES:
            why = f"{kind} {REFUSED[kind]}" if kind in REFUSED else (
                f"peft_type {kind} is not known (known: {', '.join(sorted(TYPES))})")
            raise UnsupportedError(why, hint=None if kind in REFUSED else "a type of a fork or of a newer PEFT")
        if not source.tensors:
            raise FormatError(f"{source.file.name}: holds no tensors")
        modules = split(source.tensors, TYPES[kind].prefixes)
        read = TYPES[kind].read(modules, config)
        if modules.shared:
            raise UnsupportedError(f"{next(iter(modules.shared))}: belongs to no known part of a {kind} adapter")
        if not read.deltas and not modules.other and not read.replaced:
            raise FormatError(f"{source.file.name}: {len(source.tensors)} tensors, none part of a {kind} adapter")
        if "r" not in config:
            _check_order(read.deltas)
        replaced, names = _replaced(modules.other, config)
        names |= {name: f"{PREFIX}{key}" for name, key in read.names.items()}
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        origin = Origin("peft", dict(config), metadata, config.get("base_model_name_or_path"), source.files, names,
                        read.layout, tuple(read.notes))
        return Adapter(read.deltas, replaced | read.replaced, origin, read_history(source.metadata), read.extra)

    def _config(self, source: Source) -> Mapping[str, Any]:
        config = source.config
        if not config and BARE in source.metadata:
            config = parse_config(source.metadata[BARE], f"metadata {BARE} of {source.file.name}")
        if source.alpha is None and not config:
            raise NeedsError(f"{source.file.name}: a bare file cannot tell its scale",
                             hint="pass --alpha (lora_alpha of the training), or the folder with adapter_config.json")
        if source.alpha is not None and config:
            raise UsageError(f"alpha {source.alpha:g} is given, but the config says {config.get('lora_alpha')}",
                             hint="--alpha is for bare files that cannot tell their scale")
        return config or {"peft_type": "LORA", "lora_alpha": source.alpha}

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """PEFT LoRA has factors only, one DoRA switch for all modules, and biases only beside factors."""
        return tuple(peft_loss.losses(adapter))

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return adapter_config.json and adapter_model.safetensors."""
        tensors, config = peft_write.build(adapter)
        text = json.dumps(config, indent=2, sort_keys=True, default=list) + "\n"
        return {"adapter_config.json": text.encode(), "adapter_model.safetensors": self._file(adapter, tensors)}

    def bare(self, adapter: Adapter) -> Content:
        """Return the tensor file alone, its config in the metadata."""
        tensors, config = peft_write.build(adapter)
        return self._file(adapter, tensors, {BARE: json.dumps(config, separators=(",", ":"), default=list)})

    def _file(self, adapter: Adapter, tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None
              ) -> TensorsFile:
        return TensorsFile(tensors, {"format": "pt", **adapter.origin.metadata, **history_metadata(adapter),
                                     **(more or {})})


def _check_order(deltas: Mapping[str, Delta]) -> None:
    """Raise FormatError for factors that only fit each other because both are transposed, as MLX stores them."""
    for key, d in deltas.items():
        if isinstance(d, LowRank) and len(d.shape) == 2 and d.rank > max(d.shape):
            raise FormatError(f"{key}: reads as rank {d.rank} on a {d.shape[0]} x {d.shape[1]} weight, "
                              "these factors are not in PEFT's order")


def _replaced(other: Mapping[str, Tensor], config: Mapping[str, Any]
              ) -> tuple[dict[str, Replacement], dict[str, str]]:
    """Return replacements by parameter name, and the file key of those whose key is not simply that name."""
    replaced: dict[str, Replacement] = {}
    names: dict[str, str] = {}
    value: Replacement
    for key, t in other.items():
        if key.endswith("trainable_tokens_delta"):  # despite the name: replacement rows
            module = key.split(".token_adapter")[0].removesuffix(".trainable_tokens_delta")
            name, value = f"{module}.weight", _rows(module, t, config)
        else:
            key = key.replace(".modules_to_save.default.", ".")
            name, value = key.replace(".base_layer.", "."), t
        if name in replaced:
            raise FormatError(f"{key} and {names.get(name, name)} both replace {name}")
        replaced[name] = value
        if key != name:
            names[name] = PREFIX + key
    return replaced, names


def _rows(module: str, t: Tensor, config: Mapping[str, Any]) -> Rows:
    indices = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(indices, Mapping):
        indices = peft_scale.pattern(indices, module, None)
    if not isinstance(indices, (list, tuple)) or len(indices) != t.shape[0]:
        raise FormatError(f"{module}: {t.shape[0]} token rows, but trainable_token_indices does not list as many")
    return Rows(tuple(int(i) for i in indices), t)
