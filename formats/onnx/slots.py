"""Slots: the graph inputs through which a model takes an adapter, found by their names or made for a module.

The names are those of Olive and ORT GenAI, so that their adapters load into models patched here and ours into theirs:

    STEM.lora_A.weight (in, r)    STEM.lora_B.weight (r, out)        floats, the scale folded into B
    STEM.lora_A.MatMul.weight     STEM.lora_B.MatMul.weight          the same, as ORT GenAI's builder calls them
    STEM.lora_A.codes (r, bytes)  STEM.lora_B.codes  STEM.lora_core  codes that the graph decodes (formats.onnx.codes);
                                                                     int8 ones of A lie (in, r)
    STEM.lora_magnitude (out,)    gains of DoRA                      STEM.lora_delta (in or 0, out)  a full change
    PARAMETER.replaced            a head, norm or bias that the adapter carries whole
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.errors import FormatError, NeedsError
from adaptc.formats.onnx.linear import FLOAT, FLOAT16
from adaptc.formats.onnx.match import Site
from adaptc.formats.onnx.model import Model
from adaptc.formats.onnx.names import canonical, distance

STORE = "adaptc.store"  # metadata: what the slots hold
FLOAT_STORES = {"float32": FLOAT, "float16": FLOAT16}
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.((?:MatMul\.)?weight|codes)$")
_OTHER = re.compile(r"(.+)\.lora_(core|magnitude|delta)$")
_REPLACED = ".replaced"
INT8 = 3


@dataclass(frozen=True)
class Slot:
    """The inputs of one module: `a` and `b` or `delta`, with `core` where they are codes, `gain` for DoRA.

    `shape` is (out, in), `rank` None where the graph takes any, `dtype` ONNX's number of what a and b hold.
    """

    stem: str
    shape: tuple[int, int]
    a: str = ""
    b: str = ""
    core: str = ""
    gain: str = ""
    delta: str = ""
    rank: int | None = None
    dtype: int = FLOAT
    nbytes: tuple[int, int] = (0, 0)  # of a row of codes of a and b
    gain_dtype: int = FLOAT

    @property
    def names(self) -> tuple[str, ...]:
        """Its inputs."""
        return tuple(n for n in (self.a, self.b, self.core, self.gain, self.delta) if n)


def slot_for(site: Site, store: str, *, dora: bool = False, full: bool = False) -> Slot:
    """Return the slot of a module that has none yet."""
    stem = canonical(site.module) if site.genai else site.module
    shape = _shape(site)
    gain = f"{stem}.lora_magnitude" if dora else ""
    if full:
        return Slot(stem, shape, gain=gain, delta=f"{stem}.lora_delta")
    if store not in FLOAT_STORES:
        return Slot(stem, shape, f"{stem}.lora_A.codes", f"{stem}.lora_B.codes", f"{stem}.lora_core", gain)
    leaf = "MatMul.weight" if site.genai else "weight"
    return Slot(stem, shape, f"{stem}.lora_A.{leaf}", f"{stem}.lora_B.{leaf}", gain=gain, dtype=FLOAT_STORES[store])


def _shape(site: Site) -> tuple[int, int]:
    out, into = site.linears[0].shape
    return (out if site.rows is None else site.rows[1] - site.rows[0], into)


def slots_of(model: Model) -> dict[str, Slot]:
    """Return the slots a model has, by stem. Raises FormatError for half a slot."""
    found: dict[str, dict[str, str]] = {}
    for name in model.inputs:
        factor, other = _FACTOR.match(name), _OTHER.match(name)
        if factor is not None:
            found.setdefault(factor[1], {})[factor[2].lower()] = name
        elif other is not None:
            found.setdefault(other[1], {})[{"magnitude": "gain"}.get(other[2], other[2])] = name
    slots = {}
    for stem, names in found.items():
        if ("a" in names) != ("b" in names) or not ("a" in names or "delta" in names):
            raise FormatError(f"{stem}: input {next(iter(names.values()))} has no other half")
        slots[stem] = _slot(model, stem, names)
    return slots


def _slot(model: Model, stem: str, names: Mapping[str, Any]) -> Slot:
    types = {k: int(model.inputs[n].type.tensor_type.elem_type) for k, n in names.items()}
    more = {**names, "gain_dtype": types.get("gain", FLOAT)}
    if "delta" in names:
        dims = _dims(model.inputs[names["delta"]])
        return Slot(stem, (dims[1] or 0, dims[0] or 0), **more, dtype=types["delta"])
    a, b = model.inputs[names["a"]], model.inputs[names["b"]]
    rows, columns = _dims(a), _dims(b)
    if "core" in names:  # the dims count bytes, the module's own shape is not known
        whole = rows[0] if types["a"] == INT8 else rows[1]
        return Slot(stem, (0, 0), **more, nbytes=(whole or 0, columns[1] or 0))
    return Slot(stem, (columns[1] or 0, rows[0] or 0), **more, rank=rows[1], dtype=types["a"])


def _dims(value: Any) -> list[int | None]:
    dims: list[int | None] = [int(d.dim_value) if d.HasField("dim_value") else None
                              for d in value.type.tensor_type.shape.dim]
    if len(dims) != 2:
        raise FormatError(f"input {value.name} has {len(dims)} dimensions, a slot has 2")
    return dims


def replaced_slots(model: Model) -> dict[str, str]:
    """Return parameter -> input for parameters that an adapter may replace whole."""
    return {n.removesuffix(_REPLACED): n for n in model.inputs if n.endswith(_REPLACED)}


def replaced_name(key: str) -> str:
    """Return the input through which parameter `key` is replaced."""
    return key + _REPLACED


def required(model: Model) -> bool:
    """Return whether the slots have no defaults."""
    names = {n for s in slots_of(model).values() for n in s.names}
    return not names <= set(model.initializers)


def assign(model: Model, keys: Iterable[str]) -> dict[str, Slot]:
    """Return the slot of every parameter in `keys`. Raises NeedsError naming the first that has none."""
    slots = slots_of(model)
    if not slots:
        raise NeedsError(f"{model.path.name} has no adapter inputs", hint="--slots optional makes them")
    out: dict[str, Slot] = {}
    for key in keys:
        module = key.removesuffix(".weight")
        near = {stem: d for stem in slots if (d := distance(stem, module)) is not None}
        best = [stem for stem, d in near.items() if d == min(near.values())]
        if len(best) != 1:
            first = next(iter(slots.values())).names[0]
            raise NeedsError(f"{key}: none of the {len(slots)} slots of {model.path.name} is for it; the first is "
                             f"{first}", hint="--slots patches the original base for this adapter")
        out[key] = slots[best[0]]
    return out
