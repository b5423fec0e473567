"""A base model with its tokenizer, loaded by transformers, and adapters put on it for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast

import torch

from adaptc.adapter import Adapter
from adaptc.errors import FormatError, NeedsError, UnsupportedError

Task = Literal["lm", "classify", "embed"]
_CLASSES = {"lm": "AutoModelForCausalLM", "classify": "AutoModelForSequenceClassification", "embed": "AutoModel"}
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt", "*.tiktoken", "bpe.codes")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A transformers model in evaluation mode, its tokenizer, and where both came from.

    `missing`: parameters that the base has no values for (a classifier, usually): random until an adapter gives some.
    """

    model: Any
    tokenizer: Any
    base: str
    missing: tuple[str, ...] = ()


def load_model(base: str | Path, task: Task, labels: int | None = None, dtype: torch.dtype = torch.float32) -> Loaded:
    """Load a base model for a task: an HF folder with safetensors, a GGUF file (dequantised), or a Hub id.

    `labels` is the number of classes of a classifier. Nothing in the folder is executed and no pickle is opened.
    Raises NeedsError where transformers or the files are missing, UnsupportedError for an architecture that
    transformers does not know, FormatError for damaged files.
    """
    try:
        import transformers
    except ImportError as e:
        raise NeedsError("running a model needs transformers", hint="pip install 'adaptc[models]'") from e
    path = Path(base)
    gguf = path.suffix == ".gguf"
    if gguf and not path.is_file():
        raise NeedsError(f"{base} does not exist", hint="--base wants a model folder, a GGUF file or a Hub id")
    if path.is_dir() and not any(any(path.glob(p)) for p in _TOKENIZERS):  # transformers would make an empty one
        raise NeedsError(f"{base} holds no tokenizer")
    where = str(path.parent if gguf else base)
    extra: dict[str, Any] = {"gguf_file": path.name} if gguf else {}
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **extra)
        if not gguf:
            extra["use_safetensors"] = True
        if labels is not None and task == "classify":
            extra["num_labels"] = labels
        kind = getattr(transformers, _CLASSES[task])
        with redirect_stderr(StringIO()) if gguf else nullcontext():  # its bar of GGUF tensors heeds no setting
            model, info = kind.from_pretrained(where, dtype=dtype, output_loading_info=True, **extra)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError) as e:
        raise _told(str(base), e) from e
    return Loaded(model.eval().requires_grad_(False), tokenizer, str(base), tuple(sorted(info["missing_keys"])))


@contextmanager
def applied(model: Any, adapter: Adapter, scale: float = 1.0) -> Iterator[None]:
    """Run `model` with `adapter` until the end of the block, then exactly as before (adaptc.attach and detach)."""
    from adaptc.kernels.runtime import attach, detach

    name = "adaptc.evidence"
    attach(model, adapter, name, scale=scale)
    try:
        yield
    finally:
        detach(model, name)


def head_of(adapter: Adapter) -> str | None:
    """Return the name of the classifier weight an adapter carries, None where it carries none or several."""
    ends = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    heads = [k for k, t in adapter.replaced.items() if k.endswith(ends) and isinstance(t, torch.Tensor)]
    return heads[0] if len(heads) == 1 else None


def labels_of(adapter: Adapter) -> int | None:
    """Return the number of classes of the classifier an adapter carries, None where it carries none."""
    head = head_of(adapter)
    return None if head is None else int(cast(torch.Tensor, adapter.replaced[head]).shape[0])


def _told(base: str, e: Exception) -> Exception:
    """Return transformers' complaint about a model as one of ours."""
    said = " ".join(str(e).split())[:200]
    if isinstance(e, ImportError):
        return NeedsError(f"{base} needs another package ({said})")
    if isinstance(e, OSError):
        return NeedsError(f"{base} is no model that can be loaded ({said})",
                          hint="--base wants a model folder (config, tokenizer, safetensors), a GGUF file or a Hub id")
    if isinstance(e, (ValueError, KeyError)) and any(w in said for w in ("architecture", "model type", "model_type")):
        return UnsupportedError(f"{base}: {said}")
    return FormatError(f"{base} cannot be loaded ({type(e).__name__}: {said})")
