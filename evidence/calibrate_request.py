"""What a calibration is asked to do, and what of a model that concerns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc import __version__
from adaptc.adapter import Adapter, Rows, tensors
from adaptc.errors import NeedsError, UsageError
from adaptc.evidence.model import Task, labels_of
from adaptc.evidence.moments import linear_layers
from adaptc.evidence.passages import Passage
from adaptc.passes import matches

_SAMPLES = 64


@dataclass(frozen=True)
class Request:
    """What to run and what to collect; `task` None leaves it to the adapter and the model."""

    base: str
    data: Path
    task: Task | None = None
    held_out: float = 0.1
    max_tokens: int | None = None
    window: int = 256
    batch: int = 8
    diagonal: bool = False
    gradients: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("batch", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}, must be {least} or more")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held-out share is {self.held_out:g}, must be at least 0 and less than 1")


def task_of(base: str, adapter: Adapter | None) -> Task:
    """Return what to run: a classifier for an adapter that carries one, a language model where `base` is one.

    Anything else runs as a bare encoder. Raises NeedsError without transformers; a config that cannot be read is left
    for load_model to complain about.
    """
    if adapter is not None and labels_of(adapter) is not None:
        return "classify"
    if base.endswith(".gguf"):
        return "lm"
    try:
        from transformers import AutoConfig
    except ImportError as e:
        raise NeedsError("running a model needs transformers", hint="pip install 'adaptc[models]'") from e
    try:
        names = AutoConfig.from_pretrained(base).architectures or []
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return "lm"
    return "lm" if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names) else "embed"


def chosen_layers(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers that patterns leave, by parameter name. Raises UsageError where one fits nothing."""
    layers = linear_layers(model)
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(k, pattern) for k in layers):
                raise UsageError(f"{option} pattern {pattern!r} fits none of {len(layers)} linear layers",
                                 hint=f"they are called {', '.join(list(layers)[:2])}, ...")
    left = {k: m for k, m in layers.items() if not any(matches(k, p) for p in exclude)
            and (not include or any(matches(k, p) for p in include))}
    if not left:
        raise UsageError("no linear layer is left to watch")
    return left


def model_digest(model: nn.Module) -> str:
    """Return 16 hex digits of SHA-256 over names, shapes and 64 values of every parameter, as float32."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        at = torch.arange(_SAMPLES) * (p.numel() - 1) // (_SAMPLES - 1)
        digest.update(f"{name}{tuple(p.shape)}".encode() + _bytes(p.detach().flatten()[at.to(p.device)].float().cpu()))
    return digest.hexdigest()[:16]


def request_digest(request: Request, task: Task, base: str, adapter: Adapter | None, data: Sequence[Passage]) -> str:
    """Return SHA-256 of all that a result depends on: versions, request, model digest, adapter, passages in order."""
    import transformers

    said = asdict(request) | {"base": base, "data": "", "task": task}
    versions = [__version__, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(json.dumps([said, versions], sort_keys=True).encode())
    if adapter is not None:
        for key, delta in adapter.deltas.items():
            digest.update(f"{key} {getattr(delta, 'scale', None)}".encode())
            for name, t in sorted(tensors(delta).items()):
                digest.update(name.encode() + _bytes(t))
        for key, value in adapter.replaced.items():
            digest.update(key.encode() + _bytes(value.values if isinstance(value, Rows) else value))
    for p in data:
        digest.update(p.digest + str(p.label).encode())
    return digest.hexdigest()


def _bytes(t: Tensor) -> bytes:
    raw: Any = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes(raw.data)
