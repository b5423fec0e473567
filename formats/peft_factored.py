"""PEFT types with factors of their own: AdaLoRA, LoHa, LoKr, DeLoRA, GraLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.delta import BaseFree, Dense, Hadamard, Kron, LowRank
from adaptc.errors import FormatError
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_parts import Read, expect, take
from adaptc.formats.peft_scale import number, pattern


def adalora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """B diag(E) A * alpha / (init_r + 1e-5); the divisor stays the initial rank after pruning."""
    first = number(config, "init_r", config.get("init_r", 12))
    alpha = number(config, "lora_alpha", config.get("lora_alpha") or 0)
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    out = Read()
    for module, tensors in modules.tuned.items():
        a, b, e = take(module, tensors, ["lora_A", "lora_B", "lora_E"], ("ranknum",))
        expect(module, "lora_A", a, None, None)
        expect(module, "lora_B", b, None, a.shape[0])
        expect(module, "lora_E", e, a.shape[0], 1)
        out.deltas[f"{module}.weight"] = LowRank(a, b, torch.diag(e[:, 0]), scale, (b.shape[0], a.shape[1]))
    return out


def loha(modules: Modules, config: Mapping[str, Any]) -> Read:
    """alpha/r (w1a w1b) o (w2a w2b); with Tucker cores t each side is sum_ij t[i, j] outer w_a[i] outer w_b[j]."""
    out = Read()
    for module, tensors in modules.tuned.items():
        tucker = "hada_t1" in tensors or "hada_t2" in tensors
        names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *(("hada_t1", "hada_t2") if tucker else ())]
        w1a, w1b, w2a, w2b, *cores = take(module, tensors, names)
        if tucker:
            left, right = _tucker(module, cores[0], w1a, w1b), _tucker(module, cores[1], w2a, w2b)
            out.notes += _narrow(module, left)
        else:
            left, right = _pair(module, "hada_w1", w1a, w1b), _pair(module, "hada_w2", w2a, w2b)
        if left.shape != right.shape:
            raise FormatError(f"{module}: hada_w1 spans {left.shape}, hada_w2 spans {right.shape}")
        rank = w1a.shape[0] if tucker else w1a.shape[1]
        out.deltas[f"{module}.weight"] = Hadamard(left, right, _scale(config, module, rank), left.shape)
    return out


def _pair(module: str, name: str, b: Tensor, a: Tensor) -> LowRank:
    expect(module, f"{name}_a", b, None, None)
    expect(module, f"{name}_b", a, b.shape[1], None)
    return LowRank(a, b, None, 1.0, (b.shape[0], a.shape[1]))


def _tucker(module: str, t: Tensor, w_a: Tensor, w_b: Tensor) -> LowRank:
    """dW[p, q, k, l] = sum_ij t[i, j, k, l] w_a[i, p] w_b[j, q]: rank r, b = w_a^T, a = t x w_b flattened.

    t: (r, r, kh, kw), for Conv1d (r, r, k, 1) with a weight of three dims; w_a: (r, out), w_b: (r, in).
    """
    expect(module, "hada_w_a", w_a, None, None)
    expect(module, "hada_w_b", w_b, w_a.shape[0], None)
    expect(module, "hada_t", t, w_a.shape[0], w_a.shape[0], None, None)
    a = torch.einsum("ijkl,jq->iqkl", t.double(), w_b.double())
    return LowRank(a.flatten(1), w_a.mT, None, 1.0, (w_a.shape[1], w_b.shape[1], *t.shape[2:]))


def _narrow(module: str, made: LowRank) -> list[str]:
    if made.shape[-1] != 1 or made.shape[-2] == 1:
        return []
    return [f"{module}: shape {made.shape} may be that of a Conv1d, whose file looks the same"]


def lokr(modules: Modules, config: Mapping[str, Any]) -> Read:
    """alpha/r kron(w1, w2), always alpha/r here; either side full, a pair, or (w2) a Tucker core with a pair."""
    out = Read()
    for module, tensors in modules.tuned.items():
        rank = next((tensors[n].shape[0] for n in ("lokr_w1_b", "lokr_w2_b") if n in tensors), None)
        r = int(number(config, "r", pattern(config.get("rank_pattern"), module, config.get("r"))))
        if rank not in (None, r):
            raise FormatError(f"{module}: adapter_config.json says rank {r}, lokr factors have rank {rank}")
        full1, full2, tucker = "lokr_w1" in tensors, "lokr_w2" in tensors, "lokr_t2" in tensors
        names = [*(["lokr_w1"] if full1 else ["lokr_w1_a", "lokr_w1_b"]),
                 *(["lokr_w2"] if full2 else ["lokr_w2_a", "lokr_w2_b", *(["lokr_t2"] if tucker else [])])]
        found = dict(zip(names, take(module, tensors, names), strict=True))
        left: LowRank | Dense = _whole(found["lokr_w1"]) if full1 else _pair(module, "lokr_w1", found["lokr_w1_a"],
                                                                             found["lokr_w1_b"])
        if full2:
            right: LowRank | Dense = _whole(found["lokr_w2"])
        elif tucker:  # t2 (r, r, k, k), w2_a (r, b), w2_b (r, d): the same Tucker form as LoHa
            right = _tucker(module, found["lokr_t2"], found["lokr_w2_a"], found["lokr_w2_b"])
            out.notes += _narrow(module, right)
        else:
            right = _pair(module, "lokr_w2", found["lokr_w2_a"], found["lokr_w2_b"])
        out.deltas[f"{module}.weight"] = _kron(left, right, _scale(config, module, r))
    return out


def _whole(w: Tensor) -> Dense:
    return Dense(w, 1.0, tuple(w.shape))


def _kron(left: LowRank | Dense, right: LowRank | Dense, scale: float) -> BaseFree:
    """Return kron(left, right) in the shape of the weight it changes.

    PEFT pads the two-dimensional side of a Conv1d on the left, so what was trained there is
    dW[(o2, o1), (i2, i1, k)] = w1[o1, i1] w2[o2, i2, k]: a Kronecker product with its columns permuted, kept as exact
    factors.
    """
    (a, c), (b, d, *kernel) = left.shape, right.shape
    shape = (a * b, c * d, *kernel)
    if len(kernel) != 1:
        return Kron(left, right, scale, shape)
    (b1, a1), (b2, a2) = _sides(left), _sides(right)
    columns = torch.einsum("sik,rc->srick", a2.reshape(-1, d, kernel[0]), a1)
    return LowRank(columns.flatten(2).flatten(0, 1), torch.kron(b2, b1), None, scale, shape)


def _sides(side: LowRank | Dense) -> tuple[Tensor, Tensor]:
    """Return float64 (b, a) with side = b @ a, one of them an identity for a full side."""
    if isinstance(side, LowRank):
        return side.factors()
    w = side.dense().flatten(1)
    eye = torch.eye(min(w.shape), dtype=torch.float64)
    return (w, eye) if w.shape[1] <= w.shape[0] else (eye, w)


def delora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """B diag(lambda / (r ||A_i|| ||B_:i||)) A diag(w_norm), norms at least 1e-4."""
    out = Read()
    for module, tensors in modules.tuned.items():
        a, b, lam, norm = take(module, tensors, ["delora_A", "delora_B", "delora_lambda", "delora_w_norm"])
        r = a.shape[0]
        expect(module, "delora_B", b, None, r)
        expect(module, "delora_lambda", lam, 1)
        expect(module, "delora_w_norm", norm, a.shape[1])
        size = a.double().norm(dim=1).clamp_min(1e-4) * b.double().norm(dim=0).clamp_min(1e-4)
        core = torch.diag(lam.double() / (r * size))
        out.deltas[f"{module}.weight"] = LowRank(a.double() * norm.double(), b, core, 1.0, (b.shape[0], a.shape[1]))
    return out


def gralora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """N x N blocks of rank r/N, block (p, n) = (A[n][:, p] B[p][n])^T; as one low-rank delta of rank N r.

    A: (N, in/N, r), B: (N, r, out/N); an optional ordinary pair of rank hybrid_r beside it. alpha / (r + hybrid_r).
    """
    out = Read()
    for module, tensors in modules.tuned.items():
        general = ["gralora_A_general.weight", "gralora_B_general.weight"]
        names = ["gralora_A", "gralora_B", *(general if any(n in tensors for n in general) else ())]
        ga, gb, *pair = take(module, tensors, names)
        n, width, r = ga.shape
        expect(module, "gralora_B", gb, n, r, None)
        if r % n:
            raise FormatError(f"{module}: rank {r} does not split into {n} blocks")
        q, height = r // n, gb.shape[2]
        a = torch.zeros(n, n, q, n, width, dtype=ga.dtype)  # (p, n, t, in block, in)
        b = torch.zeros(n, height, n, n, q, dtype=gb.dtype)  # (out block, out, p, n, t)
        for p in range(n):
            for i in range(n):
                a[p, i, :, i] = ga[i][:, p * q : (p + 1) * q].mT
                b[p, :, p, i] = gb[p][i * q : (i + 1) * q].mT
        fa, fb = a.reshape(n * r, n * width), b.reshape(n * height, n * r)
        hybrid = 0
        if pair:
            hybrid = pair[0].shape[0]
            expect(module, general[0], pair[0], None, n * width)
            expect(module, general[1], pair[1], n * height, hybrid)
            fa, fb = torch.cat([fa, pair[0]]), torch.cat([fb, pair[1]], 1)
        scale = number(config, "alpha", config.get("alpha")) / (r + hybrid)
        out.deltas[f"{module}.weight"] = LowRank(fa, fb, None, scale, (n * height, n * width))
    return out


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    promised = pattern(config.get("rank_pattern"), module, config.get("r"))
    if promised is not None and int(number(config, "r", promised)) != rank:
        raise FormatError(f"{module}: adapter_config.json says rank {promised}, factors have rank {rank}")
    return number(config, "alpha", pattern(config.get("alpha_pattern"), module, config.get("alpha", 8))) / rank

