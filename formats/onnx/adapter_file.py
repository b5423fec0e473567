"""`.onnx_adapter`: ONNX Runtime's adapter file, arrays by input name in a FlatBuffer that it maps into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from adaptc.errors import FormatError
from adaptc.formats.onnx.model import Array, onnxruntime_module

MAGIC = b"TORT"


def write_adapter_file(path: Path, arrays: Mapping[str, Array], *, adapter_version: int = 1, model_version: int = 1
                       ) -> None:
    """Write arrays (float32, float16, uint8, int8, ...) by input name. Raises NeedsError without ONNX Runtime."""
    ort = onnxruntime_module()
    made = ort.AdapterFormat()
    made.set_adapter_version(adapter_version)
    made.set_model_version(model_version)
    made.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    made.export_adapter(str(path))


def read_adapter_file(path: Path) -> dict[str, Array]:
    """Return the arrays of an adapter file by input name. Raises FormatError for another file."""
    ort = onnxruntime_module()
    with path.open("rb") as f:
        if f.read(8)[4:] != MAGIC:
            raise FormatError(f"{path.name}: no ONNX Runtime adapter")
    try:
        held = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: value.numpy().copy() for name, value in held.items()}
    except Exception as e:  # the runtime has its own types
        raise FormatError(f"{path.name}: {json.dumps(str(e)[:120])}") from e
