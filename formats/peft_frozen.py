"""PEFT types that train little on top of frozen projections: VeRA, PVeRA, RandLoRA, VB-LoRA, TinyLoRA, Uni-LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import FormatError, NeedsError, UnsupportedError
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_parts import Read, expect, take
from adaptc.formats.peft_scale import number


def vera(modules: Modules, config: Mapping[str, Any]) -> Read:
    """diag(lambda_b) B[:out] diag(lambda_d) A[:, :in]; how wide a module is, only the base tells."""
    a, b = _projections(modules, "vera_A", "vera_B")
    out = Read()
    for module, tensors in modules.tuned.items():
        lambda_b, lambda_d = take(module, tensors, ["vera_lambda_b", "vera_lambda_d"])
        _vera(out, module, lambda_b, lambda_d, {"a": ("vera_A", a), "b": ("vera_B", b)})
    return out


def pvera(modules: Modules, config: Mapping[str, Any]) -> Read:
    """VeRA with the first r rows of A and lambda_d; the other r are log-variances, sampled in training only."""
    a, b = _projections(modules, "pvera_A", "pvera_B")
    r = b.shape[1]
    if a.shape[0] != 2 * r:
        raise FormatError(f"pvera_A has {a.shape[0]} rows for rank {r}, expected {2 * r}")
    out = Read()
    for module, tensors in modules.tuned.items():
        lambda_b, lambda_d = take(module, tensors, ["pvera_lambda_b", "pvera_lambda_d"])
        expect(module, "pvera_lambda_d", lambda_d, 2 * r)
        _vera(out, module, lambda_b, lambda_d[:r], {"a": ("pvera_A", a[:r]), "b": ("pvera_B", b)})
    out.notes.append("pvera: log-variances of the sampling are left out, as in inference")
    return out


def _vera(out: Read, module: str, lambda_b: Tensor, lambda_d: Tensor, shared: Mapping[str, tuple[str, Tensor]]) -> None:
    (_, a), (_, b) = shared["a"], shared["b"]
    expect(module, "lambda_b", lambda_b, None)
    expect(module, "lambda_d", lambda_d, a.shape[0])
    if lambda_b.numel() > b.shape[0]:
        raise FormatError(f"{module}: {lambda_b.numel()} outputs, the shared B has {b.shape[0]}")
    parts = {"lambda_b": lambda_b, "lambda_d": lambda_d}
    names = {n: key for n, (key, _) in shared.items()}
    out.deltas[f"{module}.weight"] = NeedsBase("vera", parts, {"shared": names}, (lambda_b.numel(), 0))
    out.extra |= dict(shared.values())


def randlora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """A sum of randomised bases; the copies that PEFT repeats under every module are checked and skipped."""
    a, b = _projections(modules, "randlora_A", "randlora_B", dims=3)
    out = Read()
    scale = number(config, "randlora_alpha", config.get("randlora_alpha")) / number(config, "r", config.get("r"))
    for module, tensors in modules.tuned.items():
        for name, shared in (("randlora_A", a), ("randlora_B", b)):
            if name in tensors and not torch.equal(tensors[name], shared):
                raise FormatError(f"{module}.{name}: differs from the shared base.{name}")
        lam, gamma = take(module, tensors, ["randlora_lambda", "randlora_gamma"], ("randlora_A", "randlora_B"))
        expect(module, "randlora_lambda", lam, a.shape[0], gamma.shape[0])
        settings = {"scale": scale, "shared": {"a": "randlora_A", "b": "randlora_B"}}
        out.deltas[f"{module}.weight"] = NeedsBase("randlora", {"lambda": lam, "gamma": gamma}, settings, (0, 0))
    out.extra |= {"randlora_A": a, "randlora_B": b}
    return out


def vblora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """A and B are made of vectors mixed from one bank; a mixture weights the top k logits, or stored weights."""
    if "vblora_vector_bank" not in modules.shared:
        raise FormatError("vblora_vector_bank is missing")
    bank = modules.shared.pop("vblora_vector_bank").double()  # (count, v)
    k = int(number(config, "topk", config.get("topk", 2)))
    out = Read()
    for module, tensors in modules.tuned.items():
        mixed = []
        for side in ("vblora_logits_A", "vblora_logits_B"):
            if side in tensors:
                top = tensors[side].double().topk(k, dim=-1)
                weights, indices = top.values.softmax(-1), top.indices
            else:
                names = [f"{side}_topk_weights", f"{side}_topk_indices"]
                given, indices = take(module, {n: t for n, t in tensors.items() if n in names}, names)
                given, indices = given.double(), indices.long()
                weights = torch.cat([given, 1 - given.sum(-1, keepdim=True)], -1)
            if indices.numel() and int(indices.max()) >= bank.shape[0]:
                raise FormatError(f"{module}.{side}: points at vector {int(indices.max())} of {bank.shape[0]}")
            mixed.append((weights[..., None] * bank[indices]).sum(-2))  # (r, in/v, v) or (out/v, r, v)
        ends = ("", "_topk_weights", "_topk_indices")
        take(module, tensors, (), [f"vblora_logits_{side}{end}" for side in "AB" for end in ends])
        a = mixed[0].flatten(1)
        b = mixed[1].transpose(1, 2).flatten(0, 1)
        if a.shape[0] != b.shape[1]:
            raise FormatError(f"{module}: lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}")
        out.deltas[f"{module}.weight"] = LowRank(a, b, None, 1.0, (b.shape[0], a.shape[1]))
    return out


def tinylora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """B (sum_i v_i P_i) A with v shared by groups of modules.

    The group follows from a module's place in the model, which the file does not keep; its P was drawn with the seed
    plus that place, so the place is found by drawing again and comparing bit for bit.
    """
    vectors = {n.split(".")[-1]: modules.shared.pop(n) for n in list(modules.shared) if n.startswith("tinylora_v.")}
    if not vectors:
        raise FormatError("tinylora_v is missing")
    count = len(modules.tuned)
    tying = number(config, "weight_tying", config.get("weight_tying") or 0.0)
    groups = max(1, round(count * (1 - tying)))
    if groups != len(vectors):
        raise FormatError(f"{count} modules with weight_tying {tying:g} make {groups} vectors, file has {len(vectors)}")
    out = Read()
    for module, tensors in modules.tuned.items():
        if "tinylora_P" not in tensors:
            raise UnsupportedError(f"{module}: tinylora_P is not stored, it follows from the order of modules")
        a, b, p = take(module, tensors, ["tinylora_A", "tinylora_B", "tinylora_P"])
        r = a.shape[0]
        expect(module, "tinylora_B", b, None, r)
        expect(module, "tinylora_P", p, None, r, r)
        place = 0 if groups == 1 else _place(module, p, count, int(config.get("projection_seed", 42)))
        v = vectors[str(min(place // max(1, count // groups), groups - 1))]
        expect(module, "tinylora_v", v, p.shape[0])
        core = torch.einsum("i,ijk->jk", v.double(), p.double())
        out.deltas[f"{module}.weight"] = LowRank(a, b, core, 1.0, (b.shape[0], a.shape[1]))
    return out


def _place(module: str, p: Tensor, count: int, seed: int) -> int:
    u, r, _ = p.shape
    for place in range(count):
        drawn = torch.normal(0.0, r**-0.5, (u, r, r), generator=torch.Generator().manual_seed(seed + place))
        if torch.equal(drawn.to(p.dtype), p):
            return place
    raise UnsupportedError(f"{module}: tinylora_P is not what seed {seed} draws, so its vector cannot be told")


def unilora(modules: Modules, config: Mapping[str, Any]) -> Read:
    """A = theta[indices_A] o scales_A, B likewise; refused when the indices were left to be drawn again."""
    if "unilora_theta_d" not in modules.shared:
        raise FormatError("unilora_theta_d is missing")
    if not modules.tuned:
        raise NeedsError("UNILORA without stored indices: they follow from the order and shapes of the model's modules",
                         hint="save with save_indices=True")
    theta = modules.shared.pop("unilora_theta_d")
    out = Read()
    for module, tensors in modules.tuned.items():
        ia, ib, sa, sb = take(module, tensors, ["unilora_indices_A", "unilora_indices_B", "unilora_scales_A",
                                                "unilora_scales_B"])
        for side, index, scales in (("A", ia, sa), ("B", ib, sb)):
            expect(module, f"unilora_scales_{side}", scales, *index.shape)
            if int(index.min()) < 0 or int(index.max()) >= theta.numel():
                raise FormatError(f"{module}.unilora_indices_{side}: outside the {theta.numel()} entries of theta")
        a, b = theta[ia.long()] * sa, theta[ib.long()] * sb
        if a.shape[0] != b.shape[1]:
            raise FormatError(f"{module}: A has rank {a.shape[0]}, B has rank {b.shape[1]}")
        out.deltas[f"{module}.weight"] = LowRank(a, b, None, 1.0, (b.shape[0], a.shape[1]))
    return out


def _projections(modules: Modules, *names: str, dims: int = 2) -> list[Tensor]:
    found = []
    for name in names:
        if name not in modules.shared:
            raise NeedsError(f"{name} is not stored (save_projection was off); its random stream depends on the base's "
                             "widest module and on the machine", hint="save with save_projection=True")
        found.append(modules.shared.pop(name))
        expect("base_model", name, found[-1], *[None] * dims)
    return found
