"""PEFT types that change the base weight itself: read as base-dependent deltas, resolved by adaptc.resolve."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from adaptc.delta import LowRank, NeedsBase
from adaptc.errors import FormatError, UnsupportedError
from adaptc.formats.patterns import fits
from adaptc.formats.peft_keys import Modules
from adaptc.formats.peft_parts import Read, expect, flag, take
from adaptc.formats.peft_scale import number

Config = Mapping[str, Any]
One = Callable[[Read, str, Mapping[str, Tensor], Config], None]


def each(read: One) -> Callable[[Modules, Config], Read]:
    """Return the reader of a file that applies `read` to one module after the other."""
    def whole(modules: Modules, config: Config) -> Read:
        out = Read()
        for module, tensors in modules.tuned.items():
            read(out, module, tensors, config)
        return out

    return whole


def ia3(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = W0 o l on inputs of feedforward modules, else on outputs and on the bias, if there is one."""
    (scaling,) = take(module, tensors, ["ia3_l"])
    dims = max(scaling.dim(), 2)
    inputs = _feedforward(module, scaling, config)
    width = scaling.numel()
    if width not in scaling.shape:
        raise FormatError(f"{module}.ia3_l: shape {tuple(scaling.shape)}, expected one vector")
    shape = (0, width, *[0] * (dims - 2)) if inputs else (width, *[0] * (dims - 1))
    out.deltas[f"{module}.weight"] = NeedsBase("ia3", {"l": scaling.reshape(-1)}, {"axis": int(inputs)}, shape)


def _feedforward(module: str, scaling: Tensor, config: Config) -> bool:
    """Return whether the vector scales inputs: by the config, checked against its shape (1, in) or (out, 1)."""
    names = config.get("feedforward_modules")
    by_shape = scaling.shape[0] == 1 if scaling.dim() == 2 and scaling.numel() > 1 else None
    if isinstance(names, str):
        found: bool | None = fits(f"^(?:{names})", module)
    else:
        found = any(module.endswith(n) for n in names) if names is not None else by_shape
    if found is None or (by_shape is not None and by_shape != found):
        raise FormatError(f"{module}.ia3_l: shape {tuple(scaling.shape)} disagrees with feedforward_modules")
    return found


