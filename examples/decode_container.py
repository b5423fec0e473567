"""Decode an adaptc container with numpy alone, written from docs/format.md (and, beside this file, its codecs).

    python examples/decode_container.py FILE.adaptc.safetensors
"""

import hashlib
import json
import re
import sys
from itertools import product
from math import prod

import numpy as np
from decode_factors import TYPES, factor, widened
from decode_rd import rd


def read(path):
    """Return the manifest and the tensors by name, checksums checked; the last one may be cut short."""
    data = np.fromfile(path, "u1")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    manifest, tensors = json.loads(header.pop("__metadata__")["adaptc"]), {}
    if manifest["format"] != 1:
        raise ValueError(f"format {manifest['format']}")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[start + begin : start + end]
        whole = len(raw) == end - begin
        if whole and hashlib.sha256(raw).hexdigest()[:16] != manifest["sums"][name]:
            raise ValueError(f"{name} does not match its checksum")
        t = widened(np.frombuffer(raw.tobytes(), TYPES[entry["dtype"]]), entry["dtype"])
        tensors[name] = t.reshape(entry["shape"]) if whole else t
    return manifest, tensors


def names(template):
    """Return what a template stands for."""
    parts = []
    for escaped, body, plain in re.findall(r"\\(.)|\{([^{}]*)\}|([^\\{}]+)", template, re.DOTALL):
        ends = re.fullmatch(r"(\d+)-(\d+)", body)
        if escaped or plain:
            parts.append([escaped + plain])
        else:
            parts.append(map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else body.split(","))
    return ["".join(choice) for choice in product(*parts)]


def directions(shapes, config, index, payload):
    """Return (B, A, scale) of every module; `shapes` are (m, n), the streams uint8 arrays."""
    dtype, columns, at, out = config["dtype"], [{} for _ in shapes], 0, []
    for i, j in index.view("<u2").reshape(-1, 2).tolist():
        end = at + sum(shapes[i]) * np.dtype(TYPES[dtype]).itemsize
        if end > len(payload):
            break
        columns[i][j], at = widened(payload[at:end].view(TYPES[dtype]), dtype), end
    for i, ((m, n), held) in enumerate(zip(shapes, columns, strict=True)):
        both = np.array([held[j] for j in sorted(held)], widened(np.zeros(0, TYPES[dtype]), dtype).dtype)
        scale = config["scale"][i] if isinstance(config["scale"], list) else config["scale"]
        out.append((both.reshape(-1, m + n)[:, :m].T, both.reshape(-1, m + n)[:, m:], scale))
    return out


def form(f, held, scales, coded):
    """Return a form with arrays and multipliers in the places of their numbers; `coded` is what a code says."""
    if f["kind"] == "coded":
        return coded
    made = {**f, "scale": scales[f["scale"]]} if "scale" in f else dict(f)
    made |= {x: factor(f[x], held) for x in ("a", "b", "core", "weight", "indices", "values") if x in f}
    made |= {x: form(f[x], held, scales, coded) for x in ("left", "right", "inner") if x in f}
    if "terms" in f:
        made["terms"] = [form(t, held, scales, coded) for t in f["terms"]]
    if "tensors" in f:
        made["tensors"] = {x: held[j] for x, j in f["tensors"].items()}
    return made


def decode(path):
    """Return parameter name -> form; a joint code gives forms of kind lowrank with arrays b, a and scale."""
    (manifest, tensors), deltas = read(path), {}
    for i, code in enumerate(manifest.get("codes", [])):
        modules = [(name, shape) for template, shape in code["modules"] for name in names(template)]
        flat = [(shape[0], prod(shape[1:])) for _, shape in modules]
        codec = {"directions": directions, "rd": rd}[code["codec"]]
        made = codec(flat, code.get("config"), tensors[f"index.{i}"], tensors[f"payload.{i}"])
        for (name, shape), (b, a, scale) in zip(modules, made, strict=True):
            deltas[name] = {"kind": "lowrank", "b": b, "a": a, "scale": scale, "shape": shape}
    for i, group in enumerate(manifest.get("groups", [])):
        stacked = [tensors[f"g{i}.{j}"] for j in range(sum(name.startswith(f"g{i}.") for name in tensors))]
        for k, name in enumerate(n for template in group["modules"] for n in names(template)):
            scales = [s[k] if isinstance(s, list) else s for s in group["scales"]]
            deltas[name] = form(group["form"], [t[k] for t in stacked], scales, deltas.pop(name, None))
    return deltas


def fields(f, path=""):
    """Yield (path, array or multiplier) of a form and the forms inside it."""
    for key, value in f.items():
        if isinstance(value, (np.ndarray, float)):
            yield path + key, value
        elif key in ("left", "right", "inner", "tensors") or key == "terms":
            for i, part in enumerate(value if key == "terms" else [value]):
                yield from fields(part, f"{path}{i if key == 'terms' else key}.")


if __name__ == "__main__":
    for name, delta in decode(sys.argv[1]).items():
        for field, value in fields(delta):
            print(name, field, *((value.dtype, value.shape) if isinstance(value, np.ndarray) else (value,)))
