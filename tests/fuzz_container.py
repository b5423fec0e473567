"""Fuzz the readers of containers and safetensors files: whatever they hold, out comes an adapter or an AdaptcError.

    python tests/fuzz_container.py [SECONDS] [SEED]

Sound files are broken in their structure: nodes of the header, of the manifest and of what origin says are replaced,
removed and doubled, tensors change bytes, shapes and dtypes; checksums are made to fit again, so that what lies behind
them is reached; and bytes of the file change too. An adapter that is read must also verify or be refused, be cut, and
come back from being written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from adaptc.errors import AdaptcError
from adaptc.formats import save
from adaptc.formats.portable import Portable, without_container
from adaptc.formats.portable_write import digest
from adaptc.formats.prefix import cut
from adaptc.formats.sniff import recognise
from adaptc.formats.source import open_source
from adaptc.formats.verify import verify
from adaptc.passes import Context
from adaptc.squeeze.inspection import inspect
from adaptc.squeeze.truncate import Truncate
from adaptc.tensorfile import DTYPES, NAMES, TensorFile

BASES = [p.read_bytes() for p in sorted((Path(__file__).parent / "fixtures").rglob("*.safetensors"))]
ODD = [0, 1, -1, 2, 3, 7, 64, 2**16, 2**24, 2**31, 2**63, 10**30, 0.5, 1e300, float("nan"), float("inf"), True, False,
       None, "", "x", "0", "g0.0", "payload.0", "F32", "U8", "directions", "rd", "nf4", "lowrank", "sum", "coded",
       "a.{0-9}", "{0-99999}{0-99999}", "{", "\\", "\x1b[2J", "\ud800", [], {}, [0], [[]], [1, 2], {"a": 1}, [12, 16],
       [2**20, 2**20]]
Path_ = tuple[Any, ...]


def places(node: Any, at: Path_ = ()) -> list[Path_]:
    """Return the paths of all nodes of a JSON value, leaves and branches."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(p for key, value in inside for p in places(value, (*at, key)))]


def broken_json(draw: Any, value: Any) -> Any:
    """Return a JSON value with one node replaced, removed, doubled or put in the place of another."""
    value = copy.deepcopy(value)
    found = [p for p in places(value) if p]
    if not found:
        return draw(st.sampled_from(ODD))
    at = draw(st.sampled_from(found))
    parent = _at(value, at[:-1])
    match draw(st.sampled_from(["replace", "remove", "double", "move", "nudge"])):
        case "remove":
            del parent[at[-1]]
        case "double" if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[at[-1]]))
        case "double":
            parent[f"{at[-1]}2"] = copy.deepcopy(parent[at[-1]])
        case "move":
            parent[at[-1]] = copy.deepcopy(_at(value, draw(st.sampled_from(found))))
        case "nudge" if type(parent[at[-1]]) is int:
            parent[at[-1]] += draw(st.integers(-3, 3))
        case "nudge" if isinstance(parent[at[-1]], str) and parent[at[-1]]:
            text, i = parent[at[-1]], draw(st.integers(0, len(parent[at[-1]]) - 1))
            parent[at[-1]] = text[:i] + draw(st.sampled_from(list("{}\\,-0 9.\x00é"))) + text[i + 1 :]
        case _:
            parent[at[-1]] = draw(st.sampled_from(ODD))
    return value


def _at(value: Any, path: Path_) -> Any:
    for key in path:
        value = value[key]
    return value


def broken_tensor(draw: Any, t: torch.Tensor) -> torch.Tensor:
    """Return a tensor with other bytes, another shape, or another dtype."""
    raw = bytearray(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) if t.numel() else bytearray()
    match draw(st.sampled_from(["bytes", "shorter", "longer", "flat", "dtype", "transpose"])):
        case "bytes" if raw:
            for _ in range(draw(st.integers(1, 4))):
                raw[draw(st.integers(0, len(raw) - 1))] = draw(st.sampled_from([0, 1, 127, 128, 240, 255]))
            return torch.frombuffer(raw, dtype=t.dtype).reshape(t.shape)
        case "shorter" if t.dim() and t.shape[-1]:
            return t[..., : draw(st.integers(0, t.shape[-1] - 1))]
        case "longer" if t.dim():
            return torch.cat([t, t], draw(st.integers(0, t.dim() - 1)))
        case "dtype":
            dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
            size = len(raw) // dtype.itemsize * dtype.itemsize
            return torch.frombuffer(raw[:size], dtype=dtype) if size else torch.zeros(0, dtype=dtype)
        case "transpose" if t.dim() > 1:
            return t.mT.contiguous()
    return t.reshape(-1)


