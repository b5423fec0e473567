"""PEFT on transformers, against the same adapter run by adaptc."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.evidence.verdict import Runs, Verdict, compare_source, judge
from adaptc.evidence.verify_torch import Reference, fitting, open_reference
from adaptc.formats import load

TOLERANCE = 1e-3


def verify(artefact: Path, base: Path, source: Adapter | None, reference: Path | None, prompts: Sequence[str]
           ) -> tuple[Verdict, ...]:
    """Load the PEFT folder `artefact` by PEFT on the transformers folder `base`, and compare with adaptc's own reading.

    Keys that match no module, which PEFT only warns of, are an error here. Raises NeedsError without PEFT.
    """
    if importlib.util.find_spec("peft") is None:
        raise NeedsError("running PEFT needs peft", hint="pip install peft")
    if not (artefact / "adapter_config.json").is_file():
        raise UsageError(f"{artefact} is no PEFT folder (no adapter_config.json)", hint="adaptc convert --to peft")
    made = load(artefact)
    torch_model = open_reference(reference or base, made)
    inputs = torch_model.ids(4, 24, prompts)
    found = [compare_source(made, source)] if source is not None else []
    fitted = fitting(made, torch_model)
    plain = torch_model.outputs(inputs)
    without, given, unmatched = _peft(artefact, open_reference(base, made), inputs)
    if unmatched:
        return (*found, Verdict("no effect", f"PEFT finds no module for {len(unmatched)} keys ({unmatched[0]})"))
    runs = Runs(without, given, plain, lambda _, scale: torch_model.outputs(inputs, fitted, scale), TOLERANCE, 1e-4)
    return (*found, judge(runs))


def _peft(artefact: Path, model: Reference, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[str]]:
    """Return outputs without and with the adapter, and the keys that PEFT did not use."""
    import peft

    without = model.outputs(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.PeftModel.from_pretrained(model.model, str(artefact))
            result = peft.set_peft_model_state_dict(wrapped, peft.utils.load_peft_weights(str(artefact), device="cpu"))
        except (ValueError, KeyError, RuntimeError, TypeError, OSError) as e:
            raise FormatError(f"PEFT refuses it ({' '.join(str(e).split())[:200]})") from e
    with torch.no_grad():
        given = Reference(wrapped.eval(), model.path).outputs(inputs)
    missing = [k for k in getattr(result, "missing_keys", []) if "lora_" in k]
    return without, given, [*getattr(result, "unexpected_keys", []), *missing]
