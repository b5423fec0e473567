"""What modules are called in ONNX graphs, and whether two such names mean the same module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

SCOPES, FOLDED = "pkg.torch.onnx.name_scopes", "pkg.onnxscript.optimizer.folded_from"
_QUANTISED = re.compile(r"\.MatMul\.weight(_Q\d+|_scales|_scale|_zero_point)*$|\.(qweight|scales|weight_Q\d+)$")
_NODE = re.compile(r"(MatMul|Gemm)(_Q\d+|NBits)?(_\d+)?$|^(MatMul|Gemm)")
# A projection that ORT GenAI's builder (and some models) computes in one product -> its parts, in order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def canonical(path: str) -> str:
    """Return a module path as names are compared: ORT GenAI and Olive write attn where transformers has self_attn."""
    return re.sub(r"(^|\.)self_attn(?=\.|$)", r"\1attn", path.strip("./").replace("/", "."))


def paths(node: Any, weight: str, value_info: Any) -> Iterator[tuple[str, str]]:
    """Yield (module path, how it is known) of a linear node and its weight, the surest first.

    A name scope stands alone: weights with equal values may share one initializer, which then has one name for all.
    """
    metadata = {p.key: p.value for p in node.metadata_props}
    scopes = strings_of(metadata.get(SCOPES, ""))
    if len(scopes) >= 2 and scopes[-2]:
        yield scopes[-2], "name scope"
        return
    info = value_info.get(weight)
    folded = {p.key: p.value for p in info.metadata_props}.get(FOLDED, "") if info is not None else ""
    for source in strings_of(folded):
        if source.endswith(".weight"):
            yield source.removesuffix(".weight"), "folded_from"
    if _QUANTISED.search(weight):
        yield _QUANTISED.sub("", weight), "ORT GenAI name"
    elif weight.endswith(".weight"):
        yield weight.removesuffix(".weight"), "initializer name"
    head, _, last = node.name.strip("/").replace("/", ".").rpartition(".")
    if head and _NODE.match(last):
        yield head, "node name"


def distance(path: str, module: str) -> int | None:
    """Return how many leading components keep two names of a module apart, None where they mean different ones.

    One of them may carry a prefix of wrappers ("model.", "base_model.model."); one component each may differ where
    the path's own is the wrapper of an export.
    """
    p, m = canonical(path).split("."), canonical(module).split(".")
    shorter = min(len(p), len(m))
    if p[-shorter:] == m[-shorter:] and (shorter > 1 or len(p) + len(m) <= 3):
        return max(len(p), len(m)) - shorter
    if len(m) > 2 and p[0] == "model" and p[1:] == m[1:]:
        return 2
    return None


def strings_of(text: str) -> list[str]:
    """Return the strings of a Python list in metadata, [] for anything else."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [s for s in found if isinstance(s, str)] if isinstance(found, list) else []
