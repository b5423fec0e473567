"""A GGUF model as the folder that transformers writes: config, tokenizer, and dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from adaptc.base import Base
from adaptc.errors import NeedsError, UnsupportedError
from adaptc.tensorfile import header_of


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write config.json, tokenizer files and model.safetensors (float32) of a GGUF model into `folder`.

    Weights are decoded one tensor at a time. Raises NeedsError without transformers or the gguf package,
    UnsupportedError for an architecture that one of them cannot convert.
    """
    try:
        import transformers
    except ImportError as e:
        raise NeedsError("reading the config of a GGUF model needs transformers",
                         hint="pip install 'adaptc[models]'") from e
    base = Base(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError) as e:
        raise UnsupportedError(f"{path}: transformers cannot convert it ({' '.join(str(e).split())[:160]})") from e
    for fact, value in base.config.items():  # transformers leaves some of the header's facts at its defaults
        if fact != "model_type" and hasattr(config, fact):
            setattr(config, fact, value)
    for flag, module in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")):  # nor does it look for biases
        if hasattr(config, flag):
            setattr(config, flag, any(name.endswith(f"{module}.bias") for name in base))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    told.pop("quantization_config", None)
    if "architectures" not in told:
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        told |= {"architectures": [causal]} if causal else {}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    plan = {name: torch.empty(base[name].shape, dtype=torch.float32, device="meta") for name in base}
    header, order = header_of(plan, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as f:
        f.write(header)
        for name in order:
            f.write(base[name].float().contiguous().reshape(-1).view(torch.uint8).numpy().data)
