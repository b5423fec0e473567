"""Adapters that are known by name and not read, each with the reason."""

from __future__ import annotations

import re
from typing import ClassVar

from adaptc.adapter import Adapter
from adaptc.errors import UnsupportedError
from adaptc.formats.format import Evidence, Format
from adaptc.formats.source import Source

# What some key matches -> (name, why it is refused, what to do instead).
_KEYS: tuple[tuple[re.Pattern[str], str, str, str], ...] = (
    (re.compile(r".*\.linear_(in|out)\.weight"), "NeMo / Megatron",
     "its fused weights interleave q, k and v by group, and alpha is not in the file",
     "export it to Hugging Face PEFT with Megatron-Bridge"),
    (re.compile(r"(.*\.)?moe_gate\..*"), "MeteoRA", "a router mixes its adapters token by token",
     "compress the adapters it was built from"),
    (re.compile(r".*\.vector_z"), "LoLDU", "its base was replaced by a residual that is not in the file", ""),
    (re.compile(r"(.*\.)?(In|Out)_Qs(\..*)?"), "SNELL",
     "a kernel and a threshold turn its features into a full matrix", ""),
    (re.compile(r"(.*\.)?internal_xlora_classifier\..*"), "X-LoRA", "a router mixes its adapters token by token",
     "compress the adapters it was built from"),
    (re.compile(r".*\.adapter_(down|up|attn|mlp)\.(weight|bias).*"), "a bottleneck adapter",
     "a branch with an activation is no change of a weight", ""),
)


class Refused(Format):
    """Recognise what adaptc does not read, so that the refusal says what it is."""

    id: ClassVar[str] = "refused"
    title: ClassVar[str] = "an adapter adaptc does not read"
    writes: ClassVar[str] = ""

    def sniff(self, source: Source) -> Evidence | None:
        """Keys of the table."""
        if "peft_type" in source.config:
            return None
        found = _find(source)
        return Evidence(1, f"key {found[0]}") if found else None

    def read(self, source: Source) -> Adapter:
        """Raise UnsupportedError with the reason."""
        found = _find(source)
        if found is None:
            raise UnsupportedError(f"{source.file.name}: no adapter that is refused by name")
        key, name, why, hint = found
        raise UnsupportedError(f"{source.file.name}: {name} is not read, {why} (key {key})", hint=hint or None)


def _find(source: Source) -> tuple[str, str, str, str] | None:
    for pattern, name, why, hint in _KEYS:
        key = next((k for k in source.tensors if pattern.fullmatch(k)), None)
        if key is not None:
            return key, name, why, hint
    return None
