"""PEFT file keys: prefix, wrappers, adapter name, module path, tuner parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

PREFIX = "base_model.model."
GLOBAL = "base_model."
# Components that training wrappers leave anywhere in a key.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass
class Modules:
    """The tensors of a PEFT file, sorted: `tuned` module -> {parameter: tensor}, `shared` globals, `other` the rest."""

    tuned: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # parameter name in `other` -> verbatim file key


def strip(key: str) -> str:
    """Return the module path and parameter of a file key: one prefix and every wrapper removed."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    key = key.removeprefix("module.")
    return key.removeprefix(PREFIX)


def split(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> Modules:
    """Sort a PEFT file's tensors. `prefixes` are the tuner's parameter prefixes ("lora_", "hada_", ...).

    The first path element starting with a prefix ends the module path; what follows is the parameter, from which the
    adapter name ("default") of old or hand-made files is dropped.
    """
    prefixes = tuple(prefixes)
    out = Modules()
    for key in tensors:
        bare = strip(key)
        if bare == key and key.startswith(GLOBAL):  # globals hang on "base_model." without ".model."
            out.shared[key.removeprefix(GLOBAL)] = tensors[key]
            continue
        parts = bare.split(".")
        at = next((i for i, p in enumerate(parts) if p.startswith(prefixes)), None)
        if at is None:
            out.other[bare] = tensors[key]
            out.names[bare] = key
            continue
        tail = [p for p in parts[at:] if p != "default"]
        out.tuned.setdefault(".".join(parts[:at]), {})[".".join(tail)] = tensors[key]
    return out
