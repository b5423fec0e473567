"""Distortion as the outputs see it: module weights from calibration, and the error they measure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from adaptc.calibration import Calibration, Split
from adaptc.quant.rd import Module
from adaptc.quant.rd_code import RateDistortion


def module_weights(modules: Mapping[str, Module], calibration: Calibration) -> dict[str, float]:
    """Return w with w_k^2 = g2_k E||dW_k x||^2 / ||dW_k||^2, scaled to mean square 1: what a unit of dW error costs.

    Between modules only. Whitening inside a module was measured not to help at a few thousand tokens. A module whose
    inputs are all zero gets the smallest weight of the others, not zero.
    """
    raw = {}
    for k, m in modules.items():
        b, a = torch.from_numpy(m.b), torch.from_numpy(m.a)
        energy = float(((b.double().mT @ b.double()) * (a.double() @ a.double().mT)).sum())
        ratio = calibration.output_energy(k, b, a) / energy if energy > 0 else 0.0
        raw[k] = math.sqrt(calibration.sensitivity(k) * ratio)
    least = min((v for v in raw.values() if v > 0), default=1.0)
    size = math.sqrt(sum(max(v, least) ** 2 for v in raw.values()) / max(len(raw), 1))
    return {k: max(v, least) / size for k, v in raw.items()}


def output_error(modules: Mapping[str, Module], code: RateDistortion, calibration: Calibration,
                 split: Split = "train") -> float:
    """Return sqrt(sum_k g2_k E||(dW_k - dW'_k) x||^2 / sum_k g2_k E||dW_k x||^2), measured on what the code decodes."""
    lost = total = 0.0
    made = code.decode()
    for k, m in modules.items():
        b, a = torch.from_numpy(m.b).double() * m.scale, torch.from_numpy(m.a).double()
        b2, a2, s2 = made[k]
        sensitivity = calibration.sensitivity(k)
        total += sensitivity * calibration.output_energy(k, b, a, split)
        both = torch.cat([b, -b2.double() * s2], 1), torch.cat([a, a2.double()], 0)
        lost += sensitivity * calibration.output_energy(k, *both, split)
    return math.sqrt(lost / total) if total else 0.0
