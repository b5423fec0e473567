"""A sound container holding every kind of thing, and ways to break each of its promises."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, Rows, Step
from adaptc.coded import Coded
from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.factor import Encoded
from adaptc.formats.portable_write import digest
from adaptc.quant.affine import Affine
from adaptc.quant.fp8 import FP8
from adaptc.quant.golomb import Golomb
from adaptc.quant.nf4 import NF4
from adaptc.quant.rd import Budget, Module, encode
from adaptc.quant.rd_code import RateDistortion
from adaptc.tensorfile import TensorFile, write_tensors

Manifest = dict[str, Any]
Edit = Callable[[Manifest, dict[str, Tensor]], None]


def ramp(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def pair(seed: int = 0, m: int = 12, n: int = 16, r: int = 3) -> LowRank:
    return LowRank(ramp(r, n, seed=seed), ramp(m, r, seed=seed + 1), None, 0.5, (m, n))


def adapter() -> Adapter:
    """Return codes 0 (directions) and 1 (rd), and one group for every other kind."""
    rd = encode({f"r{i}": Module(ramp(24, 4, seed=i).numpy(), ramp(4, 32, seed=i + 9).numpy(), 1.0) for i in range(3)},
                Budget(bits_per_param=2))
    code = RateDistortion(rd)
    coded = {f"model.r{i}.weight": Coded(code, f"r{i}", (24, 32)) for i in range(3)}
    place = torch.tensor([0, 5, 100])
    deltas = {f"model.d{i}.weight": pair(i) for i in range(3)} | coded | {
        "core.weight": LowRank(ramp(2, 16), ramp(12, 3), ramp(3, 2), 1.0, (12, 16)),
        "sparse.weight": Sparse(place, ramp(3), 1.0, (12, 16)),
        "dense.weight": Dense(ramp(12, 16), 1.0, (12, 16)),
        "kron.weight": Kron(Dense(ramp(3, 4), 1.0, (3, 4)), pair(m=4, n=4, r=2), 1.0, (12, 16)),
        "had.weight": Hadamard(pair(3), pair(5), 1.0, (12, 16)),
        "sum.weight": Sum((pair(7), Dense(ramp(12, 16), 1.0, (12, 16))), (12, 16)),
        "nf4.weight": LowRank(NF4.encode(ramp(4, 96)), NF4.encode(ramp(64, 4)), None, 1.0, (64, 96)),
        "affine.weight": LowRank(Affine.encode(ramp(4, 96)), ramp(64, 4), None, 1.0, (64, 96)),
        "fp8.weight": LowRank(FP8.encode(ramp(4, 96)), ramp(64, 4), None, 1.0, (64, 96)),
        "fourier.weight": Dense(Encoded("fourier", {}, {"indices": place, "values": ramp(3)}, torch.Size((12, 16)),
                                        torch.float32), 1.0, (12, 16)),
        "dora.weight": NeedsBase("dora", {"magnitude": ramp(12)}, {"axis": 0}, (12, 16), pair(9)),
        "places.weight": Sparse(Golomb.encode(torch.arange(1, 192, 3), 192, 16), ramp(64), 1.0, (12, 16)),
    }
    replaced = {"head.weight": ramp(2, 12), "emb.weight": Rows((3, 9), ramp(2, 5))}
    origin = Origin("peft", {"peft_type": "LORA", "r": 3}, base_model="org/base", fingerprint="0123456789abcdef")
    return Adapter(deltas, replaced, origin, (Step("x", "1", 2, 1, 0.5),), {"state": ramp(3)})  # type: ignore[arg-type]


@cache
def sound() -> bytes:
    """Return the file."""
    with tempfile.TemporaryDirectory() as folder:
        return adaptc.save(adapter(), Path(folder) / "x.adaptc.safetensors", dialect="adaptc").read_bytes()


def opened(data: bytes) -> tuple[Manifest, dict[str, Tensor]]:
    """Return manifest and tensors of a container."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        file = TensorFile(path)
        return json.loads(file.metadata["adaptc"]), {k: t.clone() for k, t in file.items()}


def packed(manifest: Any, tensors: Mapping[str, Tensor], *, sums: bool = True) -> bytes:
    """Return a container of these, with checksums that fit; `manifest` may be text."""
    if sums and isinstance(manifest, dict):
        manifest = {**manifest, "sums": {k: digest(t) for k, t in tensors.items()}}
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        with path.open("wb") as f:
            write_tensors(f, tensors, {"adaptc": text})
        return path.read_bytes()


def broken(edit: Edit, *, sums: bool = True) -> bytes:
    """Return the sound container after `edit(manifest, tensors)`; checksums fit again unless `sums` is off."""
    manifest, tensors = opened(sound())
    edit(manifest, tensors)
    return packed(manifest, tensors, sums=sums)


def group_of(manifest: Manifest, name: str) -> tuple[int, Manifest]:
    """Return number and entry of the group that holds module `name`."""
    return next((i, g) for i, g in enumerate(manifest["groups"]) if f"{name}.weight" in g["modules"])


def form(name: str, edit: Callable[[Manifest], Any]) -> Edit:
    """Return an edit of the form of one group."""
    return lambda m, t: edit(group_of(m, name)[1]["form"])


def entry(name: str, **changes: Any) -> Edit:
    """Return an edit of fields of one group."""
    return lambda m, t: group_of(m, name)[1].update(changes)


def tensor(name: str, number: int, change: Callable[[Tensor], Tensor]) -> Edit:
    """Return an edit of tensor `number` of the group of module `name`."""
    def edit(m: Manifest, t: dict[str, Tensor]) -> None:
        key = f"g{group_of(m, name)[0]}.{number}"
        t[key] = change(t[key])

    return edit


def stream(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """Return an edit of a tensor by its stored name."""
    return lambda m, t: t.update({name: change(t[name])})


def values(**changes: Any) -> Edit:
    """Return an edit of manifest fields."""
    return lambda m, t: m.update(changes)


def code(i: int, **changes: Any) -> Edit:
    """Return an edit of fields of one code."""
    return lambda m, t: m["codes"][i].update(changes)


def origin(change: Callable[[Manifest], Any]) -> Edit:
    """Return an edit of what origin says, deflated again."""
    def edit(m: Manifest, t: dict[str, Tensor]) -> None:
        said = json.loads(zlib.decompress(t["origin"].numpy().tobytes()))
        new = change(said)
        t["origin"] = raw(zlib.compress(json.dumps(said if new is None else new).encode()))

    return edit


def raw(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def bits(*fields: str) -> Tensor:
    """Return bits written as text as bytes, zero-padded."""
    text = "".join(fields)
    text += "0" * (-len(text) % 8)
    return raw(int(text, 2).to_bytes(len(text) // 8, "big"))
