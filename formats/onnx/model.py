"""An ONNX model on disk: opened without its external data, checked, and written with it beside."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptc.errors import FormatError, NeedsError, UnsupportedError

Array = npt.NDArray[Any]

OPSET, IR = 21, 10  # of models made here: the newest that every ONNX Runtime since 1.20 takes
OLDEST_OPSET, NEWEST_OPSET, NEWEST_IR = 13, 26, 13  # of bases: what the added nodes need, what ONNX Runtime runs
LARGEST_PROTO = 1_800_000_000  # bytes of tensors inside the file; a protobuf ends at 2 GB


def onnx_module() -> Any:
    """Return the onnx package. Raises NeedsError where it is not installed."""
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.numpy_helper
    except ImportError as e:
        raise NeedsError("ONNX models need the onnx package", hint="pip install 'adaptc[onnx]'") from e
    return onnx


def onnxruntime_module() -> Any:
    """Return the onnxruntime package. Raises NeedsError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as e:
        raise NeedsError("this needs ONNX Runtime", hint="pip install 'adaptc[onnx]'") from e
    return onnxruntime


@dataclass(frozen=True, eq=False)
class Model:
    """A model proto and the file it came from; tensors in other files stay there until they are asked for."""

    proto: Any
    path: Path

    @property
    def graph(self) -> Any:
        """The main graph."""
        return self.proto.graph

    @cached_property
    def initializers(self) -> Mapping[str, Any]:
        """name -> TensorProto."""
        return {t.name: t for t in self.graph.initializer}

    @cached_property
    def value_info(self) -> Mapping[str, Any]:
        """name -> ValueInfoProto of inputs, outputs and intermediate values."""
        return {v.name: v for v in (*self.graph.value_info, *self.graph.input, *self.graph.output)}

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """name -> ValueInfoProto of everything that can be fed."""
        return {v.name: v for v in self.graph.input}

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((int(o.version) for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    def values(self, name: str) -> Array:
        """Return an initializer as an array, read from its external file where it lies there."""
        onnx = onnx_module()
        tensor = self.initializers[name]
        array: Array = onnx.numpy_helper.to_array(tensor, base_dir=str(self.path.parent))
        return array

    def metadata(self) -> dict[str, str]:
        """Return metadata_props."""
        return {p.key: p.value for p in self.proto.metadata_props}


def open_model(path: Path) -> Model:
    """Open an ONNX file (or the one *.onnx of a folder) and check what would only fail later.

    Raises NeedsError for a missing file or missing external data, FormatError for bytes that are no model or data that
    is cut short, UnsupportedError for versions that ONNX Runtime does not run.
    """
    onnx = onnx_module()
    if path.is_dir():
        path = _only_model(path)
    if not path.is_file():
        raise NeedsError(f"{path} does not exist", hint="--base wants an ONNX file, or a folder of the base model")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as e:  # protobuf has its own types
        raise FormatError(f"{path.name}: no ONNX model ({type(e).__name__})") from e
    if not proto.graph.node and not proto.graph.initializer:
        raise FormatError(f"{path.name}: holds no graph, no ONNX model")
    model = Model(proto, path)
    _check_versions(model)
    _check_external(model)
    return model


def external(tensor: Any) -> dict[str, str]:
    """Return location, offset and length of a tensor in another file, {} for one inside the model."""
    return {e.key: e.value for e in tensor.external_data} if tensor.data_location == 1 else {}


def write_model(model: Model, out: Path) -> None:
    """Write the proto to `out` and copy the external files it refers to beside it.

    Tensors inside move to `<out>.added` where they would make the file larger than a protobuf can be.
    """
    onnx = onnx_module()
    for location in sorted({external(t)["location"] for t in model.graph.initializer if external(t)}):
        _copy(model.path.parent / location, out.parent / location)
    inside = sum(len(t.raw_data) for t in model.graph.initializer)
    if inside > LARGEST_PROTO:
        _move_out(onnx, model, out.with_name(out.name + ".added"))
    out.write_bytes(model.proto.SerializeToString())


def set_metadata(model: Model, values: Mapping[str, str]) -> None:
    """Set metadata_props, replacing those of the same key."""
    kept = {**model.metadata(), **values}
    del model.proto.metadata_props[:]
    for key, value in kept.items():
        model.proto.metadata_props.add(key=key, value=value)


def _only_model(folder: Path) -> Path:
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        named = next((p for p in found if p.name == "model.onnx"), None)
        if named is None:
            raise NeedsError(f"{folder} holds {len(found)} ONNX models", hint="name the file with --base")
        return named
    return found[0]


def _check_versions(model: Model) -> None:
    if not OLDEST_OPSET <= model.opset <= NEWEST_OPSET:
        first = model.graph.node[0].name or model.graph.node[0].op_type
        raise UnsupportedError(f"{model.path.name}: opset {model.opset} at node {first}, adaptc patches "
                               f"{OLDEST_OPSET} to {NEWEST_OPSET}",
                               hint=f"convert it: onnx.version_converter.convert_version(model, {OPSET})")
    if model.proto.ir_version > NEWEST_IR:
        raise UnsupportedError(f"{model.path.name}: IR version {model.proto.ir_version}, ONNX Runtime takes up to "
                               f"{NEWEST_IR}", hint=f"save it again with ir_version {IR}")


def _check_external(model: Model) -> None:
    """Raise NeedsError or FormatError for the first tensor whose external bytes are not all there."""
    for tensor in model.graph.initializer:
        where = external(tensor)
        if not where:
            continue
        location = where.get("location", "")
        file = model.path.parent / location
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise FormatError(f"{tensor.name}: external data at {location!r}, which is not beside {model.path.name}")
        if not file.is_file():
            node = next((n.name or n.op_type for n in model.graph.node if tensor.name in n.input), "none")
            raise NeedsError(f"{tensor.name} of node {node} lies in {location}, which is missing",
                             hint=f"put {location} beside {model.path.name}")
        end = int(where.get("offset", 0)) + int(where.get("length", 0))
        if end > file.stat().st_size:
            raise FormatError(f"{tensor.name} ends at byte {end} of {location}, which has {file.stat().st_size}")


def _copy(source: Path, target: Path) -> None:
    """Copy a file of tensors. Not a link: onnx.checker takes external data with several links for an attack."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _move_out(onnx: Any, model: Model, file: Path) -> None:
    """Move tensors that lie inside the model to `file`, the largest first, until the rest is small."""
    left = sum(len(t.raw_data) for t in model.graph.initializer)
    with file.open("wb") as f:
        for tensor in sorted(model.graph.initializer, key=lambda t: -len(t.raw_data)):
            if left <= LARGEST_PROTO // 100 or not tensor.raw_data:
                break
            data, at = tensor.raw_data, f.tell()
            f.write(data + b"\0" * (-len(data) % 4096))
            onnx.external_data_helper.set_external_data(tensor, file.name, at, len(data))
            tensor.ClearField("raw_data")
            left -= len(data)


def tensor_proto(name: str, array: Array) -> Any:
    """Return an initializer of an array."""
    return onnx_module().numpy_helper.from_array(np.asarray(array, order="C"), name)
