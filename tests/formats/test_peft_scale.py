"""Rank and scale rules: what PEFT's own matcher says, and the mistakes other tools make with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import FormatError
from adaptc.formats.peft_scale import pattern, rules, says, scale
from adaptc.tensorfile import write_tensors

RULES = [{"q": 1}, {"^q": 1}, {"a.q": 1}, {r"layers\.[01]\.q": 1}, {"layers.1.q": 1, "q": 2}, {"k|q": 3},
         {"(?:x|a).q": 4}]
MODULES = ["q", "a.q", "aq", "layers.0.q", "layers.1.q", "layers.11.q", "k", "x.q", "layers.1.qq", "a_q"]


@pytest.mark.parametrize("patterns", RULES)
@pytest.mark.parametrize("module", MODULES)
def test_patterns_match_as_peft_matches_them(patterns: dict[str, int], module: str) -> None:
    peft = pytest.importorskip("peft.utils.other")
    key = peft.get_pattern_key(patterns.keys(), module)
    assert pattern(patterns, module, 9) == patterns.get(key, 9)


@pytest.mark.parametrize("modules", [
    {"q": (2, 1.5), "a.q": (2, 1.5)},
    {"q": (2, 1.5), "a.q": (3, 1.5)},
    {"q": (2, 1.5), "a.q": (3, 0.1), "b.a.q": (4, 0.1)},
    {"a.q": (1, 0.5), "a_q": (2, 0.5), "x.a_q": (3, 0.7)},  # a dot in a pattern fits any character
    {"a[0].q": (1, 0.5), "a[1].q": (2, 1 / 3)},
    {f"layers.{i}.q": (1 + i % 3, 0.3 / (1 + i)) for i in range(12)},
])
def test_written_rules_give_every_module_its_own_rank_and_scale(modules: dict[str, tuple[int, float]]) -> None:
    peft = pytest.importorskip("peft.utils.other")
    made = rules(modules, {})
    assert says(modules, made)
    for module, (rank, s) in modules.items():
        found = [made[f].get(peft.get_pattern_key(made[f].keys(), module), default)
                 for f, default in (("rank_pattern", made["r"]), ("alpha_pattern", made["lora_alpha"]))]
        assert found[0] == rank
        assert math.isclose(found[1] / rank, s, rel_tol=1e-14)


def test_rules_that_hold_are_left_as_they_were() -> None:
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"^q": 2}, "alpha_pattern": {}}
    assert rules({"q": (2, 6 / math.sqrt(2)), "k": (4, 3.0)}, config) == config
    assert rules({"q": (3, 1.0)}, config)["use_rslora"] is False


def test_the_plain_names_stay_readable_where_nothing_is_ambiguous() -> None:
    made = rules({"layers.0.q": (2, 1.0), "layers.1.q": (3, 1.0)}, {})
    assert made["rank_pattern"] == {"layers.0.q": 2}
    assert made["alpha_pattern"] == {"layers.0.q": 2}


def test_alpha_is_never_rounded() -> None:
    made = rules({"q": (3, 16 / 64)}, {})
    assert made["lora_alpha"] == 0.75
    assert rules({"q": (4, 1.0)}, {})["lora_alpha"] == 4
    assert isinstance(rules({"q": (4, 1.0)}, {})["lora_alpha"], int)


def test_a_config_that_lies_about_rank_is_refused() -> None:
    with pytest.raises(FormatError, match="says rank 8, lora_A has rank 4"):
        scale({"r": 8, "lora_alpha": 8}, "q", 4)


@pytest.mark.parametrize(("config", "want"), [
    ({"use_rslora": True}, 16 / 4.0),
    ({"alpha_pattern": {"q": 5}}, 5 / 16),
    ({"rank_pattern": {"q": 16}, "r": 64}, 1.0),
    ({"lora_alpha": 7}, 7 / 16),
])
def test_truncation_keeps_the_scale_others_change(config: dict[str, Any], want: float, tmp_path: Path) -> None:
    """Tools that set r and a rounded alpha change dW by sqrt(r/k), by the pattern, or by the rounding."""
    u, v = torch.linalg.qr(torch.randn(20, 16)).Q, torch.linalg.qr(torch.randn(24, 16)).Q
    sigma = torch.tensor([4.0, 3, 2, 1, *[0.0] * 12])
    whole = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q"], **config}
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(whole))
    with (tmp_path / "adapter_model.safetensors").open("wb") as f:
        write_tensors(f, {"base_model.model.q.lora_A.weight": v.T.contiguous(),
                          "base_model.model.q.lora_B.weight": u * sigma}, {})
    adapter = adaptc.load(tmp_path)
    dw = (u * sigma).double() @ v.T.double() * want
    assert torch.allclose(adapter.deltas["q.weight"].dense(), dw, atol=1e-6)
    cut = adaptc.compress(adapter, energy=1 - 1e-9)  # four directions: one too many, or too few, and the rank shows it
    out = adaptc.save(cut, tmp_path / "out")
    made = json.loads((out / "adapter_config.json").read_text())
    assert made["r"] == 4
    assert torch.allclose(adaptc.load(out).deltas["q.weight"].dense(), dw, atol=1e-6 * want * 4)
