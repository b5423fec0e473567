"""Forms of the container -> deltas: every number of a form is checked against the tensors it points to."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptc.coded import Coded
from adaptc.delta import Delta, Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError, UsageError
from adaptc.factor import Encoded, Factor
from adaptc.formats.config_json import deeper
from adaptc.formats.peft_codecs import check_places
from adaptc.formats.portable_write import FACTORS, PARTS
from adaptc.registry import CODECS
from adaptc.resolve import RESOLVERS
from adaptc.spectral import Spectral
from adaptc.tensorfile import DTYPES

# Beyond every model there is, and small enough that no form of a few bytes asks for all the memory.
MAX_DIM = 2**24
MAX_ENTRIES = 2**36  # of a parameter: 384 experts of 4096 x 7168 have 2^33.4
MAX_DECODED = 2**30  # of a factor stored as codes
MAX_DEPTH = 4  # of forms in forms
_FIELDS = {kind: {"kind", "shape", *more} for kind, more in {
    **FACTORS, **PARTS, "spectral": (*FACTORS["spectral"], "transform"), "coded": (),
    "needsbase": ("name", "config", "tensors", "inner")}.items()}


def read_shape(value: Any, *, empty: bool = False) -> tuple[int, ...]:
    """Return a shape. Raises FormatError unless it is a list of dimensions within bounds (`empty`: or zeros)."""
    whole = isinstance(value, list) and 0 < len(value) <= 8 and all(type(v) is int for v in value)
    if not whole or not all((0 if empty else 1) <= v <= MAX_DIM for v in value) or math.prod(value) > MAX_ENTRIES:
        raise FormatError(f"manifest has shape {str(value)[:60]}, dimensions are whole, 1 to {MAX_DIM}, and multiply "
                          f"to at most {MAX_ENTRIES}")
    return tuple(value)


def read_number(value: Any, what: str) -> float:
    """Return a finite number. Raises FormatError for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e300:
        raise FormatError(f"{what} is {str(value)[:40]!r}, not a finite number")
    return float(value)


def read_form(form: Any, held: Sequence[Tensor], scales: Sequence[float], name: str = "",
              coded: MutableMapping[str, Delta] | None = None) -> Delta:
    """Return the delta of the module `name` of a group from its tensors and multipliers.

    A form of kind "coded" takes the delta of that name out of `coded`. Raises FormatError for a form that
    contradicts its tensors, or that leaves one out.
    """
    module = _Module(held, scales, name, {} if coded is None else coded)
    made = module.delta(form, 0)
    left = set(range(len(held))) - module.used
    if left:
        raise FormatError(f"tensor {min(left)} of the group is not named in its form")
    return made


