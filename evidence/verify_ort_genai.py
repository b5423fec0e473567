"""ORT GenAI: an adapter file in the slots of a model of its builder, loaded by og.Adapters, against torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.cli.export_genai import decoder_of
from adaptc.delta import NeedsBase
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.evidence.verdict import Runs, Verdict, compare_source, judge
from adaptc.evidence.verify_ort import BASE, BASE_ROUNDED, ROUNDED_OPS, TOLERANCE, held
from adaptc.evidence.verify_torch import fitting, open_reference
from adaptc.formats.onnx.adapter_file import read_adapter_file
from adaptc.formats.onnx.model import open_model


def verify(artefact: Path, base: Path, source: Adapter | None, reference: Path | None, prompts: Sequence[str]
           ) -> tuple[Verdict, ...]:
    """Load `artefact` (an `.onnx_adapter`, or the folder of adaptc export --ort-genai) on the model folder `base`.

    Raises NeedsError without onnxruntime-genai or without --reference, the model in torch.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise NeedsError("running ORT GenAI needs onnxruntime-genai", hint="pip install onnxruntime-genai")
    if reference is None:
        raise NeedsError("the base model in torch is not known", hint="--reference takes its folder")
    if artefact.is_dir():
        inside = sorted(artefact.glob("*.onnx_adapter"))
        if len(inside) != 1:
            raise UsageError(f"{artefact} holds {len(inside)} adapter files", hint="name the .onnx_adapter")
        artefact = inside[0]
    model = open_model(base / decoder_of(base))
    arrays = read_adapter_file(artefact)
    unknown = sorted(set(arrays) - set(model.inputs))
    if unknown:
        return (Verdict("wrong base", f"{base} has no input {unknown[0]}, as {len(unknown)} of the {len(arrays)} that "
                        "the artefact gives"),)
    torch_model = open_reference(reference, source)
    inputs = torch_model.ids(2, 24, prompts)
    made = held(arrays, model, torch_model, source)
    found = []
    if source is not None:
        plain = {k: d for k, d in fitting(source, torch_model).deltas.items() if not isinstance(d, NeedsBase)}
        found = [compare_source(made, source.with_deltas(plain))]
    rounded = any(n.op_type in ROUNDED_OPS for n in model.graph.node)
    runs = Runs(_logits(base, inputs), _logits(base, inputs, artefact), torch_model.outputs(inputs),
                lambda _, scale: torch_model.outputs(inputs, made, scale), TOLERANCE, BASE_ROUNDED if rounded else BASE)
    return (*found, judge(runs))


def _logits(folder: Path, inputs: Sequence[Tensor], adapter: Path | None = None) -> Tensor:
    """Return the logits of every position of every prompt (positions, vocabulary)."""
    import onnxruntime_genai

    og: Any = onnxruntime_genai
    try:
        model = og.Model(str(folder))
        adapters = og.Adapters(model)
        if adapter is not None:
            adapters.load(str(adapter), "verified")
        rows = []
        for ids in inputs:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=len(ids) + 1, batch_size=1)
            generator = og.Generator(model, params)
            if adapter is not None:
                generator.set_active_adapter(adapters, "verified")
            generator.append_tokens(ids.numpy().astype(np.int32))
            out = np.array(generator.get_output("logits"), np.float32)
            rows.append(torch.from_numpy(out.reshape(-1, out.shape[-1])))
        return torch.cat(rows)
    except Exception as e:  # the runtime has its own types
        raise FormatError(f"ORT GenAI refuses it ({' '.join(str(e).split())[:240]})") from e
