"""QHFT: checkpoints of QWHA's official code, a fork of PEFT (arXiv 2509.17428). Power-of-two widths only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Delta, NeedsBase
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.format import Content, Evidence, Format, TensorsFile, history_metadata, read_history
from adaptc.formats.peft_keys import PREFIX
from adaptc.formats.source import Source
from adaptc.spectral import Spectral

SCALING, SEED = 4000.0, 777  # what the official code trains with
_SHAPES = "adaptc.shapes"  # our files tell the shapes of weights, which official ones leave to the base
_PARTS = ("qhft_spectrum", "qhft_indices", "qhft_n_frequency", "qhft_scaling", "qhft_random_loc_seed")


class Qhft(Format):
    """dW = spectrum scattered to `indices` (2, p: output, spectral position) times U, times scaling / sqrt(in * out).

    U is Sylvester's orthonormal matrix, which both sides share; at other widths the official code takes matrices from
    a table of its own, and those are refused by name.
    """

    id: ClassVar[str] = "qhft"
    title: ClassVar[str] = "QHFT"
    writes: ClassVar[str] = "folder"
    exact_only: ClassVar[bool] = True

    def sniff(self, source: Source) -> Evidence | None:
        """Keys of qhft_spectrum."""
        found = next((k for k in source.tensors if _split(k)[1] == "qhft_spectrum"), None)
        return Evidence(4, f"key {found}") if found else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter; without stored shapes its deltas wait for those of the base weights."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key, t in source.tensors.items():
            module, part = _split(key)
            if part is None:
                raise UnsupportedError(f"{key}: belongs to no known part of a QHFT adapter")
            modules.setdefault(module, {})[part] = t
        shapes = _shapes(source.metadata.get(_SHAPES, "{}"), source.file.name)
        deltas: dict[str, Delta] = {}
        for module, parts in modules.items():
            key, scaling = f"{module}.weight", parts.get("qhft_scaling")
            if "qhft_spectrum" not in parts or "qhft_indices" not in parts:
                raise FormatError(f"{module}: has {', '.join(parts)}, not both qhft_spectrum and qhft_indices")
            value = float(scaling) if scaling is not None and scaling.numel() == 1 else source.config.get("scaling")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise FormatError(f"{module}: scaling is {str(value)[:40]}, not a finite number")
            held = {"indices": parts["qhft_indices"], "spectrum": parts["qhft_spectrum"]}
            waiting = NeedsBase("qhft", held, {"scaling": float(value)}, shapes.get(key, (0, 0)))
            deltas[key] = waiting.resolve(torch.empty(shapes[key], device="meta")) if key in shapes else waiting
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        origin = Origin("qhft", dict(source.config), metadata, source.config.get("base_model_name_or_path"),
                        source.files)
        return Adapter(deltas, {}, origin, read_history(source.metadata))

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """QHFT has spectral coefficients only."""
        carried = len(adapter.replaced) + len(adapter.extra)
        return (f"{carried} carried tensors, QHFT has coefficients only",) if carried else ()

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return config and tensors. Raises UnsupportedError naming a delta that has no place there."""
        tensors: dict[str, Tensor] = {}
        most, shapes = 0, {}
        for key, d in adapter.deltas.items():
            if not isinstance(d, Spectral) or len(d.shape) != 2 or not key.endswith(".weight"):
                raise UnsupportedError(f"{key}: {d!r} has no place in QHFT")
            if d.transform != "sylvester":
                raise UnsupportedError(f"{key}: width {d.width} is no power of two, QHFT has another Hadamard matrix "
                                       f"there than {d.transform}")
            stem, places, shapes[key] = PREFIX + key.removesuffix(".weight"), d.places(), list(d.shape)
            spectrum = d.values.double() * (d.scale * math.sqrt(math.prod(d.shape)) / SCALING)
            tensors[f"{stem}.qhft_spectrum"] = spectrum.float()
            tensors[f"{stem}.qhft_indices_default"] = torch.stack([places // d.width, places % d.width]).int()
            tensors[f"{stem}.qhft_n_frequency_default"] = torch.tensor(len(places))
            tensors[f"{stem}.qhft_scaling_default"] = torch.tensor(SCALING)
            tensors[f"{stem}.qhft_random_loc_seed_default"] = torch.tensor(SEED)
            most = max(most, len(places))
        config: dict[str, Any] = {
            "peft_type": "QHFT", "base_model_name_or_path": adapter.origin.base_model, "inference_mode": True,
            "n_frequency": most, "scaling": SCALING, "random_loc_seed": SEED, "init_weights": False,
            "target_modules": sorted({k.split(".")[-2] for k in adapter.deltas}), "task_type": None,
        }
        metadata = {"format": "pt", _SHAPES: json.dumps(shapes), **history_metadata(adapter)}
        return {"adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
                "adapter_model.safetensors": TensorsFile(tensors, metadata)}


def _split(key: str) -> tuple[str, str | None]:
    """Return the module and the part a key names, with the adapter's name taken off."""
    module, _, leaf = key.removesuffix(".default").removeprefix(PREFIX).rpartition(".")
    leaf = leaf.removesuffix("_default")
    return module, leaf if leaf in _PARTS else None


def _shapes(text: str, file: str) -> dict[str, tuple[int, int]]:
    try:
        said = {str(k): (v[0], v[1]) for k, v in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise FormatError(f"{file}: metadata {_SHAPES} is no map of shapes") from e
    if not all(type(v) is int and 0 < v <= 2**24 for shape in said.values() for v in shape):
        raise FormatError(f"{file}: metadata {_SHAPES} holds a shape that no weight has")
    return said
