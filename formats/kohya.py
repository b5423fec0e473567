"""kohya sd-scripts: flattened module names, lora_down, lora_up and alpha, training notes in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.delta import Delta, LowRank, NeedsBase
from adaptc.errors import FormatError
from adaptc.formats import kohya_modules as modules
from adaptc.formats.alpha import alpha_for, alpha_value, record_alpha, recorded_alpha
from adaptc.formats.flatnames import PREFIXES, has_several_encoders, module_of, stem_of
from adaptc.formats.format import Content, Evidence, TensorsFile, read_history
from adaptc.formats.kohya_metadata import NAMES_KEY, updated_metadata
from adaptc.formats.safetensors_file import SafetensorsFile
from adaptc.formats.source import Source

_KNOWN = frozenset({"lora_down.weight", "lora_up.weight", "alpha", modules.DORA})
_EMBEDDINGS = "bundle_emb."  # textual inversions that sd-scripts packs into the same file


class Kohya(SafetensorsFile):
    """Read and write plain LoRA and LoCon as sd-scripts, A1111 and ComfyUI read them.

    Origin.config holds `alpha`: stem -> [value, dtype, shape] of every alpha tensor; Origin.names the stem of every
    parameter. Names that cannot be unflattened stay as they are and are written so.
    """

    id: ClassVar[str] = "kohya"
    title: ClassVar[str] = "kohya"
    network: ClassVar[str] = "networks.lora"
    keep_mid: ClassVar[bool] = False

    def sniff(self, source: Source) -> Evidence | None:
        """lora_down.weight under a flattened module name."""
        if is_lycoris(source):
            return None
        key = next((k for k in source.tensors if k.endswith(".lora_down.weight") and is_flat(k)), None)
        if key is None:
            return None
        module = source.metadata.get("ss_network_module")
        return Evidence(3, f"metadata ss_network_module is {module}") if module else Evidence(2, f"key {key}")

    def read(self, source: Source) -> Adapter:
        """Return the adapter; every tensor is consumed, carried, or the file is refused."""
        stems, extra = _by_stem(source)
        named = _names(source)
        deltas: dict[str, Delta] = {}
        names: dict[str, str] = {}
        layout: dict[str, str] = {}
        alphas: dict[str, list[Any]] = {}
        flat = []
        for stem, tensors in stems.items():
            module = named.get(stem) or module_of(stem)
            if module is None:
                flat.append(stem)
                module = stem
            made = self.read_module(stem, tensors)
            if "alpha" in tensors:
                alphas[stem] = record_alpha(alpha_value(stem, tensors["alpha"]), tensors["alpha"])
            for leaf, delta in (("weight", made.weight), ("bias", made.bias)):
                key = f"{module}.{leaf}"
                if delta is None:
                    continue
                if key in deltas:
                    raise FormatError(f"{names[key]} and {stem} both name {key}")
                deltas[key], names[key] = delta, stem
                if made.norm:
                    layout[key] = "norm"
        notes = (f"{len(flat)} flattened module names stay as they are, first {flat[0]}",) if flat else ()
        metadata = {k: v for k, v in source.metadata.items() if not k.startswith("adaptc.")}
        base = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
        origin = Origin(self.id, {"alpha": alphas}, metadata, base, source.files, names, layout, notes)
        return Adapter(self.finish(dict(sorted(deltas.items()))), {}, origin, read_history(source.metadata), extra)

    def read_module(self, stem: str, tensors: Mapping[str, Tensor]) -> modules.Module:
        """Return what the tensors of one stem mean."""
        modules.check_known(stem, tensors, _KNOWN, "kohya")
        return modules.Module(modules.with_dora(stem, modules.read_lora(stem, tensors), tensors.get(modules.DORA)))

    def finish(self, deltas: dict[str, Delta]) -> dict[str, Delta]:
        """Return the deltas after what only the whole file can tell."""
        return deltas

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Weights without factors, biases, experts, embeddings, replaced tensors, and names that fall together."""
        lost = [f"{key}: {why}" for key, why in self._refused(adapter).items()]
        if adapter.replaced:
            lost.append(f"{len(adapter.replaced)} replaced tensors, first {next(iter(adapter.replaced))}")
        if adapter.extra and adapter.origin.dialect not in FLAT:
            lost.append(f"{len(adapter.extra)} carried tensors, first {next(iter(adapter.extra))}")
        return tuple(lost)

    def _refused(self, adapter: Adapter) -> dict[str, str]:
        """Return parameter name -> reason of every delta that has no place in this dialect."""
        refused: dict[str, str] = {}
        owners: dict[str, str] = {}
        for key, stem in self._stems(adapter).items():
            why = self.refusal(key, adapter.deltas[key], adapter.origin.layout.get(key, ""))
            module = key.rpartition(".")[0]
            if why is None and owners.setdefault(stem, module) != module:
                why = f"flattens to {stem}, as {owners[stem]} does"
            if why is not None:
                refused[key] = why
        return refused

    def refusal(self, key: str, delta: Delta, layout: str) -> str | None:
        """Return why one delta has no place in this dialect, None when it has one."""
        module, _, leaf = key.rpartition(".")
        inner = delta.inner if isinstance(delta, NeedsBase) else delta
        if isinstance(delta, NeedsBase) and (delta.kind != "dora" or inner is None):
            return f"{delta.kind} changes the base weight"
        if leaf not in ("weight", "bias") or not module:
            return "is not the weight or bias of a module"
        if ":" in module:
            return "is numbered in the base model's order, its module name needs the base"
        if layout == "embedding" or (isinstance(inner, LowRank) and len(inner.b.shape) != 2):
            return f"{layout.partition(':')[0] or 'stack of experts'} is no linear layer or convolution"
        assert inner is not None
        return self.unwritable(leaf, inner)

    def unwritable(self, leaf: str, inner: Any) -> str | None:
        """Return why a delta without magnitude cannot be written, None when it can."""
        if leaf == "bias":
            return "a change of a bias has no key"
        return None if modules.has_factors(inner) else f"{type(inner).__name__.lower()} delta has no low-rank factors"

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the one safetensors file."""
        mine = adapter.origin.dialect in FLAT
        recorded = adapter.origin.config.get("alpha", {}) if mine else {}
        refused = self._refused(adapter)
        stems = {k: s for k, s in self._stems(adapter).items() if k not in refused}
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, Tensor | None] = {}
        ranks: dict[str, tuple[int, float, bool]] = {}
        for key, stem in stems.items():
            delta = adapter.deltas[key]
            inner = delta.inner if isinstance(delta, NeedsBase) else delta
            made, s, rank = self.write_delta(key, inner, adapter.origin.layout.get(key, ""))
            if rank and s == 0.0:  # an alpha of 0 means 1, so nothing but zeros says zero
                made, s = {k: torch.zeros_like(t) for k, t in made.items()}, 1.0
            if isinstance(delta, NeedsBase):
                made[modules.DORA] = modules.write_dora(delta)
            tensors |= {f"{stem}.{name}": t for name, t in made.items()}
            if rank:
                ranks[stem] = rank, s, len(delta.shape) > 2 and max(delta.shape[2:]) > 1
                alphas[stem] = alpha_for(s, rank, recorded, stem, optional=mine)
            else:
                alphas.setdefault(stem, recorded_alpha(recorded, stem))
        if adapter.origin.dialect != self.id or adapter.history:  # float64 was computed, no loader expects it
            tensors = {k: t.float() if t.dtype == torch.float64 else t for k, t in tensors.items()}
        tensors |= {f"{stem}.alpha": alpha for stem, alpha in alphas.items() if alpha is not None}
        modules_of = {s: k.rpartition(".")[0] for k, s in stems.items()}
        names = {s: m for s, m in modules_of.items() if (module_of(s) or s) != m}
        metadata = updated_metadata(adapter, self.network, FLAT, ranks, names)
        return {"": TensorsFile(tensors | (dict(adapter.extra) if mine else {}), metadata)}

    def write_delta(self, key: str, inner: Any, layout: str) -> tuple[dict[str, Tensor], float, int]:
        """Return (tensors by parameter, scale, rank) of one delta without its magnitude."""
        lora = modules.as_lora(inner)
        assert lora is not None
        return modules.write_lora(lora, keep_mid=self.keep_mid), lora.scale, lora.rank

    def _stems(self, adapter: Adapter) -> dict[str, str]:
        """Return parameter name -> kohya stem of every delta that stores anything."""
        mine = adapter.origin.names if adapter.origin.dialect in FLAT else {}
        several = has_several_encoders(adapter.deltas)
        return {k: mine.get(k) or stem_of(k.rpartition(".")[0], several) for k, d in adapter.deltas.items() if d.nbytes}


FLAT = ("kohya", "lycoris")


def is_flat(key: str) -> bool:
    """Return whether a file key is <prefix>_<flattened module>.<parameter>."""
    return key.startswith(tuple(PREFIXES))


def is_lycoris(source: Source) -> bool:
    """Return whether a file of flattened names is LyCORIS': by its metadata, or by parameters only LyCORIS writes."""
    flat = [k for k in source.tensors if is_flat(k)]
    if flat and source.metadata.get("ss_network_module", "").startswith("lycoris"):
        return True
    return any(modules.is_lycoris_parameter(k.partition(".")[2]) for k in flat)


def _by_stem(source: Source) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the tensors by stem and parameter, and those that change no weight."""
    stems: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    for key, t in source.tensors.items():
        stem, _, parameter = key.partition(".")
        if key.startswith(_EMBEDDINGS):
            extra[key] = t
        elif parameter:
            stems.setdefault(stem, {})[parameter] = t
        else:
            raise FormatError(f"{key}: is no parameter of a module")
    if not stems:
        raise FormatError(f"{source.file.name}: holds no tensors")
    return stems, extra


def _names(source: Source) -> dict[str, str]:
    """Return stem -> module path as adaptc wrote it beside names that flattening loses."""
    try:
        named = json.loads(source.metadata.get(NAMES_KEY, "{}"))
    except (ValueError, RecursionError):
        named = None
    if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
        raise FormatError(f"{source.file.name}: metadata {NAMES_KEY} is not a map of names")
    return named
