"""cloneofsimo lora_diffusion: numbered modules in safetensors, or the older flat list of tensors in a .pt file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.format import Content, Evidence, TensorsFile, history_metadata, read_history
from adaptc.formats.kohya_modules import as_lora, check_inner, has_factors, pair, scaled, stored
from adaptc.formats.safetensors_file import SafetensorsFile
from adaptc.formats.source import Source

_KEY = re.compile(r"([A-Za-z_]\w*):(\d{1,6}):(up|down)")
_PARAMETER = re.compile(r"([A-Za-z_]\w*):(\d{1,6})\.weight")
_EMBEDDING = "<embed>"
# Classes whose layers the trainer numbers. A Stable Diffusion UNet has 128 linear layers in its attentions and 16 more
# in its GEGLUs, which the trainer that wrote lists began to include only late.
_CLASSES = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
_ATTENTION_LAYERS = 128


class Cloneofsimo(SafetensorsFile):
    """Read both forms; write safetensors, which every lora_diffusion since 0.1 reads.

    Modules are numbered in the order the trainer walks the base model, so parameters are called "unet:12.weight". A
    list says neither the model nor the classes: a file name with text_encoder in it tells the text encoder from the
    UNet, and the classes follow from the number of pairs. The reader wants every number, so a module nothing is left
    of is written as a rank-1 pair of zeros.
    """

    id: ClassVar[str] = "cloneofsimo"
    title: ClassVar[str] = "cloneofsimo"

    def sniff(self, source: Source) -> Evidence | None:
        """Keys <model>:<number>:up, or a list of factors."""
        for key in source.tensors:
            found = _KEY.fullmatch(key)
            if found:
                return Evidence(3 if found[1] in source.metadata else 2, f"key {key}")
        if _is_list(source):
            return Evidence(2, f"a list of {len(source.payload)} factors, up before down")
        return None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; trained tokens (<s1>, ...) are carried."""
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        notes: tuple[str, ...] = ()
        extra: dict[str, Tensor] = {}
        if _is_list(source):
            modules, metadata = _from_list(source.payload, source.file.name)
            notes = ("a list names no modules, pairs are numbered in the order of the file",)
        else:
            modules = {}
            for key, t in source.tensors.items():
                found = _KEY.fullmatch(key)
                if found:
                    modules.setdefault(f"{found[1]}:{int(found[2])}", {})[found[3]] = t
                elif metadata.get(key) == _EMBEDDING or (key.startswith("<") and key.endswith(">")):
                    extra[key] = t
                else:
                    raise UnsupportedError(f"{key}: not a known cloneofsimo tensor")
        order = sorted(modules, key=lambda m: (m.partition(":")[0], int(m.partition(":")[2])))
        deltas: dict[str, Delta] = {f"{m}.weight": _read_module(m, modules[m], metadata) for m in order}
        config = {"shapes": {k.removesuffix(".weight"): list(d.shape) for k, d in deltas.items()}}
        origin = Origin(self.id, config, metadata, None, source.files, {}, {}, notes)
        return Adapter(deltas, {}, origin, read_history(source.metadata), extra)

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Anything but numbered pairs: names need the base model's order, and there is no magnitude and no bias."""
        lost = [f"{key}: {why}" for key, d in adapter.deltas.items() if (why := _refusal(key, d)) is not None]
        if adapter.replaced:
            lost.append(f"{len(adapter.replaced)} replaced tensors, first {next(iter(adapter.replaced))}")
        if adapter.extra and adapter.origin.dialect != self.id:
            lost.append(f"{len(adapter.extra)} carried tensors, first {next(iter(adapter.extra))}")
        return tuple(lost)

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the one safetensors file; a scale other than 1 is multiplied into up in float64."""
        mine = adapter.origin.dialect == self.id
        shapes: Mapping[str, Any] = adapter.origin.config.get("shapes", {}) if mine else {}
        kept = {k.removesuffix(".weight"): d for k, d in adapter.deltas.items() if d.nbytes and _refusal(k, d) is None}
        tensors: dict[str, Tensor] = {}
        metadata = {k: v for k, v in adapter.origin.metadata.items() if not k.endswith(":rank")} if mine else {}
        touched = not mine or bool(adapter.history)
        dtype = torch.float32
        for module, delta in kept.items():
            lora = None if isinstance(delta, NeedsBase) else as_lora(delta)
            assert lora is not None
            up, down, kernel = scaled(stored(lora.b), lora.scale), stored(lora.a), lora.shape[2:]
            if touched:  # float64 is what was computed, never what a loader expects
                up, down = (t.float() if t.dtype == torch.float64 else t for t in (up, down))
            dtype = up.dtype
            tensors[f"{module}:up"] = up.reshape(*up.shape, *(1 for _ in kernel))
            tensors[f"{module}:down"] = down.reshape(down.shape[0], *lora.shape[1:])
        for module, (out, *rest) in shapes.items():
            if module not in kept:
                tensors[f"{module}:up"] = torch.zeros(out, 1, *(1 for _ in rest[1:]), dtype=dtype)
                tensors[f"{module}:down"] = torch.zeros(1, *rest, dtype=dtype)
        ranks = {m.removesuffix("down") + "rank": str(t.shape[0]) for m, t in tensors.items() if m.endswith(":down")}
        for model in {m.partition(":")[0] for m in ranks}:
            count = sum(m.startswith(f"{model}:") for m in ranks)
            metadata.setdefault(model, _classes(model, count))
        if not touched:
            ranks = {k: v for k, v in ranks.items() if k in adapter.origin.metadata}
        tensors |= dict(adapter.extra) if mine else {}
        return {"": TensorsFile(tensors, metadata | ranks | history_metadata(adapter))}


def _refusal(key: str, delta: Delta) -> str | None:
    """Return why one delta has no place in this dialect, None when it has one."""
    if not _PARAMETER.fullmatch(key):
        return "has a name, and only the base model tells its number"
    if isinstance(delta, NeedsBase):
        return f"{delta.kind} has no key"
    if not has_factors(delta) or (isinstance(delta, LowRank) and len(delta.b.shape) != 2):
        return f"{type(delta).__name__.lower()} delta has no low-rank factors"
    return None


def _read_module(module: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LowRank:
    """Return dW = up down, scale 1. up: (out, r, 1...), down: (r, in, k...). Raises FormatError for half pairs."""
    down, up = pair(module, tensors, "down", "up")
    rank = down.shape[0]
    check_inner(module, "up", up.shape[1], "down", rank)
    said = metadata.get(f"{module}:rank")
    if said is not None and said != str(rank):
        raise FormatError(f"{module}: metadata says rank {said[:20]}, down has rank {rank}")
    if math.prod(up.shape[2:]) != 1:
        raise FormatError(f"{module}: up has shape {tuple(up.shape)}, its kernel must be 1")
    return LowRank(down.flatten(1), up.flatten(1), None, 1.0, (up.shape[0], *down.shape[1:]))


def _is_list(source: Source) -> bool:
    held = source.payload
    return isinstance(held, list) and bool(held) and all(isinstance(t, Tensor) and t.dim() >= 2 for t in held)


def _from_list(held: list[Tensor], file: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return the pairs of a flat list [up, down, up, down, ...] and the metadata a safetensors file would have."""
    if len(held) % 2:
        raise FormatError(f"{file}: a list of {len(held)} factors, half a pair too many")
    model = "text_encoder" if "text_encoder" in file else "unet"
    pairs = [(held[i].detach(), held[i + 1].detach()) for i in range(0, len(held), 2)]
    metadata = {f"{model}:{i}:rank": str(down.shape[0]) for i, (_, down) in enumerate(pairs)}
    metadata[model] = _classes(model, len(pairs))
    return {f"{model}:{i}": {"up": up, "down": down} for i, (up, down) in enumerate(pairs)}, metadata


def _classes(model: str, count: int) -> str:
    """Return the JSON list of layer classes that yields `count` modules of `model`."""
    classes = _CLASSES.get(model, ())
    return json.dumps(classes[:2] if model == "unet" and count == _ATTENTION_LAYERS else classes)
