"""One rank and one alpha for a whole file: what trainers demand whose checkpoints store neither."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import pad

from adaptc.delta import LowRank
from adaptc.errors import FormatError, NeedsError
from adaptc.formats.flat_yaml import Scalar
from adaptc.formats.peft_write import stored
from adaptc.formats.source import Source


def alpha_of(source: Source, config: Mapping[str, Scalar], where: str) -> float:
    """Return lora_alpha: --alpha, else the config's. Raises NeedsError naming where it would be."""
    value = config.get("lora_alpha") if source.alpha is None else source.alpha
    if value is None:
        raise NeedsError(f"{source.file.name}: this file cannot tell its scale, and {where} is not beside it",
                         hint="pass --alpha (lora_alpha of the training run)")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise FormatError(f"lora_alpha beside {source.file.name} is {value!r}, not a number")
    return float(value)


def one_rank(factors: Mapping[str, LowRank], alpha: float, uniform: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (a, b) of every delta so that alpha / rank is its scale: alpha stays, b takes what is left.

    With `uniform`, ranks are brought to the largest by zero rows and columns, which change nothing.
    """
    most = max((d.rank for d in factors.values()), default=0)
    out = {}
    for key, d in factors.items():
        a, b = stored(d)
        rank = most if uniform else d.rank
        if alpha / rank != d.scale:
            b = (b.double() * (d.scale * rank / alpha)).to(b.dtype)
        out[key] = padded(a, b, rank)
    return out


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a (..., rank, n), b (..., m, rank) with the same product: zero rows and columns for what is missing."""
    missing = rank - a.shape[-2]
    return (pad(a, (0, 0, 0, missing)), pad(b, (0, missing))) if missing else (a, b)