@dataclass
class _Module:
    """The tensors and multipliers of a module, and the numbers of those that were named so far."""

    held: Sequence[Tensor]
    scales: Sequence[float]
    name: str
    coded: MutableMapping[str, Delta]
    used: set[int] = field(default_factory=set)

    def delta(self, form: Any, depth: int) -> Delta:
        """Return the delta of a form."""
        if not isinstance(form, dict) or depth > MAX_DEPTH:
            raise FormatError(f"manifest has forms in forms deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else
                              f"manifest has form {str(form)[:60]!r}, which is no object")
        kind = form.get("kind")
        if not isinstance(kind, str) or kind not in _FIELDS:
            raise FormatError(f"manifest has a delta of kind {str(kind)[:60]!r}, which this version does not know")
        odd = set(form) - _FIELDS[kind] - {"scale"}
        if odd:
            raise FormatError(f"form of kind {kind} has a field {min(odd)[:60]!r}, which this version does not know")
        if kind == "needsbase":
            return self._needs_base(form, depth)
        shape, scale = read_shape(form.get("shape")), self._scale(form)
        match kind:
            case "coded":
                code = self.coded.pop(self.name, None)
                if code is None or code.shape != shape:
                    raise FormatError(f"no code holds this module with shape {shape}")
                return code
            case "lowrank":
                core = self._factor(form["core"]) if "core" in form else None
                return checked(LowRank(self._factor(form["a"]), self._factor(form["b"]), core, scale, shape))
            case "dense":
                weight = self._factor(form["weight"])
                if math.prod(weight.shape) != math.prod(shape):
                    raise FormatError(f"dense delta of shape {shape} has a weight of shape {tuple(weight.shape)}")
                return Dense(weight, scale, shape)
            case "sparse":
                return Sparse(*self._entries(form, shape), scale, shape)
            case "spectral":
                places, values = self._entries(form, shape)
                spectral = Spectral(places, values, str(form["transform"]), scale, shape)
                spectral.basis()  # refuses a transform that this width has not
                return spectral
            case "kron":
                left, right = (self._part(form[side], depth, LowRank, Dense) for side in ("left", "right"))
                made = left.shape[0] * right.shape[0], _columns(left.shape) * _columns(right.shape)
                if made != (shape[0], _columns(shape)):
                    raise FormatError(f"kron of {left.shape} and {right.shape} makes {made}, not shape {shape}")
                return Kron(left, right, scale, shape)
            case "hadamard":
                left, right = (self._part(form[side], depth, LowRank) for side in ("left", "right"))
                if not left.shape == right.shape == shape:
                    raise FormatError(f"hadamard of {left.shape} and {right.shape} does not make shape {shape}")
                return Hadamard(left, right, scale, shape)
            case _:
                terms = form["terms"]
                if not isinstance(terms, list) or not terms or "scale" in form:
                    raise FormatError(f"sum has terms {str(terms)[:40]}, not a list of forms alone")
                parts = tuple(self._part(t, depth, *_FREE) for t in terms)
                if any(p.shape != shape for p in parts):
                    raise FormatError(f"sum of shape {shape} has terms of other shapes")
                return Sum(parts, shape)

    def _entries(self, form: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Factor, Tensor]:
        """Return rising flat indices, or codes of them, and the values there."""
        if isinstance(form["indices"], dict):
            codes, values = self._encoded(form["indices"]), _floats(self._tensor(form["values"]))
            if codes.codec != "golomb" or codes.dtype != torch.int64 or codes.config["size"] != math.prod(shape):
                raise FormatError(f"codes of {codes.codec} are no positions in shape {shape}")
            if values.shape != codes.shape:
                raise FormatError(f"{codes.shape[0]} positions have values of shape {tuple(values.shape)}")
            return codes, values
        indices, values = self._tensor(form["indices"]), _floats(self._tensor(form["values"]))
        check_places(indices, values, shape)
        if bool((indices[1:] < indices[:-1]).any()):
            raise FormatError("indices of a sparse delta are not sorted")
        return indices, values

    def _needs_base(self, form: Mapping[str, Any], depth: int) -> NeedsBase:
        name, config, tensors = form["name"], form["config"], form["tensors"]
        if depth:
            raise FormatError("a form that needs base weights lies inside another form")
        if not isinstance(name, str) or name not in RESOLVERS:
            raise FormatError(f"manifest has a change of base weights {str(name)[:60]!r}, which is not known")
        if not isinstance(config, dict) or deeper(config, 8) or not isinstance(tensors, dict):
            raise FormatError(f"{name} has a config or tensors that are no objects")
        shared = config.get("shared", {})
        if not isinstance(shared, dict) or not all(isinstance(v, str) for v in shared.values()):
            raise FormatError(f"{name} shares {str(shared)[:40]}, not tensors by name")
        shape = read_shape(form.get("shape"), empty=True)  # some are known only once the base is
        inner = self._part(form["inner"], depth, *_FREE) if "inner" in form else None
        if inner is not None and inner.shape != shape:
            raise FormatError(f"{name} of shape {shape} changes a direction of shape {inner.shape}")
        return NeedsBase(name, {k: self._tensor(v) for k, v in tensors.items()}, config, shape, inner)

    def _part(self, form: Any, depth: int, *kinds: type) -> Any:
        made = self.delta(form, depth + 1)
        if not isinstance(made, kinds):
            raise FormatError(f"a form of kind {type(made).__name__.lower()} lies where none may")
        return made

    def _scale(self, form: Mapping[str, Any]) -> float:
        number = form.get("scale")
        if number is None:
            return 1.0
        if type(number) is not int or not 0 <= number < len(self.scales):
            raise FormatError(f"form names multiplier {str(number)[:40]} of {len(self.scales)}")
        return self.scales[number]

    def _tensor(self, number: Any) -> Tensor:
        if type(number) is not int or not 0 <= number < len(self.held):
            raise FormatError(f"form names tensor {str(number)[:40]} of {len(self.held)}")
        if number in self.used:
            raise FormatError(f"form names tensor {number} twice")
        self.used.add(number)
        return self.held[number]

    def _factor(self, value: Any) -> Factor:
        if not isinstance(value, dict):
            return _floats(self._tensor(value))
        made = self._encoded(value)
        if not made.dtype.is_floating_point:
            raise FormatError(f"codes of {str(made.dtype)[6:]} {tuple(made.shape)} do not make a factor")
        return made

    def _encoded(self, value: Mapping[str, Any]) -> Encoded:
        streams = {k: self._tensor(v) for k, v in value["streams"].items()}
        shape, config, dtype = read_shape(value["shape"]), value["config"], DTYPES.get(str(value["dtype"]))
        if dtype is None or math.prod(shape) > MAX_DECODED:
            raise FormatError(f"codes of {str(value['dtype'])[:20]} {shape} do not make a factor")
        codec = CODECS.get(str(value["codec"])[:60])
        if not hasattr(codec, "check"):
            raise FormatError(f"codec {value['codec']} codes no single factors")
        try:
            codec(**config).check(streams, shape)
        except (TypeError, UsageError) as e:
            raise FormatError(f"codec {value['codec']} does not take config {str(config)[:60]}") from e
        return Encoded(str(value["codec"]), config, streams, torch.Size(shape), dtype)


_FREE = (LowRank, Dense, Kron, Hadamard, Sparse, Spectral, Sum, Coded)


def checked(d: LowRank) -> LowRank:
    """Return `d`. Raises FormatError unless its factors share ranks and make its shape."""
    a, b = tuple(d.a.shape), tuple(d.b.shape)
    if len(a) not in (2, 3) or len(a) != len(b):
        raise FormatError(f"factors of {b} and {a} are no pair of matrices")
    stacked = len(a) == 3
    if stacked and (len(d.shape) != 3 or not a[0] == b[0] == d.shape[0]):
        raise FormatError(f"factors of {b} and {a} do not make {d.shape[0]} experts")
    if (b[-2], a[-1]) != (d.shape[1:] if stacked else (d.shape[0], _columns(d.shape))):
        raise FormatError(f"factors of {b} and {a} do not make shape {d.shape}")
    core = (a[-2], a[-2]) if d.core is None else tuple(d.core.shape)
    if core[-2:] != (b[-1], a[-2]) or len(core) > len(a) or core[:-2] not in ((), a[:-2]):
        raise FormatError(f"factors of {b} and {a} do not share a rank" if d.core is None else
                          f"core of {core} does not join factors of {b} and {a}")
    return d


def _columns(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _floats(t: Tensor) -> Tensor:
    if not t.dtype.is_floating_point:
        raise FormatError(f"a factor of {str(t.dtype)[6:]} {tuple(t.shape)} holds no floats")
    return t
