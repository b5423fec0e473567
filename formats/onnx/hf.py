"""A transformers model as an ONNX file, by torch's exporter, its parameters under their own names."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.onnx.model import LARGEST_PROTO, Model, onnx_module, open_model

EXPORT_OPSET = 20  # what torch writes without converting; ONNX Runtime 1.20 and later run it
_CLASSES = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification", "embed": "AutoModel"}
_OUTPUTS = {"lm": "logits", "classify": "logits", "embed": "last_hidden_state"}
_PREFIX = "base."


class _Plain(nn.Module):
    """Only tensors in and out, and no cache."""

    def __init__(self, base: Any, output: str, names: tuple[str, ...], cached: bool) -> None:
        super().__init__()
        self.base, self.output, self.names, self.cached = base, output, names, cached

    def forward(self, *values: Tensor) -> Tensor:
        extra: dict[str, Any] = {"use_cache": False} if self.cached else {}
        found: Tensor = self.base(**dict(zip(self.names, values, strict=True)), **extra)[self.output]
        return found


def is_model_folder(path: Path) -> bool:
    """Return whether a path is the folder of a transformers model rather than of an ONNX one."""
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def task_of(folder: Path, labels: int | None) -> str:
    """Return "classify" for an adapter with a head of `labels` classes, else what the config's architecture says."""
    import json

    names = " ".join(json.loads((folder / "config.json").read_text()).get("architectures") or [])
    if labels is not None or "SequenceClassification" in names:
        return "classify"
    return "lm" if "CausalLM" in names or "LMHead" in names else "embed"


def export_model(folder: Path, out: Path, task: str, labels: int | None = None) -> Model:
    """Write the model of `folder` to `out` and return it opened: input_ids, attention_mask [, token_type_ids] in.

    Causal models run without a cache; batch and sequence are free. A classifier without a head of its own gets a zero
    one of `labels` classes, for the adapter to replace. Raises NeedsError without transformers or onnxscript,
    UnsupportedError naming what torch's exporter cannot trace.
    """
    base = _load(folder, task, labels)
    return export_module(base, out, task)


def export_module(base: Any, out: Path, task: str) -> Model:
    """Write a transformers model in memory to `out` and return it opened."""
    taken = inspect.signature(base.forward).parameters
    typed = "token_type_ids" in taken and getattr(base.config, "type_vocab_size", 0) > 1
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if typed else ()))
    ids = torch.ones(2, 5, dtype=torch.int64)
    inputs = (ids, torch.ones_like(ids), *((torch.zeros_like(ids),) if typed else ()))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    wrapped = _Plain(base.eval(), _OUTPUTS[task], names, "use_cache" in taken).eval()
    with _quietly():
        try:
            program = torch.onnx.export(
                wrapped, inputs, dynamo=True, opset_version=EXPORT_OPSET, verbose=False, input_names=list(names),
                output_names=[_OUTPUTS[task]], dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in names),),
            )
        except ImportError as e:
            raise NeedsError(f"exporting needs another package ({e})", hint="pip install 'adaptc[onnx]'") from e
        except Exception as e:  # the exporter has its own types
            said = " ".join(str(e).split())[:160]
            raise UnsupportedError(f"{type(base).__name__}: torch cannot export it ({said})") from e
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    if program is None:
        raise UnsupportedError(f"{type(base).__name__}: torch exported nothing")
    program.save(str(out), external_data=size > LARGEST_PROTO)
    model = open_model(out)
    _own_names(model)
    out.write_bytes(model.proto.SerializeToString())
    return Model(model.proto, out)


def _load(folder: Path, task: str, labels: int | None) -> Any:
    try:
        import transformers
    except ImportError as e:
        raise NeedsError("exporting a base needs transformers", hint="pip install 'adaptc[models]'") from e
    extra: dict[str, Any] = {"num_labels": labels} if labels is not None else {}
    with _quietly():
        try:
            made, info = getattr(transformers, _CLASSES[task]).from_pretrained(
                str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True, **extra)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as e:
            raise FormatError(f"{folder} cannot be loaded ({' '.join(str(e).split())[:160]})") from e
    missing = set(info.get("missing_keys", ()))
    for name, parameter in made.named_parameters():
        if name in missing:  # transformers draws these at random
            parameter.data.zero_()
    return made.requires_grad_(False)


def _own_names(model: Model) -> None:
    """Take the wrapper's name off initializers and metadata."""
    onnx_module()
    renamed = {t.name: t.name.removeprefix(_PREFIX) for t in model.graph.initializer if t.name.startswith(_PREFIX)}
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in renamed:
                node.input[i] = renamed[name]
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)
    for holder in (*model.graph.node, *model.graph.value_info):
        for p in holder.metadata_props:
            p.value = p.value.replace(f"'{_PREFIX}", "'")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters print and log to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
