"""PEFT file keys: prefix, wrappers, adapter name, module path, tuner parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptc.errors import FormatError, UnsupportedError

PREFIX = "base_model.model."
GLOBAL = "base_model."
# Components that training wrappers leave anywhere in a key.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Parameters that only tuners have: beside another tuner's they are no replacements but a file of two types.
_TUNERS = re.compile(
    r"(^|\.)(lora_(A|B|E|embedding_[AB]|magnitude_vector)|hada_[wt]\d|lokr_[wt]\d|p?vera_(A|B|lambda)|randlora_|fourierft_|"
    r"waveft_|c3a_|vblora_|hra_u|oft_(r|R|embedding)|boft_[Rs]|ln_tuning_layers|ia3_l|miss_block|bone_block|shira_|"
    r"supertuning_|road_(theta|alpha)|delora_|gralora_|hira_|beft_bias|glora_|deft_[PR]|frod_|osf_svd|peanut_|psoft_R|"
    r"tinylora_|unilora_|adamss_|lily_|poly_(lora|router)|prompt_embeddings|prefix_encoder|adaption_)")


@dataclass
class Modules:
    """The tensors of a PEFT file, sorted: `tuned` module -> {parameter: tensor}, `shared` globals, `other` the rest."""

    tuned: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)


def split(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> Modules:
    """Sort a PEFT file's tensors. `prefixes` are the tuner's parameter prefixes ("lora_", "hada_", ...).

    The last path element starting with a prefix ends the module path; what follows is the parameter, from which the
    adapter name of old or hand-made files is dropped. Raises FormatError for two keys that mean the same (two adapters
    in one file), UnsupportedError for parameters of another tuner.
    """
    prefixes = tuple(prefixes)
    out, seen = Modules(), dict[str, str]()
    for key in tensors:
        place, bare = _stripped(key)
        parts = bare.split(".")
        at = max((i for i, p in enumerate(parts) if p.startswith(prefixes)), default=None) if prefixes else None
        if at is None:
            name, home = bare, out.shared if place is GLOBAL else out.other
            if _TUNERS.search(name):
                raise UnsupportedError(f"{key} is no parameter of this peft_type")
        else:
            tail = _parameter(parts[at:])
            name = ".".join([*parts[:at], tail])
            home = out.shared if at == 0 else out.tuned.setdefault(".".join(parts[:at]), {})
            bare = tail
        if name in seen:
            raise FormatError(f"{seen[name]} and {key} are the same parameter: two adapters in one file")
        seen[name] = key
        home[bare] = tensors[key]
    return out


def strip(key: str) -> str:
    """Return the module path and parameter of a file key: one prefix and every wrapper removed."""
    return _stripped(key)[1]


def _stripped(key: str) -> tuple[str, str]:
    """Return which prefix a key had (PREFIX, GLOBAL or none) and the rest, wrappers removed."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    if key.startswith(f"module.{GLOBAL}"):
        key = key.removeprefix("module.")
    for prefix in (PREFIX, GLOBAL):  # globals hang on "base_model." without ".model."
        if key.startswith(prefix):
            return prefix, key.removeprefix(prefix)
    return "", key


def _parameter(parts: list[str]) -> str:
    """Return the parameter without an adapter name: lora_A.default.weight, lora_A.mine.weight -> lora_A.weight."""
    if len(parts) == 3 and parts[0] in ("lora_A", "lora_B") and parts[2] in ("weight", "bias"):
        parts = [parts[0], parts[2]]
    return ".".join(p for p in parts if p != "default")
