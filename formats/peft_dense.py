"""PEFT types whose change has full rank but few coefficients, or few entries: Fourier, wavelets, circulants, sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adaptc.delta import Dense, LowRank, NeedsBase, Sum
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.factor import Encoded
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_parts import Read, expect, flag, take
from adaptc.formats.peft_scale import number
from adaptc.resolve_shape import sorted_sparse


def fourierft(modules: Modules, config: Mapping[str, Any]) -> Read:
    """scaling Re ifft2(S) with the coefficients at seeded random places; the shape only the base tells."""
    return _spectra(modules, config, "fourierft", 150.0, 777, {})


def waveft(modules: Modules, config: Mapping[str, Any]) -> Read:
    """scaling times the inverse Haar transform of S (or S itself); other wavelets are refused."""
    family = config.get("wavelet_family", "db1")
    transform = flag(config, "use_idwt", True)
    if transform and family not in ("db1", "haar"):
        raise UnsupportedError(f"WAVEFT with wavelet {family}: only db1 is checked against PEFT")
    return _spectra(modules, config, "waveft", 25.0, 777, {"transform": transform})


def _spectra(modules: Modules, config: Mapping[str, Any], kind: str, scaling: float, seed: int, more: Mapping[str, Any]
             ) -> Read:
    settings = {"scaling": number(config, "scaling", config.get("scaling", scaling)),
                "seed": int(number(config, "random_loc_seed", config.get("random_loc_seed", seed))), **more}
    out = Read()
    for module, tensors in modules.tuned.items():
        (spectrum,) = take(module, tensors, [f"{kind}_spectrum"])
        expect(module, f"{kind}_spectrum", spectrum, None)
        out.deltas[f"{module}.weight"] = NeedsBase(kind, {"spectrum": spectrum}, settings, (0, 0))
    return out


def c3a(modules: Modules, config: Mapping[str, Any]) -> Read:
    """Circulant blocks, kept as their kernels (out/b, in/b, b)."""
    out = Read()
    for module, tensors in modules.tuned.items():
        (kernel,) = take(module, tensors, ["c3a_kernel"])
        expect(module, "c3a_kernel", kernel, None, None, None)
        shape = (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2])
        weight = Encoded("circulant", {}, {"kernel": kernel}, torch.Size(shape), kernel.dtype)
        out.deltas[f"{module}.weight"] = Dense(weight, 1.0, shape)
    return out


def shira(modules: Modules, config: Mapping[str, Any]) -> Read:
    """dW[rows, cols] = values. r (in + out) entries are trained, so the shape is known where the last row and column
    are among them; otherwise only the base tells it.
    """
    out = Read()
    for module, tensors in modules.tuned.items():
        values, indices = take(module, tensors, ["shira_weight", "shira_indices"])
        expect(module, "shira_weight", values, None)
        expect(module, "shira_indices", indices, 2, values.numel())
        indices = indices.long()  # float32 in files saved on Windows
        if int(indices.min()) < 0:
            raise FormatError(f"{module}.shira_indices: {int(indices.min())} is negative")
        rows, cols = int(indices[0].max()) + 1, int(indices[1].max()) + 1
        if (rows + cols) * int(number(config, "r", config.get("r", 32))) == values.numel():
            out.deltas[f"{module}.weight"] = sorted_sparse(indices[0] * cols + indices[1], values, (rows, cols))
        else:
            parts = {"indices": indices.int(), "values": values}
            out.deltas[f"{module}.weight"] = NeedsBase("sparse", parts, {}, (0, 0))
    return out


def paca(modules: Modules, config: Mapping[str, Any]) -> Read:
    """W'[:, paca_indices] = scaling paca_w, scaling = paca_alpha / r: whole columns in place of the base's.

    The layout of the PEFT fork of PaCA's authors, arXiv 2503.01905: paca_w (out, r), paca_indices (r,).
    """
    out = Read()
    for module, tensors in modules.tuned.items():
        w, indices = take(module, tensors, ["paca_w", "paca_indices"])
        expect(module, "paca_w", w, None, None)
        expect(module, "paca_indices", indices, w.shape[1])
        settings = {"scaling": number(config, "paca_alpha", config.get("paca_alpha")) / w.shape[1]}
        parts = {"w": w, "indices": indices.int()}
        out.deltas[f"{module}.weight"] = NeedsBase("paca", parts, settings, (w.shape[0], 0))
    return out


def supertuning(modules: Modules, config: Mapping[str, Any]) -> Read:
    """Values scattered over the largest (or smallest) weights, and an optional LoRA pair beside them."""
    out = Read()
    pair = ["supertuning_lora_A.weight", "supertuning_lora_B.weight"]
    for module, tensors in modules.tuned.items():
        if "supertuning_indices" not in tensors:
            raise NeedsError(f"{module}: supertuning_indices is not stored, it ranks the entries of the base weight",
                             hint="save with save_precomputed_indices=True")
        names = ["supertuning_values", "supertuning_indices", *(pair if any(n in tensors for n in pair) else ())]
        values, indices, *factors = take(module, tensors, names)
        expect(module, "supertuning_indices", indices, values.numel())
        if not factors:
            parts = {"indices": indices, "values": values}
            out.deltas[f"{module}.weight"] = NeedsBase("sparse", parts, {}, (0, 0))
            continue
        a, b = factors
        expect(module, pair[1], b, None, a.shape[0])
        shape = (b.shape[0], a.shape[1])
        s = number(config, "lora_alpha", config.get("lora_alpha")) / a.shape[0]
        dw = Sum((sorted_sparse(indices, values, shape), LowRank(a, b, None, s, shape)), shape)
        out.deltas[f"{module}.weight"] = dw
    return out


def miss(modules: Modules, config: Mapping[str, Any]) -> Read:
    """One block repeated along the inputs ("mini": also along the outputs); "bat" multiplies the base by it."""
    init = str(config.get("init_weights")).lower()
    out = Read()
    for module, tensors in modules.tuned.items():
        name = "bone_block" if "bone_block" in tensors else "miss_block"
        (block,) = take(module, tensors, [name])
        key = f"{module}.weight"
        if init == "bat":
            expect(module, name, block, None, block.shape[-1], None)
            out.deltas[key] = NeedsBase("miss_bat", {"block": block}, {}, (block.shape[0] * block.shape[1], 0))
        else:
            expect(module, name, block, None, None)
            out.deltas[key] = NeedsBase("miss", {"block": block}, {}, (0 if init == "mini" else block.shape[1], 0))
    return out


def beft(modules: Modules, config: Mapping[str, Any]) -> Read:
    """b' = b + v: nothing but biases."""
    out = Read()
    for module, tensors in modules.tuned.items():
        (v,) = take(module, tensors, ["beft_bias"])
        expect(module, "beft_bias", v, 1, None)
        out.deltas[f"{module}.bias"] = Dense(v[0], 1.0, (v.shape[1],))
    return out


def ln_tuning(modules: Modules, config: Mapping[str, Any]) -> Read:
    """Replacements of whole normalisation layers."""
    out, prefix = Read(), "ln_tuning_layers."
    for module, tensors in modules.tuned.items():
        take(module, tensors, (), [f"{prefix}weight", f"{prefix}bias"])
        for param, t in tensors.items():
            name = f"{module}.{param.removeprefix(prefix)}"
            out.replaced[name], out.names[name] = t, f"{module}.{param}"
    return out


def tokens(modules: Modules, config: Mapping[str, Any]) -> Read:
    """Rows of an embedding; they are read with the other replacements."""
    return Read()