def hra(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = W0 times r reflections."""
    (u,) = take(module, tensors, ["hra_u"])
    expect(module, "hra_u", u, None, None)
    settings = {"orthogonal": flag(config, "apply_GS")}
    out.deltas[f"{module}.weight"] = NeedsBase("hra", {"u": u}, settings, (0, u.shape[0]))


def oft(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = W0 with blocks of inputs rotated; layouts before PEFT 0.14 and the series of 0.18 and before are refused."""
    if "oft_r" in tensors or "oft_r.weight" in tensors:
        raise UnsupportedError(f"{module}.oft_r: the layout before PEFT 0.14 rotates another axis")
    if any(name.startswith("oft_embedding_R") for name in tensors):
        raise UnsupportedError(f"{module}.oft_embedding_R: rotated embeddings are not checked against PEFT")
    (r,) = take(module, tensors, ["oft_R.weight"])
    expect(module, "oft_R.weight", r, None, None)
    if flag(config, "coft"):
        raise UnsupportedError(f"{module}: OFT with coft projects its rotation, which is not checked against PEFT")
    terms = None
    if flag(config, "use_cayley_neumann", True):
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
        if version is None or (int(version[1]), int(version[2])) < (0, 18):
            raise UnsupportedError(f"{module}: OFT's Neumann series changed with PEFT 0.18 and this file is of "
                                   f"{config.get('peft_version') or 'an unknown version'}")
        terms = int(number(config, "num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5)))
        if terms < 1:
            raise FormatError(f"num_cayley_neumann_terms is {terms}")
    b = round((1 + (1 + 8 * r.shape[1]) ** 0.5) / 2)
    width = 0 if flag(config, "block_share") else r.shape[0] * b
    out.deltas[f"{module}.weight"] = NeedsBase("oft", {"R": r}, {"terms": terms}, (0, width))


def boft(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = s o (W0 with blocks of inputs rotated), one butterfly factor."""
    r, s = take(module, tensors, ["boft_R", "boft_s"])
    if r.dim() == 4 and r.shape[0] != 1:
        raise UnsupportedError(f"{module}: BOFT with {r.shape[0]} butterfly factors is not checked against PEFT")
    expect(module, "boft_R", r, 1, None, r.shape[-1], None)
    width = r.shape[1] * r.shape[2]
    out.deltas[f"{module}.weight"] = NeedsBase("boft", {"R": r, "s": s.reshape(-1)}, {}, (s.numel(), width))


def road(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Rotated and scaled outputs, weight and bias alike."""
    theta, alpha = take(module, tensors, ["road_theta", "road_alpha"])
    expect(module, "road_theta", theta, None)
    expect(module, "road_alpha", alpha, theta.numel())
    variant = config.get("variant", "road_1")
    half = {"road_1": 4, "road_2": 2, "road_4": 1}.get(variant)
    if half is None:
        raise UnsupportedError(f"ROAD variant {variant} is not known (known: road_1, road_2, road_4)")
    width = theta.numel() * half // 2
    settings = {"variant": variant, "group": int(number(config, "group_size", config.get("group_size", 64)))}
    out.deltas[f"{module}.weight"] = NeedsBase("road", {"theta": theta, "alpha": alpha}, settings, (width, 0))


def hira(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = W0 o (1 + B A), no alpha."""
    if "hira_embedding_A" in tensors or "hira_embedding_B" in tensors:
        a, b = take(module, tensors, ["hira_embedding_A", "hira_embedding_B"])  # (r, vocab), (dim, r)
        expect(module, "hira_embedding_B", b, None, a.shape[0])
        shape: tuple[int, ...] = (a.shape[1], b.shape[0])
        inner = LowRank(b.mT, a.mT, None, 1.0, shape)
    else:
        a, b = take(module, tensors, ["hira_A", "hira_B"])
        if b.shape[1] != a.shape[0]:
            raise FormatError(f"{module}: hira_B has rank {b.shape[1]}, hira_A has rank {a.shape[0]}")
        shape = (b.shape[0], *a.shape[1:])
        inner = LowRank(a.flatten(1), b.flatten(1), None, 1.0, shape)
    out.deltas[f"{module}.weight"] = NeedsBase("hira", {}, {}, shape, inner)


def glora(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """W' = W0 + W0 o A + B, b' = b + b o D + E + W0 C; a path is a product, a vector, a scalar or zero."""
    paths = {n.removeprefix("glora_"): t for n, t in tensors.items()}
    for letter in "ABCDE":
        mine = {n for n in paths if n.startswith(f"{letter}.")}
        if mine not in ({f"{letter}.Xd", f"{letter}.Xu"}, {f"{letter}.X"}, {f"{letter}.zeros"}):
            raise FormatError(f"{module}: glora_{letter} is {', '.join(sorted(mine)) or 'missing'}")
    if any(not n.startswith(tuple(f"{x}." for x in "ABCDE")) for n in paths):
        raise UnsupportedError(f"{module}: {', '.join(sorted(tensors))} are not all known GLoRA paths")
    live = {n: t for n, t in paths.items() if not n.endswith("zeros")}
    shapes: list[tuple[int, ...]] = [(paths[f"{x}.Xd"].shape[0], paths[f"{x}.Xu"].shape[1]) for x in "AB"
                                     if f"{x}.Xd" in paths]
    shapes += [tuple(paths[f"{x}.zeros"].shape) for x in "AB" if f"{x}.zeros" in paths]
    width = shapes[0] if shapes else (0, 0)
    out.deltas[f"{module}.weight"] = NeedsBase("glora", live, {}, width)


def deft(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """A subspace of W0's outputs removed, and replaced by a trained part unless para is set."""
    para, method = flag(config, "para"), config.get("decomposition_method")
    if method not in ("qr", "relu"):
        raise UnsupportedError(f"DEFT decomposition_method {method} is not known (known: qr, relu)")
    p, *r = take(module, tensors, ["deft_P"] if para else ["deft_P", "deft_R"])
    expect(module, "deft_P", p, None, None)
    alpha = config.get("alpha")
    settings = {"method": method, "scale": number(config, "alpha", alpha) / p.shape[1] if alpha else 1.0}
    width = 0
    if r:
        expect(module, "deft_R", r[0], p.shape[1], None)
        width = r[0].shape[1]
    parts = {"P": p} | ({"R": r[0]} if r else {})
    out.deltas[f"{module}.weight"] = NeedsBase("deft", parts, settings, (p.shape[0], width))


def osf(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Everything of W0 below its top singular directions replaced."""
    names = ["U_low", "S_low", "V_low"]
    u, s, v = take(module, tensors, [f"osf_svd_params.{n}" for n in names])
    expect(module, "U_low", u, None, s.numel())
    expect(module, "V_low", v, s.numel(), None)
    shape = (u.shape[0], v.shape[1])
    out.deltas[f"{module}.weight"] = NeedsBase("osf", dict(zip(names, (u, s, v), strict=True)), {}, shape)


def peanut(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """A small network over the columns of W0."""
    depth = int(number(config, "depth", config.get("depth", 0)))
    if config.get("act_fn", "relu") != "relu":
        raise UnsupportedError(f"PEANUT with {config.get('act_fn')}: only relu is checked against PEFT")
    layers = [f"{side}.{i}" for side in ("encoders", "decoders") for i in range(depth)]
    a, b, *inside = take(module, tensors, [f"peanut_{n}.weight" for n in ("A", "B", *layers)])
    expect(module, "peanut_B", b, None, a.shape[0])
    settings = {"depth": depth, "scaling": number(config, "scaling", config.get("scaling", 1.0))}
    parts = {"A": a, "B": b, **dict(zip(layers, inside, strict=True))}
    out.deltas[f"{module}.weight"] = NeedsBase("peanut", parts, settings, (b.shape[0], 0))


def psoft(out: Read, module: str, tensors: Mapping[str, Tensor], config: Config) -> None:
    """A rotation within the top singular subspace of W0; alpha cancels."""
    if config.get("psoft_svd", "full") != "full":
        raise UnsupportedError(f"PSOFT with psoft_svd {config.get('psoft_svd')}: a seeded sketch of W0 is not portable")
    vectors = [n for n in ("a", "b") if f"psoft_R.vector_{n}" in tensors]
    r, *given = take(module, tensors, ["psoft_R.weight", *(f"psoft_R.vector_{n}" for n in vectors)])
    neumann = flag(config, "use_cayley_neumann")
    terms = int(number(config, "terms", config.get("num_cayley_neumann_terms", 5))) if neumann else None
    settings = {"orthogonal": flag(config, "psoft_orth", True), "terms": terms,
                "limit": config.get("cayley_neumann_eps"), "root": config.get("ab_svd_init") == "pissa_init"}
    parts = {"R": r, **dict(zip(vectors, given, strict=True))}
    out.deltas[f"{module}.weight"] = NeedsBase("psoft", parts, settings, (0, 0))


def frod(modules: Modules, config: Config) -> Read:
    """W' = U (S + diag l) V^T with V and the pattern of S shared by all modules of the same name."""
    out, shared = Read(), modules.shared
    for module, tensors in modules.tuned.items():
        l, values = take(module, tensors, ["frod_lambda_l", "frod_lambda_s_values"])  # noqa: E741
        category = module.rpartition(".")[2]
        if f"frod_V.{category}" not in shared or f"frod_s_indices.{category}" not in shared:
            raise UnsupportedError(f"{module}: frod_V.{category} is not stored (save_projection was off)")
        names = {"V": f"frod_V.{category}", "indices": f"frod_s_indices.{category}"}
        v, indices = (shared[n] for n in names.values())
        expect(module, f"frod_V.{category}", v, l.numel(), l.numel())
        expect(module, f"frod_s_indices.{category}", indices, 2, values.numel())
        out.extra |= {n: shared[n] for n in names.values()}
        parts = {"l": l, "values": values}
        out.deltas[f"{module}.weight"] = NeedsBase("frod", parts, {"shared": names}, (0, l.numel()))
    for name in [n for n in shared if n.startswith(("frod_V.", "frod_s_indices.", "frod_s_size."))]:
        del shared[name]
    return out
