"""The PEFT types adaptc reads: peft_type -> parameter prefixes and reader; and those refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.formats import peft_base, peft_dense, peft_factored, peft_frozen
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_lora import lora
from adaptc.formats.peft_parts import Read


@dataclass(frozen=True)
class PeftType:
    """One peft_type: how its parameters start, and how its modules become deltas."""

    prefixes: tuple[str, ...]
    read: Callable[[Modules, Mapping[str, Any]], Read]


TYPES: dict[str, PeftType] = {
    "LORA": PeftType(("lora_",), lora),
    "ADALORA": PeftType(("lora_", "ranknum"), peft_factored.adalora),
    "LOHA": PeftType(("hada_",), peft_factored.loha),
    "LOKR": PeftType(("lokr_",), peft_factored.lokr),
    "DELORA": PeftType(("delora_",), peft_factored.delora),
    "GRALORA": PeftType(("gralora_",), peft_factored.gralora),
    "VERA": PeftType(("vera_",), peft_frozen.vera),
    "PVERA": PeftType(("pvera_",), peft_frozen.pvera),
    "RANDLORA": PeftType(("randlora_",), peft_frozen.randlora),
    "VBLORA": PeftType(("vblora_",), peft_frozen.vblora),
    "TINYLORA": PeftType(("tinylora_",), peft_frozen.tinylora),
    "UNILORA": PeftType(("unilora_",), peft_frozen.unilora),
    "FOURIERFT": PeftType(("fourierft_",), peft_dense.fourierft),
    "WAVEFT": PeftType(("waveft_",), peft_dense.waveft),
    "C3A": PeftType(("c3a_",), peft_dense.c3a),
    "SHIRA": PeftType(("shira_",), peft_dense.shira),
    "PACA": PeftType(("paca_",), peft_dense.paca),
    "SUPERTUNING": PeftType(("supertuning_",), peft_dense.supertuning),
    "MISS": PeftType(("miss_", "bone_"), peft_dense.miss),
    "BONE": PeftType(("miss_", "bone_"), peft_dense.miss),
    "BEFT": PeftType(("beft_",), peft_dense.beft),
    "LN_TUNING": PeftType(("ln_tuning_layers",), peft_dense.ln_tuning),
    "TRAINABLE_TOKENS": PeftType((), peft_dense.tokens),
    "IA3": PeftType(("ia3_",), peft_base.each(peft_base.ia3)),
    "HRA": PeftType(("hra_",), peft_base.each(peft_base.hra)),
    "OFT": PeftType(("oft_",), peft_base.each(peft_base.oft)),
    "BOFT": PeftType(("boft_",), peft_base.each(peft_base.boft)),
    "ROAD": PeftType(("road_",), peft_base.each(peft_base.road)),
    "HIRA": PeftType(("hira_",), peft_base.each(peft_base.hira)),
    "GLORA": PeftType(("glora_",), peft_base.each(peft_base.glora)),
    "DEFT": PeftType(("deft_",), peft_base.each(peft_base.deft)),
    "OSF": PeftType(("osf_",), peft_base.each(peft_base.osf)),
    "PEANUT": PeftType(("peanut_",), peft_base.each(peft_base.peanut)),
    "PSOFT": PeftType(("psoft_",), peft_base.each(peft_base.psoft)),
    "FROD": PeftType(("frod_",), peft_base.frod),
}

_PROMPTS = "changes the input sequence, no weight: there is nothing to compress"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"),
                    _PROMPTS),
    "ADAPTION_PROMPT": "adds attention over learned prompts, no weight change",
    "ADAMSS": "clusters the rows of W0 by k-means on its SVD and does not save the clusters",
    "LILY": "routes every token over its experts at run time, no fixed weight change",
    "POLY": "mixes its skills by task at run time, no fixed weight change without a task id",
    "XLORA": "scales several LoRAs token by token at run time; compress its members one by one",
    "SHADOW": "runs a second network beside the model, no weight change",
}
