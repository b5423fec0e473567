"""Key generations of diffusers LoRA files: file key <-> module, role and the key of the other half."""

from __future__ import annotations

import re

from adaptc.formats.flatnames import COMPONENTS, root_component, with_text_model

# Endings of file keys and what the tensor is, newest generation first. What comes before is the module.
_ENDINGS = (
    (re.compile(r"\.lora_A(\.[A-Za-z]\w*)?\.weight$"), "a"), (re.compile(r"\.lora_B(\.[A-Za-z]\w*)?\.weight$"), "b"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$"), "a"),
    (re.compile(r"(\.lora|_lora|\.lora_linear_layer)\.up\.weight$"), "b"),
    (re.compile(r"\.lora_down\.weight$"), "a"), (re.compile(r"\.lora_up\.weight$"), "b"),
    (re.compile(r"\.lora_magnitude_vector(\.[A-Za-z]\w*)?$"), "magnitude"), (re.compile(r"\.dora_scale$"), "dora"),
    (re.compile(r"\.lora_B(\.[A-Za-z]\w*)?\.bias$"), "bias"), (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "diff"), (re.compile(r"\.diff_b$"), "diff_b"),
)
_REACH = 120  # characters from the end that an ending may take: adapter names in it are short
# Attention processors held one layer each under these names; the text encoder's are its projections.
_UNET_NAMES = {"to_out": "to_out.0"}
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# First words that nobody but diffusers and the Flux trainers use, so that even a bare key tells the component.
_UNMISTAKABLE = ("down_blocks", "up_blocks", "mid_block", "double_blocks", "single_blocks", "single_transformer_blocks")


def parse_key(key: str) -> tuple[str, str] | None:
    """Return (module path with its component, role) of a file key; None for a tensor of no pair.

    Roles: a, b, alpha, magnitude (PEFT's), dora (kohya's dora_scale), bias (of lora_B), diff, diff_b.
    """
    for ending, role in _ENDINGS:
        found = ending.search(key, max(len(key) - _REACH, 1))
        if found:
            return _module(key[: found.start()], found.group().startswith("_lora")), role
    return None


def partner(key: str) -> str:
    """Return the file key of the b factor for that of the a factor."""
    for down, up in ((".lora_A.", ".lora_B."), (".lora_down.", ".lora_up."), (".down.weight", ".up.weight")):
        head, found, tail = key.rpartition(down)
        if found:
            return head + up + tail
    raise ValueError(key)


def component_of(module: str) -> str:
    """Return the component a module path starts with, "" if it starts with none that diffusers or ComfyUI know."""
    first, _, rest = module.partition(".")
    return first if first in COMPONENTS and rest else ""


def is_bare(key: str) -> bool:
    """Return whether a key has no component but a first word that only one kind of network has."""
    return key.partition(".")[0] in _UNMISTAKABLE or ".processor." in key


def is_old(key: str) -> bool:
    """Return whether the key of an a factor is older than PEFT's names: lora.down, to_q_lora, lora_linear_layer."""
    return key.endswith(".down.weight")


def _module(stem: str, in_processor: bool) -> str:
    if in_processor:
        head, _, leaf = stem.removesuffix("_lora").rpartition(".")
        names = _TEXT_NAMES if head.endswith("self_attn") else _UNET_NAMES
        stem = f"{head.removesuffix('.processor')}.{names.get(leaf, leaf)}"
    if component_of(stem):
        return with_text_model(stem)
    component = "text_encoder" if stem.startswith("text_model.") else root_component(stem)
    return f"{component}.{stem}" if component else stem
