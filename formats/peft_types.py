"""The PEFT types adaptc reads: peft_type -> its parameter prefixes and its reader; and those refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.errors import NeedsError, UnsupportedError
from adaptc.formats import peft_lora
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_lora import Read

# Initialisations that move the base: the saved factors are only valid on the moved one.
_MOVED = {"pissa": "the top singular part of W0", "olora": "Q R of W0", "corda": "a covariance-oriented part of W0",
          "lora_ga": "scaled gradient factors", "loftq": "the quantization error of W0"}


@dataclass(frozen=True)
class PeftType:
    """One peft_type: how its parameters start, and how its modules become deltas."""

    prefixes: tuple[str, ...]
    read: Callable[[Modules, Mapping[str, Any]], Read]


def _lora(modules: Modules, config: Mapping[str, Any]) -> Read:
    init = str(config.get("init_lora_weights")).lower()
    moved = next((what for how, what in _MOVED.items() if init.startswith(how)), None)
    if moved is not None:
        raise NeedsError(f"init_lora_weights {init} subtracts {moved} from the base, the factors alone are not the change",
                         hint="save with path_initial_model_for_weight_conversion, which writes plain LoRA of rank 2r")
    for switch in ("use_qalora", "use_bdlora", "kasa_config"):
        if config.get(switch):
            raise UnsupportedError(f"LORA with {switch} changes what its factors mean and is not read yet")
    out = Read()
    for module, tensors in modules.tuned.items():
        one = peft_lora.read_module(module, tensors, config, modules.tuned)
        out.deltas |= one.deltas
        out.layout |= one.layout
        out.extra |= one.extra
        out.notes += one.notes
    return out


TYPES: dict[str, PeftType] = {"LORA": PeftType(("lora_",), _lora)}
REFUSED: dict[str, str] = {}
