"""diffusers: pytorch_lora_weights files of every key generation, with lora_adapter_metadata where there is one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.delta import Delta, Dense, LowRank, NeedsBase
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats import diffusers_write, peft_scale
from adaptc.formats.alpha import alpha_value, record_alpha, scale_of
from adaptc.formats.config_json import parse_config
from adaptc.formats.diffusers_keys import component_of, is_bare, is_old, parse_key
from adaptc.formats.diffusers_write import ADAPTER_METADATA, FOLDED, settings_of
from adaptc.formats.format import Content, Evidence, read_history
from adaptc.formats.kohya_modules import check_inner, pair, with_dora
from adaptc.formats.safetensors_file import SafetensorsFile
from adaptc.formats.source import Source

Held = dict[str, tuple[str, Tensor]]  # role -> (file key, tensor)


class Diffusers(SafetensorsFile):
    """Read and write diffusers LoRA in the generation of keys it came in; conversions get today's.

    Origin.names holds the file key of the a factor (or of a bias or difference) where it is not the module with
    ".lora_A.weight"; Origin.config the parsed lora_adapter_metadata and the alpha tensors.
    """

    id: ClassVar[str] = "diffusers"
    title: ClassVar[str] = "diffusers"

    def sniff(self, source: Source) -> Evidence | None:
        """lora_adapter_metadata, or pairs under a component (unet, transformer, text_encoder, ...)."""
        if ADAPTER_METADATA in source.metadata:
            return Evidence(3, f"metadata has {ADAPTER_METADATA}")
        for key in source.tensors:
            found = parse_key(key)
            if found and found[1] in ("a", "b") and (component_of(key) or is_bare(key)):
                return Evidence(2, f"key {key}")
            if _is_xlabs(key):
                return Evidence(2, f"key {key}")
        return None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; every tensor is consumed, carried, or the file is refused."""
        modules: dict[str, Held] = {}
        replaced: dict[str, Replacement] = {}
        names: dict[str, str] = {}
        for key, t in source.tensors.items():
            found = parse_key(key)
            if found is None:
                replaced[key] = _replacement(key, t)
                continue
            module, role = found
            held = modules.setdefault(module, {})
            if role in held:
                raise FormatError(f"{held[role][0]} and {key} are the same factor")
            held[role] = key, t
        if not modules:
            raise FormatError(f"{source.file.name}: none of its {len(source.tensors)} tensors belongs to a LoRA pair")
        config = _config(source)
        deltas: dict[str, Delta] = {}
        alphas: dict[str, list[Any]] = {}
        for module, held in modules.items():
            if "alpha" in held:
                alphas[module] = record_alpha(alpha_value(module, held["alpha"][1]), held["alpha"][1])
            for leaf, (key, delta) in _read_module(module, held, config).items():
                deltas[f"{module}.{leaf}"] = delta
                if key != f"{module}.lora_A.weight":
                    names[f"{module}.{leaf}"] = key
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        origin = Origin(self.id, {ADAPTER_METADATA: config, "alpha": alphas}, metadata,
                        metadata.get("ss_sd_model_name"), source.files, names, {}, _notes(source))
        return Adapter(dict(sorted(deltas.items())), replaced, origin, read_history(source.metadata))

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Names without a component, experts, embeddings, dense weights, biases without a pair, token rows."""
        return diffusers_write.losses(adapter)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the one safetensors file."""
        return {"": diffusers_write.build(adapter)}


