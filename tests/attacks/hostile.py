"""Hostile inputs: name -> (what builds it and returns the command's arguments, what the message must say)."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bytes_of import CONFIG, Q, edited, entries, folder, good, pack, patched, ramp, whole

# A module name on which a backtracking matcher would not end.
LONG = {f"base_model.model.{'a' * 300}.lora_{x}.weight": t for x, t in (("A", ramp(4, 16)), ("B", ramp(12, 4)))}
Build = Callable[[Path], list[str]]
ATTACKS: dict[str, tuple[Build, str]] = {}
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def attack(name: str, says: str, build: Callable[[Path], Any]) -> None:
    """List an attack. `build` gets a fresh folder and returns the input, or all arguments after `compress`."""
    assert name not in ATTACKS

    def args(at: Path) -> list[str]:
        made = build(at)
        return made if isinstance(made, list) else [str(made), "-o", str(at / "out.safetensors"), "--rank", "2"]

    ATTACKS[name] = (args, says)


def peft(name: str, says: str, file: bytes | Callable[[], bytes] | None = None, config: Any = None) -> None:
    """List an attack that is a PEFT folder."""
    attack(name, says, lambda at: folder(at, file() if callable(file) else file, config))


def held(tensors: dict[str, torch.Tensor]) -> Callable[[], bytes]:
    """Return a builder of a safetensors file of these tensors."""
    return lambda: whole(tensors)


def alone(name: str, says: str, build: Callable[[], bytes], file: str, *more: str) -> None:
    """List an attack that is one file with nothing beside it."""
    def make(at: Path) -> list[str]:
        (at / file).write_bytes(build())
        return [str(at / file), "-o", str(at / "out.safetensors"), "--rank", "2", *more]

    attack(name, says, make)


def set_(key: str, field: str, value: Any) -> Callable[[], bytes]:
    """Return a builder of the good file with one field of one header entry changed."""
    return lambda: edited(lambda h: h[key].update({field: value}))


# Files cut short or made too long
peft("empty-file", "file is empty", b"")
peft("cut-in-length", "truncated", lambda: whole()[:5])
peft("cut-in-header", "truncated", lambda: whole()[:60])
peft("cut-in-first-tensor", "truncated", lambda: whole()[:-300])
peft("cut-by-one-byte", "truncated", lambda: whole()[:-1])
peft("cut-after-header", "truncated", lambda: pack(entries(good())[0], b""))
peft("trailing-bytes", "belong to nothing", lambda: whole() + b"\0" * 7)
# Headers that lie
peft("header-of-4-exabytes", "header claims", lambda: pack(*entries(good()), length=2**62))
peft("header-longer-than-file", "truncated", lambda: pack(*entries(good()), length=90_000_000))
peft("header-no-json", "not JSON", lambda: pack(b"{'a': 1}", b""))
peft("header-list", "not a JSON object", lambda: pack([1, 2], b""))
peft("header-utf-16", "not JSON", lambda: pack(json.dumps(entries(good())[0]).encode("utf-16"), entries(good())[1]))
peft("header-nested-100000-deep", "not JSON", lambda: pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""))
peft("header-entry-is-text", "dtype, shape and data_offsets", lambda: pack({A: "F32"}, b""))
peft("duplicate-keys", "twice", lambda: pack(
    json.dumps(entries(good())[0])[:-1].encode() + b', "' + A.encode() + b'": {"dtype": "F32", "shape": [0], '
    b'"data_offsets": [0, 0]}}', entries(good())[1]))
peft("overlapping-offsets", "overlaps", set_(B, "data_offsets", [0, 192]))
peft("hole-between-tensors", "hole", lambda: pack({**entries(good())[0], B: {
    "dtype": "F32", "shape": [12, 4], "data_offsets": [300, 492]}}, entries(good())[1] + b"\0" * 44))
peft("offsets-backwards", "offsets span", set_(A, "data_offsets", [256, 0]))
peft("offsets-beyond-63-bits", "not all whole and positive", set_(A, "data_offsets", [0, 2**70]))
peft("dtype-unknown", "not readable here", set_(A, "dtype", "F4"))
peft("dtype-is-a-list", "not readable here", set_(A, "dtype", ["F32"]))
peft("negative-dim", "not all whole and positive", set_(A, "shape", [-4, -16]))
peft("fractional-dim", "not all whole and positive", set_(A, "shape", [4.0, 16]))
peft("boolean-dim", "not all whole and positive", set_(A, "shape", [True, 64]))
peft("dims-that-overflow", "63 bits", set_(A, "shape", [2**62, 2**62]))
peft("zero-beside-dims-that-overflow", "63 bits", lambda: pack({A: {
    "dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""))
peft("two-hundred-dims", "no list of at most", set_(A, "shape", [1] * 200))
peft("metadata-of-numbers", "map of strings", lambda: edited(lambda h: h.update({"__metadata__": {"rank": 4}})))
peft("metadata-half-surrogate", "surrogate", lambda: edited(lambda h: h.update({"__metadata__": {"x": "\ud800"}})))
peft("name-with-escape-codes", "control characters", lambda: edited(lambda h: h.update({"\x1b[2J\nok": h.pop(A)})))
peft("name-half-surrogate", "control characters", lambda: edited(lambda h: h.update({"\udfff": h.pop(A)})))
peft("name-of-a-megabyte", "characters, allowed", lambda: edited(lambda h: h.update({"x" * 2**20: h.pop(A)})))
peft("no-tensors", "no tensors", lambda: pack({}, b""))
# Tensors that are no adapter
peft("nan-in-a", "finite", held({A: ramp(4, 16).fill_(float("nan")), B: ramp(12, 4)}))
peft("inf-in-b", "finite", held({A: ramp(4, 16), B: ramp(12, 4).index_fill(0, torch.tensor([3]), float("inf"))}))
peft("zero-shard", "shard", held({A: torch.empty(0), B: torch.empty(0)}))
peft("flat-shard", "shard", held({A: ramp(64), B: ramp(48)}))
peft("number-for-a-matrix", "shape ()", held({A: torch.tensor(1.0), B: ramp(12, 4)}))
peft("half-a-only", "half an adapter", held({A: ramp(4, 16)}))
peft("half-b-only", "half an adapter", held({B: ramp(12, 4)}))
peft("ranks-disagree", "lora_B has rank 3, lora_A has rank 4", held({A: ramp(4, 16), B: ramp(12, 3)}))
peft("int8-codes", "codes", held({A: torch.ones(4, 16, dtype=torch.int8), B: ramp(12, 4)}))
peft("unknown-lora-parameter", "lora_Z", held({**good(), f"{Q}.lora_Z.weight": ramp(4, 4)}))
peft("module-twice-after-stripping", "are the same parameter", held({**good(), f"module.{A}": ramp(4, 16, seed=9)}))
peft("adapter-name-twice", "are the same parameter", held({
    **good(), f"{Q}.lora_A.default.weight": ramp(4, 16, seed=9)}))
peft("nothing-of-lora", "no parameter of this", held({"base_model.model.x.oft_R.weight": ramp(2, 3)}),
     patched(peft_type="LOHA"))
peft("token-rows-unlisted", "trainable_token_indices", held({
    **good(), "base_model.model.emb.token_adapter.trainable_tokens_delta": ramp(3, 8)}))
peft("token-rows-of-text", "trainable_token_indices", held({
    **good(), "base_model.model.emb.token_adapter.trainable_tokens_delta": ramp(1, 8)}),
    patched(trainable_token_indices=["x"]))
# Configs that lie
peft("config-lies-about-rank", "says rank 64", None, patched(r=64))
peft("config-rank-negative", "rank", None, patched(r=-4))
peft("config-rank-text", "not a number", None, patched(r="4"))
peft("config-no-json", "not JSON", None, "{r: 4}")
peft("config-list", "not a JSON object", None, "[]")
peft("config-utf-16", "not JSON", None, json.dumps(CONFIG).encode("utf-16"))
peft("config-100000-deep", "not JSON", None, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
peft("config-500-deep", "nested deeper", None, '{"peft_type": "LORA", "a":' + "[" * 500 + "]" * 500 + "}")
peft("config-17-mebibytes", "the limit is", None, json.dumps(patched(x="y" * (17 * 2**20))))
peft("config-alpha-of-10000-digits", "not JSON", None,
     '{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + "0" * 10_000 + "}")
peft("config-alpha-infinite", "not a number", None, '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}')
peft("config-alpha-nan", "not a number", None, '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}')
peft("config-alpha-1e300", "not fit", held({A: ramp(4, 16), B: ramp(12, 4) * 1e30}), patched(lora_alpha=1e300))
peft("config-patterns-in-a-list", "not an object", None, patched(rank_pattern=["q_proj"]))
peft("config-bad-regex", "not a regular expression", None, patched(rank_pattern={"*q_proj": 4}))
peft("config-regex-beyond-all-bounds", "takes more than", held(LONG), patched(rank_pattern={
    "(.*(?=.*(?=.*(?=.*!))))*": 4}))
peft("config-regex-back-reference", "groupref", None, patched(alpha_pattern={r"(.*)\1x": 4}))
peft("config-unknown-type", "is not known", None, patched(peft_type="EVIL"))
peft("config-type-with-escape-codes", "is not known", None, patched(peft_type="\x1b[31mx\nadaptc: all is well"))
peft("config-half-surrogate", "surrogate", None, '{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}')
# Factors the wrong way round
peft("mlx-pair-that-looks-like-rank-896", "rank", held({A: ramp(896, 8), B: ramp(8, 896)}), patched(r=8))
alone("mlx-pair-without-config", "rank 896", held({A: ramp(896, 8), B: ramp(8, 896)}), "x.safetensors", "--alpha", "16")
alone("peft-pair-under-mlx-names", "rank 896", held({"l.q_proj.lora_a": ramp(8, 896), "l.q_proj.lora_b": ramp(896, 8)}),
      "adapters.safetensors", "--alpha", "20")
alone("bare-without-scale", "scale", whole, "x.safetensors")
alone("alpha-nan", "alpha", whole, "x.safetensors", "--alpha", "nan")


# Pickles
class _Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _bin(name: str, says: str, build: Callable[[Path], bytes]) -> None:
    attack(name, says, lambda at: folder(at, build(at), name="adapter_model.bin"))


_bin("pickle-runs-code", "refused", lambda at: _saved({**good(), "x": _Runs(str(at / "out.pwned"))}))
_bin("pickle-runs-code-plain", "refused", lambda at: pickle.dumps(_Runs(str(at / "out.pwned")), 4))
_bin("pickle-runs-code-protocol-2", "refused", lambda at: pickle.dumps({"a": _Runs(str(at / "out.pwned"))}, 2))
_bin("pickle-inside-a-pickle", "no tensors", lambda at: _saved({"blob": pickle.dumps(_Runs(str(at / "out.pwned")))}))
_bin("pickle-cut", "truncated", lambda at: _saved(good())[:-400])
_bin("pickle-cut-early", "truncated", lambda at: _saved(good())[:64])
_bin("pickle-old-cut", "truncated", lambda at: _legacy()[:200])
_bin("pickle-view-of-terabytes", "claims", lambda at: _saved(
    {A: torch.ones(1).expand(10**6, 10**6), B: ramp(12, 4)}))
_bin("pickle-sparse-tensor", "not plain numbers", lambda at: _saved({A: torch.eye(4).to_sparse(), B: ramp(12, 4)}))
_bin("pickle-complex-tensor", "not plain numbers", lambda at: _saved({A: torch.ones(4, 16) * 1j, B: ramp(12, 4)}))
_bin("pickle-keys-that-read-the-same", "two keys", lambda at: _saved({1: ramp(4, 16), "1": ramp(4, 16)}))


def _legacy() -> bytes:
    out = io.BytesIO()
    torch.save(good(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


# Archives
def _npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def _bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("q.lora_A.weight.npy", b"\0" * 2**20)
        z.filelist[0].file_size = 2**31 - 1  # what the archive says of itself is all that is looked at
    return out.getvalue()


alone("npz-cut", "npz archive", lambda: _npz(**{"q.lora_A.weight": np.ones((8, 2))})[:-30], "a.npz")
alone("npz-of-objects", "npz archive", lambda: _npz(**{"q.lora_A.weight": np.array([{}], object)}), "a.npz")
alone("npz-bomb", "unpack", _bomb, "a.npz")
alone("npz-half", "half an adapter", lambda: _npz(**{"q.lora_A.weight": np.ones((8, 2), np.float32)}), "a.npz")
alone("npz-that-is-none", "no npz archive", lambda: b"hello, world, no archive", "a.npz")
# Other dialects
alone("gguf", "GGUF", lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + b"\0" * 64, "a.gguf")
alone("onnx-flatbuffer", "flatbuffer", lambda: b"\x18\0\0\0TORT" + b"\0" * 64, "a.onnx_adapter")
alone("sam-half", "half an adapter", held({f"w_a_{i:03d}": ramp(4, 16) for i in range(4)}), "x.safetensors")
alone("sam-b-in-the-place-of-a", "no pair", held({
    "w_a_000": ramp(4, 16), "w_a_001": ramp(16, 4), "w_b_000": ramp(16, 4), "w_b_001": ramp(16, 4)}), "x.safetensors")
alone("nemo", "NeMo", held({"d.self_attention.linear_qkv.adapter.linear_in.weight": ramp(4, 16)}), "x.safetensors")
alone("loralib-groups-do-not-come-out", "no common rank", held({"q.lora_A": ramp(5, 16), "q.lora_B": ramp(12, 2)}),
      "x.safetensors", "--alpha", "4")
alone("words", "no known adapter dialect", lambda: b"this is a letter to my grandmother", "x.bin")


def _petl(at: Path) -> Path:
    (at / "config.yaml").write_text("method: lora\nbit: 1\ndim: 1\nscale: 1.0\nnum_class: 10\n")
    (at / "x.bin").write_bytes(b"\1" * 1000)
    return at / "x.bin"


attack("petl-vit-cut", "config.yaml promises", _petl)


# Names and places
def _sound(at: Path) -> Path:
    return folder(at)


def _to(out: Callable[[Path], Path], *more: str) -> Callable[[Path], list[str]]:
    return lambda at: [str(_sound(at)), "-o", str(out(at)), "--rank", "2", *more]


def _link(at: Path, name: str, to: Path) -> Path:
    (at / name).symlink_to(to)
    return at / name


def _hard(at: Path) -> Path:
    os.link(at / "adapter" / "adapter_model.safetensors", at / "x.safetensors")
    return at / "x.safetensors"


def _kept(at: Path) -> Path:
    (at / "mine").mkdir()
    (at / "mine" / "thesis.txt").write_text("five years of work")
    return at / "mine"


def _made(path: Path, text: str = "mine") -> Path:
    path.write_text(text)
    return path


def _made_folder(path: Path) -> Path:
    path.mkdir()
    return path


def _fifo(at: Path) -> Path:
    os.mkfifo(at / "pipe.safetensors")
    return at / "pipe.safetensors"


attack("input-missing", "does not exist", lambda at: at / "nothing.safetensors")
attack("input-empty-folder", "no adapter file", lambda at: _made_folder(at / "adapter.safetensors"))
attack("input-folder-called-like-the-file", "no adapter file",
       lambda at: (_made_folder(at / "a"), _made_folder(at / "a" / "adapter_model.safetensors"))[0])
attack("input-is-a-pipe", "no regular file", _fifo)
attack("input-is-a-device", "no regular file", lambda at: Path("/dev/zero"))
attack("input-link-to-nowhere", "does not exist", lambda at: _link(at, "x.safetensors", at / "nowhere"))
attack("input-link-to-itself", "x.safetensors", lambda at: _link(at, "x.safetensors", at / "x.safetensors"))
attack("input-name-too-long", "", lambda at: at / ("x" * 300 + ".safetensors"))
attack("input-of-several-adapters", "could be the adapter", lambda at: [
    str(_made(_made(_made_folder(at / "d") / "a.safetensors").parent / "b.safetensors").parent), "--rank", "2"])
attack("output-is-the-input", "is the input", _to(lambda at: at / "adapter" / "adapter_model.safetensors", "--force"))
attack("output-is-the-folder", "is the input", _to(lambda at: at / "adapter", "--force"))
attack("output-holds-the-input", "", _to(lambda at: at, "--force"))
attack("output-is-the-input-by-dots", "is the input", _to(lambda at: at / "adapter" / ".." / "adapter", "--force"))
attack("output-is-the-input-by-link", "is the input",
       _to(lambda at: _link(at, "x.safetensors", at / "adapter" / "adapter_model.safetensors"), "--force"))
attack("output-is-the-input-by-hard-link", "is the input", _to(_hard, "--force"))
attack("output-exists", "exists", _to(lambda at: _made(at / "x.safetensors")))
attack("output-is-a-dead-link", "exists", _to(lambda at: _link(at, "x.safetensors", at / "nowhere")))
attack("output-folder-by-link", "symbolic link", _to(lambda at: _link(at, "x", _kept(at)), "--force"))
attack("output-folder-holds-other-files", "thesis.txt", _to(_kept, "--force"))
attack("output-is-the-other-kind", "other kind", _to(lambda at: _made(at / "x"), "--force"))
attack("output-below-a-file", "", _to(lambda at: _made(at / "x") / "y.safetensors"))
attack("output-in-proc", "", _to(lambda at: Path("/proc/adaptc/x.safetensors")))
attack("output-is-dots", "", _to(lambda at: at / "adapter" / ".."))
attack("output-is-the-root", "", _to(lambda at: Path("/"), "--force"))
attack("output-name-too-long", "", _to(lambda at: at / ("x" * 300 + ".safetensors")))
