"""PETL-ViT's Bi-LoRA: raw .bin files of one-bit factors of q and v, beside a config.yaml. arXiv 2307.16867.

The file has no header: for every quantized layer in module order its codes, packed little end first, then mean and
standard deviation as float32; then the head, in float32 or (bihead) as one more quantized layer. A code c stands for
mean + c std with c = -+ 0.67448975, the conditional medians of a normal variable. The multiplier is in config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin, Replacement
from adaptc.delta import Delta, LowRank
from adaptc.errors import FormatError, UnsupportedError
from adaptc.factor import decoded
from adaptc.formats.flat_yaml import Scalar, read_flat_yaml
from adaptc.formats.format import Content, Evidence, Format
from adaptc.formats.parts import part_key
from adaptc.formats.source import Source

MEDIAN = np.float32(0.6744897501960817)  # of |x| for x ~ N(0, 1)
BLOCKS, WIDTH = 12, 768  # of vit_base_patch16_224_in21k, the only published backbone
_FIELDS = ("method", "bit", "dim", "scale", "num_class")


class PetlVit(Format):
    """One-bit LoRA of PETL-ViT, decoded with its mean offset. Written back byte for byte while the codes are untouched.

    Changed factors are no codes any more: `convert --to petlvit` says so, and compressing writes PEFT instead.
    """

    id: ClassVar[str] = "petlvit"
    title: ClassVar[str] = "PETL-ViT Bi-LoRA"
    suffix: ClassVar[str] = ".bin"
    exact_only: ClassVar[bool] = True

    def sniff(self, source: Source) -> Evidence | None:
        """A .bin file beside a config.yaml that says method, bit, dim, scale and num_class."""
        if source.file.suffix != ".bin" or source.config:
            return None
        told = read_flat_yaml(source.file.parent / "config.yaml")
        return Evidence(3, f"config.yaml has method {told['method']}") if all(f in told for f in _FIELDS) else None

    def read(self, source: Source) -> Adapter:
        """Return the adapter. Raises FormatError unless the file has exactly the bytes its config promises."""
        told = read_flat_yaml(source.file.parent / "config.yaml")
        dim, classes, scale = _numbers(told)
        shapes = {f"{i}.{p}": (dim, WIDTH, WIDTH) for i in range(BLOCKS) for p in "qv"}
        bihead = told["method"] == "lora-bihead"
        layer = WIDTH * dim // 8 + 8
        head = classes * WIDTH // 8 + 8 if bihead else 4 * classes * (WIDTH + 1)
        promised, size = 2 * len(shapes) * layer + head, source.file.stat().st_size
        if size != promised:
            raise FormatError(f"{source.file.name}: {'truncated' if size < promised else 'too long'}, "
                              f"config.yaml promises {promised} bytes, file has {size}")
        raw, at = source.file.read_bytes(), 0
        deltas: dict[str, Delta] = {}
        layout: dict[str, str] = {}
        moments: dict[str, list[float]] = {}
        for place in shapes:
            block, part = place.split(".")
            a, of_a = unpack_bits(raw, at, (dim, WIDTH))
            b, of_b = unpack_bits(raw, at + layer, (WIDTH, dim))
            at += 2 * layer
            start = 0 if part == "q" else 2 * WIDTH
            key = part_key(f"blocks.{block}.attn.qkv.weight", start, start + WIDTH)
            deltas[key], layout[key] = LowRank(a, b, None, scale, (WIDTH, WIDTH)), f"rows:{3 * WIDTH}"
            moments[key] = [*of_a, *of_b]
        replaced: dict[str, Replacement] = {}
        if bihead:
            replaced["head.weight"], of_head = unpack_bits(raw, at, (classes, WIDTH))
            moments["head.weight"] = list(of_head)
        else:
            flat = torch.from_numpy(np.frombuffer(raw, "<f4", offset=at).copy())
            replaced = {"head.weight": flat[: classes * WIDTH].reshape(classes, WIDTH), "head.bias": flat[-classes:]}
        config: dict[str, Any] = {**told, "moments": moments}
        origin = Origin("petlvit", config, {}, str(told.get("backbone") or "") or None, source.files, {}, layout,
                        ("one-bit codes decoded with their mean offset",))
        return Adapter(deltas, replaced, origin)

    def storable(self, adapter: Adapter) -> Adapter:
        """Return the adapter as it is: this dialect is made of parts."""
        return adapter if adapter.origin.dialect == "petlvit" else super().storable(adapter)

    def cannot(self, adapter: Adapter) -> tuple[str, ...]:
        """Anything but the codes that were read."""
        try:
            self.contents(adapter)
        except UnsupportedError as e:
            return (str(e),)
        return ()

    def contents(self, adapter: Adapter) -> Mapping[str, Content]:
        """Return the raw file. Raises UnsupportedError for factors that are not the codes of a Bi-LoRA file."""
        moments = adapter.origin.config.get("moments", {}) if adapter.origin.dialect == "petlvit" else {}
        out = []
        for key, d in adapter.deltas.items():
            if key not in moments or not isinstance(d, LowRank) or d.scale != float(adapter.origin.config["scale"]):
                raise UnsupportedError(f"{key}: not the one-bit codes of a Bi-LoRA file")
            mean_a, std_a, mean_b, std_b = moments[key]
            out += [pack_bits(key, decoded(d.a), mean_a, std_a), pack_bits(key, decoded(d.b), mean_b, std_b)]
        if not moments or len(moments) - ("head.weight" in moments) != len(adapter.deltas):
            raise UnsupportedError("no Bi-LoRA file, or one with modules missing")
        head = {k: v for k, v in adapter.replaced.items() if isinstance(v, Tensor)}
        if "head.weight" in moments:
            out.append(pack_bits("head.weight", head["head.weight"], *moments["head.weight"]))
        else:
            out += [head[k].contiguous().numpy().astype("<f4").tobytes() for k in ("head.weight", "head.bias")]
        return {"": b"".join(out)}


def unpack_bits(raw: bytes, at: int, shape: tuple[int, int]) -> tuple[Tensor, tuple[float, float]]:
    """Return the decoded tensor at byte `at`, and its (mean, standard deviation)."""
    n = shape[0] * shape[1]
    bits = np.unpackbits(np.frombuffer(raw, np.uint8, n // 8, at), bitorder="little")
    mean, std = np.frombuffer(raw, "<f4", 2, at + n // 8)
    if not (np.isfinite(mean) and np.isfinite(std)):
        raise FormatError(f"quantized layer at byte {at}: mean {mean}, deviation {std}, not finite")
    values = np.where(bits == 1, MEDIAN, -MEDIAN).astype(np.float32) * std + mean
    return torch.from_numpy(values.reshape(shape)), (float(mean), float(std))


def pack_bits(key: str, t: Tensor, mean: float, std: float) -> bytes:
    """Return the bytes `unpack_bits` reads. Raises UnsupportedError unless they decode to exactly `t`."""
    if not t.is_meta:
        bits = (t > mean).reshape(-1).numpy() if std > 0 else (t < mean).reshape(-1).numpy()
        raw = np.packbits(bits, bitorder="little").tobytes() + np.array([mean, std], "<f4").tobytes()
        if t.numel() % 8 == 0 and torch.equal(unpack_bits(raw, 0, (t.shape[0], t.shape[1]))[0], t):
            return raw
    raise UnsupportedError(f"{key}: values are not the one-bit codes that were read")


def _numbers(told: Mapping[str, Scalar]) -> tuple[int, int, float]:
    """Return (dim, classes, scale). Raises UnsupportedError for methods and widths nobody has published."""
    method, bit, backbone = told["method"], told["bit"], told.get("backbone", "vit_base_patch16_224_in21k")
    if method not in ("lora", "lora-bihead"):
        raise UnsupportedError(f"method {method} of PETL-ViT is a branch with an activation, not a change of a weight")
    if bit != 1 or backbone != "vit_base_patch16_224_in21k":
        raise UnsupportedError(f"{bit}-bit PETL-ViT files on {backbone} are not read, none is published")
    dim, classes, scale = told["dim"], told["num_class"], told["scale"]
    if not isinstance(dim, int) or not isinstance(classes, int) or not 0 < dim <= WIDTH or not 0 < classes < 10**6:
        raise FormatError(f"config.yaml has dim {dim} and num_class {classes}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e30:
        raise FormatError(f"scale in config.yaml is {scale!r}, not a number")
    return dim, classes, float(scale)