def _read_module(module: str, held: Held, config: Mapping[str, Any]) -> dict[str, tuple[str, Delta]]:
    """Return leaf ("weight", "bias") -> (file key, delta) of one module."""
    out: dict[str, tuple[str, Delta]] = {}
    s = 1.0
    if "a" in held or "b" in held:
        if "diff" in held:
            raise FormatError(f"{module}: has a LoRA pair and a full difference")
        tails = {k.removeprefix(module).lstrip("."): t for k, t in (held[r] for r in ("a", "b") if r in held)}
        first, second = (held[r][0].removeprefix(module).lstrip(".") if r in held else f"{n} factor"
                         for r, n in (("a", "down"), ("b", "up")))
        a, b = pair(module, tails, first, second)
        check_inner(module, second, b.shape[1], first, a.shape[0])
        if math.prod(b.shape[2:]) != 1:
            raise FormatError(f"{module}: {second} has shape {tuple(b.shape)}, its kernel must be 1")
        s = _scale(module, a.shape[0], held, config)
        weight = LowRank(a.flatten(1), b.flatten(1), None, s, (b.shape[0], *a.shape[1:]))
        out["weight"] = held["a"][0], _with_magnitude(module, weight, held)
    elif "diff" in held:
        out["weight"] = held["diff"][0], _dense(*held["diff"], 1.0)
    if "bias" in held and "diff_b" in held:
        raise FormatError(f"{held['bias'][0]} and {held['diff_b'][0]} both change the bias")
    if "bias" in held:
        if "weight" not in out:
            raise FormatError(f"{held['bias'][0]} has no factors beside it, half an adapter")
        out["bias"] = held["bias"][0], _dense(*held["bias"], s)
    elif "diff_b" in held:
        out["bias"] = held["diff_b"][0], _dense(*held["diff_b"], 1.0)
    if not out:
        raise FormatError(f"{next(iter(held.values()))[0]} has no factors beside it, half an adapter")
    return out


def _scale(module: str, rank: int, held: Held, config: Mapping[str, Any]) -> float:
    """Return the multiplier: the module's alpha tensor, else its component's metadata, else 1 (files before those)."""
    if "alpha" in held:
        return scale_of(alpha_value(module, held["alpha"][1]), rank)
    path, settings = settings_of(module, config)
    if "r" not in settings or is_old(held["a"][0]):
        return 1.0
    try:
        return peft_scale.scale(settings, path, rank)
    except FormatError as e:
        raise FormatError(str(e).replace("adapter_config.json", ADAPTER_METADATA)) from e


def _with_magnitude(module: str, delta: LowRank, held: Held) -> Delta:
    if "dora" in held and "magnitude" not in held:
        key, t = held["dora"]
        made = with_dora(module, delta, t)
        assert isinstance(made, NeedsBase)
        return replace(made, config={**made.config, "key": key, "shape": list(t.shape)})
    if "magnitude" not in held:
        return delta
    if "dora" in held:
        raise FormatError(f"{held['dora'][0]} and {held['magnitude'][0]} are two magnitudes of one module")
    key, t = held["magnitude"]
    if t.numel() != delta.shape[0]:
        raise FormatError(f"{module}: lora_magnitude_vector has {t.numel()} entries for {delta.shape[0]} outputs")
    config = {"axis": 0, "shape": list(t.shape), "key": key}
    return NeedsBase("dora", {"magnitude": t.reshape(-1)}, config, delta.shape, delta)


def _dense(key: str, t: Tensor, s: float) -> Dense:
    if not t.numel() or not t.dtype.is_floating_point:
        raise FormatError(f"{key}: shape {tuple(t.shape)} and dtype {str(t.dtype)[6:]}, no difference of weights")
    return Dense(t, s, tuple(t.shape))


def _replacement(key: str, t: Tensor) -> Tensor:
    """Return a tensor that replaces a parameter (norms of control LoRAs); refuse what no table explains."""
    if _is_xlabs(key):
        raise UnsupportedError(f"{key}: XLabs' Flux dialect fuses projections its own way and is not read")
    if not component_of(key) and not is_bare(key):
        raise UnsupportedError(f"{key}: no factor of a diffusers LoRA and under no component")
    if key.rpartition(".")[2] not in ("weight", "bias", "scale"):
        raise UnsupportedError(f"{key}: not a known diffusers parameter")
    return t


def _is_xlabs(key: str) -> bool:
    return ".processor." in key and ("_lora1." in key or "_lora2." in key)


def _config(source: Source) -> Mapping[str, Any]:
    text = source.metadata.get(ADAPTER_METADATA)
    return parse_config(text, f"metadata {ADAPTER_METADATA}") if text is not None else {}


def _notes(source: Source) -> tuple[str, ...]:
    try:
        folded = json.loads(source.metadata.get(FOLDED, "{}"))
    except (ValueError, RecursionError):
        return ()
    return tuple(f"{module}: scale {s} was folded into its factors" for module, s in folded.items())
