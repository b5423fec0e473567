"""The reference that runtimes are compared with: the base model in torch, with and without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptc.adapter import Adapter
from adaptc.errors import FormatError, NeedsError, UsageError
from adaptc.evidence.model import applied, labels_of

_AUTO = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
         "TOKEN_CLS": "AutoModelForTokenClassification", "FEATURE_EXTRACTION": "AutoModel"}


@dataclass(frozen=True, eq=False)
class Reference:
    """A transformers model in float32, and the folder or GGUF file it is from.

    `missing` names parameters that its files do not hold, such as a classifier's head: their values mean nothing.
    """

    model: Any
    path: Path
    missing: frozenset[str] = frozenset()

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def ids(self, rows: int, length: int, prompts: Sequence[str] = ()) -> list[Tensor]:
        """Return token ids, one tensor an input: of the prompts where there are any, else random with seed 0."""
        if prompts:
            tokenizer = self.tokenizer()
            return [torch.tensor(tokenizer(p)["input_ids"], dtype=torch.long) for p in prompts]
        random = torch.Generator().manual_seed(0)
        return [torch.randint(0, self.vocab, (length,), generator=random) for _ in range(rows)]

    def tokenizer(self) -> Any:
        """Return the tokenizer beside the model. Raises NeedsError where there is none."""
        from transformers import AutoTokenizer

        gguf = self.path.suffix == ".gguf"
        try:
            return AutoTokenizer.from_pretrained(str(self.path.parent if gguf else self.path),
                                                 **({"gguf_file": self.path.name} if gguf else {}))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
            raise NeedsError(f"{self.path} holds no tokenizer", hint="leave --prompt out to run random tokens") from e

    def outputs(self, inputs: Sequence[Tensor], adapter: Adapter | None = None, scale: float = 1.0) -> Tensor:
        """Return the first output of every input, flattened to (positions, outputs), with `adapter` if one is given."""
        if adapter is not None:
            with applied(self.model, adapter, scale):
                return self.outputs(inputs)
        rows = []
        with torch.no_grad():
            for ids in inputs:
                out = self.model(input_ids=ids[None])[0]
                rows.append(out.reshape(-1, out.shape[-1]).float())
        return torch.cat(rows)


def open_reference(path: str | Path, adapter: Adapter | None = None) -> Reference:
    """Open a base model in torch: an HF folder with safetensors, or a GGUF model, dequantised.

    The task is the one the adapter was trained for, else the model's own architecture. Raises NeedsError where
    transformers or files are missing, FormatError for a model that cannot be loaded.
    """
    try:
        import transformers
    except ImportError as e:
        raise NeedsError("running a model needs transformers", hint="pip install 'adaptc[models]'") from e
    path = Path(path)
    if not path.exists():
        raise NeedsError(f"{path} does not exist", hint="--reference wants a model folder or a GGUF file")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf = path.suffix == ".gguf"
    task = str(adapter.origin.config.get("task_type")) if adapter is not None else ""
    extra: dict[str, Any] = {"gguf_file": path.name} if gguf else {"use_safetensors": True}
    labels = labels_of(adapter) if adapter is not None else None
    if labels is not None and task == "SEQ_CLS":
        extra["num_labels"] = labels
    where = str(path.parent if gguf else path)
    try:
        kind = _AUTO.get(task)
        if kind is None:
            named = None if gguf else transformers.AutoConfig.from_pretrained(where).architectures
            kind = named[0] if named and hasattr(transformers, named[0]) else "AutoModelForCausalLM"
        with redirect_stderr(StringIO()):  # a bar that no setting turns off
            model, info = getattr(transformers, kind).from_pretrained(where, dtype=torch.float32,
                                                                      output_loading_info=True, **extra)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError) as e:
        raise FormatError(f"{path} cannot be loaded by transformers ({' '.join(str(e).split())[:160]})") from e
    return Reference(model.eval().requires_grad_(False), path, frozenset(info["missing_keys"]))


def fitting(adapter: Adapter, reference: Reference) -> Adapter:
    """Return the adapter under the names of the model's parameters, where a wrapper's prefix is all that differs.

    Raises UsageError for a module that the model has not, which is another base.
    """
    mine = dict(reference.model.named_parameters())
    prefix = getattr(reference.model, "base_model_prefix", "")
    names: dict[str, str] = {}
    for key in (*adapter.deltas, *adapter.replaced):
        near = (key, f"{prefix}.{key}", key.partition(".")[2])
        found = next((n for n in near if n in mine), None)
        if found is None:
            raise UsageError(f"{key}: the base model has no such parameter",
                             hint="it is another base, or the artefact's names are its runtime's own")
        names[key] = found
    layout: Mapping[str, str] = {names.get(k, k): v for k, v in adapter.origin.layout.items()}
    return replace(adapter, deltas={names[k]: d for k, d in adapter.deltas.items()},
                   replaced={names[k]: r for k, r in adapter.replaced.items()},
                   origin=replace(adapter.origin, layout=layout, fingerprint=None))
