"""Opening a container looks at its header and index; a module that is read costs its own bytes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.coded import Coded
from adaptc.delta import LowRank
from adaptc.errors import FormatError
from adaptc.quant.rd import Budget, Module, encode
from adaptc.quant.rd_code import RateDistortion
from adaptc.tensorfile import TensorFile

SIDE, RANK, MODULES = 4096, 16, 64


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def giant(path: Path) -> Path:
    """Write a container whose payload of 32 MiB and group of 32 MiB are holes of a sparse file: zeros never stored."""
    small = Adapter({f"m.{i}.weight": LowRank(t(1, 8), t(8, 1), None, 1.0, (8, 8)) for i in range(MODULES)}
                    | {"core.weight": LowRank(t(1, 8), t(8, 1), t(1, 1), 1.0, (8, 8))}, {}, Origin("peft"))
    adaptc.save(small, path, dialect="adaptc")
    file = TensorFile(path)
    manifest, tensors = json.loads(file.metadata["adaptc"]), {k: v.clone() for k, v in file.items()}
    half, size = RANK // 2, 8 * SIDE * RANK // 2
    manifest["codes"][0]["modules"][0][1] = [SIDE, SIDE]
    manifest["groups"] = [{"modules": ["g.{0-63}.weight"], "scales": [1.0],
                           "form": {"kind": "dense", "weight": 0, "scale": 0, "shape": [SIDE, 32]}}]
    order = np.array([(i, j) for j in range(half) for i in range(MODULES)], "<u2").reshape(-1).view(np.uint8)
    held = {"g0.0": ("F32", [64, SIDE, 32], b""), "index.0": ("U8", [order.nbytes], order.tobytes()),
            "origin": ("U8", [tensors["origin"].numel()], tensors["origin"].numpy().tobytes()),
            "payload.0": ("U8", [MODULES * size], b"")}
    from adaptc.formats.portable_write import digest

    manifest["sums"] = {k: digest(torch.frombuffer(bytearray(raw), dtype=torch.uint8)) if raw else "0" * 16
                        for k, (_, _, raw) in held.items()}
    header, at = {"__metadata__": {"adaptc": json.dumps(manifest)}}, 0
    for name, (dtype, shape, _) in held.items():
        n = int(np.prod(shape)) * (4 if dtype == "F32" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as writers align it; what is not aligned has to be copied
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, (_, _, raw) in held.items():
            f.seek(8 + len(text) + header[name]["data_offsets"][0])
            f.write(raw)
        f.truncate(8 + len(text) + at)
    return path


def resident(path: Path) -> int:
    """Return the bytes of `path` that this process has mapped in and touched."""
    maps = Path("/proc/self/smaps")
    if not maps.exists():
        pytest.skip("no /proc/self/smaps to see touched pages in")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps.read_text(), flags=re.MULTILINE)
    return sum(1024 * int(re.search(r"^Rss:\s+(\d+) kB", p, re.MULTILINE)[1])
               for p in parts if p.splitlines()[:1] and p.splitlines()[0].endswith(str(path)))


def test_opening_touches_the_index_and_a_module_its_chunks(tmp_path: Path) -> None:
    path = giant(tmp_path / "giant.adaptc.safetensors")
    total = path.stat().st_size
    assert total > 40 * 2**20
    a = adaptc.load(path)
    assert len(a.deltas) == 2 * MODULES
    opened = resident(path)
    assert opened < 512 * 1024
    coded = a.deltas["m.17.weight"]
    assert isinstance(coded, Coded)
    b, f, _ = coded.factors()
    assert (b.shape, f.shape) == ((SIDE, RANK // 2), (RANK // 2, SIDE))
    chunks = RANK // 2
    around = 128 * 1024  # pages that the kernel maps in with the one that is touched, on both sides of a chunk
    assert coded.nbytes <= resident(path) - opened + around < coded.nbytes + (chunks + 1) * around
    before = resident(path)
    row = a.deltas["g.40.weight"]
    row.weight.sum()  # type: ignore[union-attr]
    assert resident(path) - before < 4 * SIDE * 32 + 2 * around < total / 20


def test_what_a_container_holds_are_views_of_the_file(tmp_path: Path) -> None:
    factors = encode({"q": Module(t(24, 4).numpy(), t(4, 32).numpy(), 1.0)}, Budget(bits_per_param=3))
    code = RateDistortion(factors)
    a = Adapter({"plain.weight": LowRank(t(2, 8), t(6, 2), None, 1.0, (6, 8)), "q.weight": Coded(code, "q", (24, 32)),
                 "core.weight": LowRank(t(2, 8), t(6, 2), t(2, 2), 1.0, (6, 8))}, {"head": t(3, 8)}, Origin("peft"))
    path = adaptc.save(a, tmp_path / "x.adaptc.safetensors", dialect="adaptc")
    held = adaptc.load(path)
    spans = [(int(lo, 16), int(hi, 16)) for lo, hi in re.findall(
        rf"^([0-9a-f]+)-([0-9a-f]+) .*{re.escape(str(path))}$", Path("/proc/self/maps").read_text(), re.MULTILINE)]
    assert spans
    plain, rd = (held.deltas[k].code for k in ("plain.weight", "q.weight"))  # type: ignore[union-attr]
    core = held.deltas["core.weight"]
    places = [plain.payload.data_ptr(), np.frombuffer(rd.code.payload, np.uint8).ctypes.data, core.a.data_ptr(),  # type: ignore[union-attr]
              held.replaced["head"].data_ptr()]  # type: ignore[union-attr]
    assert all(any(lo <= place < hi for lo, hi in spans) for place in places)


@pytest.mark.parametrize("codec", ["directions", "rd"])
def test_a_module_decodes_from_its_own_bytes_alone(codec: str) -> None:
    pairs = {f"m{i}": (t(40, 3, seed=i), t(3, 50, seed=i)) for i in range(4)}
    if codec == "rd":
        code = RateDistortion(encode({k: Module(b.numpy(), a.numpy(), 1.0) for k, (b, a) in pairs.items()},
                                     Budget(bits_per_param=3)))
    else:
        from adaptc.quant.directions import Directions

        code = Directions.encode({k: (b, a, 1.0) for k, (b, a) in pairs.items()})  # type: ignore[assignment]
    b, a, _ = code.decode(["m2"])["m2"]
    alone = code.select(["m2"]).streams["payload"].numpy().tobytes()
    payload = code.streams["payload"].clone()
    data, ours, at = payload.numpy().tobytes(), np.zeros(len(payload), bool), 0
    while len(alone) - at:  # find the module's pieces in the payload, longest first
        n = next(n for n in range(len(alone) - at, 0, -1) if data.find(alone[at : at + n]) >= 0)
        where = data.find(alone[at : at + n])
        ours[where : where + n] = True
        at += n
    assert 0 < ours.sum() < len(payload) / 2
    payload[torch.from_numpy(~ours)] = 0xFF
    poisoned = type(code).load(code.modules, code.config, {**code.streams, "payload": payload})
    again = poisoned.decode(["m2"])["m2"]
    assert torch.equal(again[0], b)
    assert torch.equal(again[1], a)
    if codec == "rd":
        with pytest.raises(FormatError, match="ends at bit"):
            poisoned.decode(["m1"])
    else:
        assert not torch.isfinite(poisoned.decode(["m1"])["m1"][0]).any()
