"""TensorFile against the safetensors library, which wrote or reads the same bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file  # noqa: TID251  the reference to compare with

from adaptc.errors import FormatError, one_line
from adaptc.tensorfile import DTYPES, TensorFile, header_of, write_tensors

HALF = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
        torch.int64, torch.bool]


def sample() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    made = {f"m.{str(d)[6:]}": (torch.randn(3, 5, generator=g) * 4).to(d) for d in HALF}
    return made | {"empty": torch.empty(0, 7), "scalar": torch.tensor(2.5), "odd": torch.arange(3, dtype=torch.uint8),
                   "view": torch.randn(6, 4, generator=g).T, "ключ.層": torch.ones(2)}


def written(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    with path.open("wb") as f:
        write_tensors(f, tensors, metadata or {})
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {k: t.contiguous() for k, t in sample().items()}
    save_file(tensors, tmp_path / "x.safetensors", {"a": "b"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"a": "b"}
    assert set(file) == set(tensors)
    for key, t in tensors.items():
        assert file[key].dtype == t.dtype
        assert torch.equal(file[key], t)
        assert file.nbytes(key) == t.nbytes


def test_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = sample()
    back = load_file(written(tmp_path / "x.safetensors", tensors, {"k": "v"}))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())


def test_same_bytes_as_the_library_without_metadata(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(4, dtype=torch.float16), "c": torch.zeros(1, dtype=torch.float64)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours = written(tmp_path / "ours.safetensors", tensors)
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_size_is_known_from_meta_tensors(tmp_path: Path) -> None:
    tensors = sample()
    path = written(tmp_path / "x.safetensors", tensors, {"k": "ü"})
    meta = {k: t.to("meta") for k, t in tensors.items()}
    assert len(header_of(meta, {"k": "ü"})[0]) + sum(t.nbytes for t in meta.values()) == path.stat().st_size


def test_nothing_is_copied_and_the_file_is_never_written_to(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    before, file = path.read_bytes(), TensorFile(path)
    assert file["a"].data_ptr() == file["a"].data_ptr()  # both views of one mapping
    file["a"].zero_()
    assert path.read_bytes() == before


def test_unaligned_tensors_are_readable(tmp_path: Path) -> None:
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\7" + data)
    assert TensorFile(tmp_path / "x.safetensors")["b"].tolist() == [1.5, -2.0]


def test_null_metadata_is_none(tmp_path: Path) -> None:
    text = b'{"__metadata__":null}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert TensorFile(tmp_path / "x.safetensors").metadata == {}


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 40, -200, -1])
def test_every_cut_is_a_format_error(cut: int, tmp_path: Path) -> None:
    whole = io.BytesIO()
    write_tensors(whole, {"a": torch.ones(10, 10), "b": torch.ones(3)}, {})
    (tmp_path / "x.safetensors").write_bytes(whole.getvalue()[:cut])
    with pytest.raises(FormatError, match="truncated"):
        TensorFile(tmp_path / "x.safetensors")


def test_names_of_all_dtypes_come_back() -> None:
    for name, dtype in DTYPES.items():
        assert f'"{name}"'.encode() in header_of({"x": torch.empty(1, dtype=dtype)}, {})[0]


def test_messages_are_one_printable_line() -> None:
    assert one_line("a\nb\x1b[2J\u2028c") == "a\\nb\\x1b[2J\\u2028c"
    assert len(one_line("x" * 10**6)) < 2000
    assert str(FormatError("two\nlines")) == "two\\nlines"