def broken_bytes(draw: Any, data: bytes) -> bytes:
    """Return a file with bytes changed, left out, put in, or cut off."""
    at, n = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, 9))
    match draw(st.sampled_from(["change", "cut", "remove", "insert", "length"])):
        case "change":
            return data[:at] + bytes(draw(st.lists(st.integers(0, 255), min_size=n, max_size=n))) + data[at + n :]
        case "cut":
            return data[:at]
        case "remove":
            return data[:at] + data[at + n :]
        case "insert":
            return data[:at] + data[at : at + n] + data[at:]
        case _:
            return struct.pack("<Q", draw(st.sampled_from([0, 1, 7, len(data), 10**8, 2**63]))) + data[8:]


def packed(manifest: str, tensors: dict[str, torch.Tensor], header: Any = None) -> bytes:
    """Return a safetensors file; `header(entries)` may break its header."""
    entries: dict[str, Any] = {"__metadata__": {"adaptc": manifest}}
    data = b""
    for name in sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k)):
        t = tensors[name].contiguous()
        raw = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        span = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": span}
        data += raw
    text = json.dumps(header(entries) if header else entries).encode()
    return struct.pack("<Q", len(text)) + text + data


class Broken(bytes):
    """A file to check; a failure says where it was put."""

    def __repr__(self) -> str:
        kept = Path(tempfile.gettempdir()) / f"fuzz-{hashlib.sha256(self).hexdigest()[:16]}.adaptc.safetensors"
        kept.write_bytes(self)
        return f"{len(self)} bytes, kept as {kept}"


@st.composite
def files(draw: Any) -> Broken:
    """Return a container with up to three things wrong with it."""
    return Broken(_file(draw))


def _file(draw: Any) -> bytes:
    base = draw(st.sampled_from(BASES))
    kind = draw(st.sampled_from(["bytes", "header", *["inside"] * 8]))
    if kind == "bytes":
        return broken_bytes(draw, base)
    with tempfile.NamedTemporaryFile() as f:
        f.write(base)
        f.flush()
        file = TensorFile(Path(f.name))
        manifest, tensors = json.loads(file.metadata["adaptc"]), {k: t.clone() for k, t in file.items()}
    if kind == "header":
        return packed(json.dumps(manifest), tensors, lambda entries: broken_json(draw, entries))
    said = json.loads(zlib.decompress(tensors["origin"].numpy().tobytes()))
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["manifest", "manifest", "tensor", "origin"])):
            case "manifest":
                manifest = broken_json(draw, {k: v for k, v in manifest.items() if k != "sums"})
            case "tensor":
                name = draw(st.sampled_from(sorted(tensors)))
                tensors[name] = broken_tensor(draw, tensors[name])
            case _:
                said = broken_json(draw, said)
                tensors["origin"] = torch.frombuffer(bytearray(zlib.compress(json.dumps(said).encode())),
                                                     dtype=torch.uint8)
        if not isinstance(manifest, dict):
            break
    if isinstance(manifest, dict) and draw(st.integers(0, 9)):
        manifest["sums"] = {k: digest(t) for k, t in tensors.items()}
    return packed(json.dumps(manifest), tensors)


def check(data: bytes) -> bool:
    """Read a file and all it holds; return whether it was an adapter. Raises anything but AdaptcError that comes up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.adaptc.safetensors"
        path.write_bytes(data)
        try:
            source = open_source(path)
            adapter = recognise(source)[0].read(source)
        except AdaptcError:
            return False
        repr([adapter, *adapter.deltas.values()])
        for work in (lambda: verify(source, adapter, None), lambda: inspect(adapter, jobs=1),
                     lambda: cut(adapter, len(data) * 2 // 3, lambda a: Portable().size(a, folder=False)),
                     lambda: Truncate(rank=1)(adapter, Context(jobs=1)),
                     lambda: save(without_container(adapter), Path(folder) / "plain", dialect="peft", allow_loss=True)):
            try:
                work()
            except AdaptcError:
                continue
        again = Path(folder) / "again.adaptc.safetensors"
        Portable().write(adapter, again)
        assert set(Portable().read(open_source(again)).deltas) == set(adapter.deltas)
        return True


def fuzz(examples: int, number: int) -> int:
    """Check `examples` broken files, the same for the same `number`; return how many were adapters all the same."""
    sound = 0

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])
    @given(files())
    def run(data: bytes) -> None:
        nonlocal sound
        sound += check(data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return sound


def main(seconds: float = 60, number: int = 0) -> None:
    """Fuzz for `seconds`, from seed `number` on."""
    torch.set_num_threads(1)
    end, done, sound = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        sound += fuzz(200, number)
        done, number = done + 200, number + 1
    print(f"{done} broken containers: {done - sound} refused, {sound} read, nothing else")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
