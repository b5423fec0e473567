"""What attach refuses, how it says so, and that the model is untouched afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import lora, model, saved
from test_runtime import logits, state, unchanged
from torch import nn

import adaptc
from adaptc.adapter import Adapter, Origin
from adaptc.base import Base
from adaptc.delta import Dense, LowRank, NeedsBase, Sparse
from adaptc.fingerprint import stamped
from adaptc.tensorfile import write_tensors


class Own(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({
        "lin": nn.Linear(6, 4), "own": Own(6, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv2d(4, 4, 3, groups=2),
        "wide": nn.Linear(6, 4).double(), "attn": nn.MultiheadAttention(8, 2), "emb": nn.Embedding(9, 4),
    })  # fmt: skip


def low(m: int, n: int) -> LowRank:
    return LowRank(torch.randn(2, n), torch.randn(m, 2), None, 1.0, (m, n))


def adapter(**deltas: Any) -> Adapter:
    return Adapter({k.replace("__", "."): d for k, d in deltas.items()}, {}, Origin("peft"))


CASES: dict[str, tuple[Callable[[], Adapter], str]] = {
    "name": (lambda: adapter(lin__weight=low(4, 6), gone__weight=low(4, 6), far__weight=low(4, 6)),
             "gone.weight: the model has no such parameter, nor 1 others of 3"),
    "shape": (lambda: adapter(lin__weight=low(4, 7)),
              r"lin.weight: adapter is for shape \(4, 7\), the layer has \(4, 6\)"),
    "forward": (lambda: adapter(own__weight=low(4, 6)), "own.weight: an adapter cannot run beside Own"),
    "norm": (lambda: adapter(norm__weight=Dense(torch.ones(4), 1.0, (4,))),
             "norm.weight: an adapter cannot run beside LayerNorm"),
    "groups": (lambda: adapter(conv__weight=low(4, 18)), "conv.weight: an adapter cannot run beside Conv2d"),
    "dtype": (lambda: adapter(wide__weight=low(4, 6)), "wide.weight: weight has dtype torch.float64, the kernels take"),
    "attention": (lambda: adapter(attn__out_proj__weight=low(8, 8)),
                  "attn.out_proj.weight: attn reads this weight without calling attn.out_proj"),
    "kind": (lambda: adapter(lin__weight=NeedsBase("ia3", {"l": torch.ones(4)}, {"axis": 0}, (4, 6))),
             "lin.weight: ia3 changes the base weight itself and does not run beside it"),
    "sparse embedding": (
        lambda: adapter(emb__weight=Sparse(torch.tensor([3]), torch.ones(1), 1.0, (9, 4))),
        "emb.weight: a sparse delta does not run beside a layer of kind embedding"),
    "magnitude": (
        lambda: adapter(lin__weight=NeedsBase("dora", {"magnitude": torch.ones(3)}, {}, (4, 6), low(4, 6))),
        "lin.weight: magnitude has 3 entries for 4 outputs"),
    "replaced": (lambda: Adapter({}, {"norm.weight": torch.ones(5)}, Origin("peft")),
                 r"norm.weight: adapter replaces it by \(5,\), the model has \(4,\)"),
    "empty": (lambda: adapter(), "adapter changes no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    made, message = CASES[case]
    torch.manual_seed(1)
    m = net()
    before = state(m)
    with pytest.raises(adaptc.AdaptcError, match=message):
        adaptc.attach(m, made())
    unchanged(m, before)
    with pytest.raises(adaptc.AdaptcError, match="no adapter is attached"):
        adaptc.detach(m)


def test_hints() -> None:
    """The part of the model that the names fit, or the prefix they carry too many."""
    inner = nn.Sequential(nn.Linear(6, 4))
    outer = nn.ModuleDict({"net": inner})
    with pytest.raises(adaptc.AdaptcError) as short:
        adaptc.attach(outer, Adapter({"0.weight": low(4, 6)}, {}, Origin("peft")))
    assert short.value.hint == "its names fit model.net: attach to that"
    long = Adapter({"net.0.weight": low(4, 6)}, {}, Origin("peft"))
    with pytest.raises(adaptc.AdaptcError) as found:
        adaptc.attach(inner, long)
    assert found.value.hint == "its names carry the prefix 'net.' that this model lacks: pass prefix='net.'"
    adaptc.attach(inner, long, prefix="net.")


def test_fingerprint(tmp_path: Path) -> None:
    """An adapter for the same names and shapes but other weights is refused, whatever the float it is held in."""
    saved("llama", tmp_path)
    m = model("llama")
    weights = {k: v.contiguous() for k, v in m.state_dict().items()}
    with (tmp_path / "base.safetensors").open("wb") as out:
        write_tensors(out, weights, {})
    made = stamped(adaptc.load(tmp_path), Base(tmp_path / "base.safetensors"))
    adaptc.attach(m, made)
    adaptc.detach(m)
    adaptc.attach(m.bfloat16(), made)
    other = replace(made, origin=replace(made.origin, fingerprint="0123456789abcdef"))
    m = model("llama")
    before = state(m)
    with pytest.raises(adaptc.AdaptcError, match=r"fingerprint [0-9a-f]{16}, .* made for 0123456789abcdef"):
        adaptc.attach(m, other)
    unchanged(m, before)


def test_selection(tmp_path: Path) -> None:
    """Unknown names, names twice, and tensors that rows or adapters would have to share."""
    config = lora("bert", modules_to_save=["classifier"])
    m = model("bert")
    for i, name in enumerate("ab"):
        saved("bert", tmp_path / name, seed=i, config=config)
        adaptc.attach(m, tmp_path / name, name)
    alone = logits(m)
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: adaptc.set_active(m, "z"), r"no adapter z is attached \(attached: a, b\)"),
        (lambda: adaptc.set_active(m, ["a", "a"]), "adapters a, a are not all different"),
        (lambda: adaptc.set_active(m, ["a", "b"]), "classifier.bias: adapters a and b both replace it"),
        (lambda: adaptc.set_active(m, each=["a", None]), "classifier.bias: adapter a changes this tensor itself"),
        (lambda: adaptc.set_active(m, "a", each=["a"]), "names and each exclude one another"),
        (lambda: adaptc.attach(m, tmp_path / "a", "a"), "an adapter a is attached already"),
        (lambda: adaptc.attach(m, tmp_path / "a", "c", sparse="no"), "sparse is 'no', not 'side' or 'switch'"),
        (lambda: adaptc.detach(m, "z"), "no adapter z is attached"),
    ]
    for call, message in refusals:
        with pytest.raises(adaptc.AdaptcError, match=message):
            call()
        assert torch.equal(logits(m), alone)  # b is active still
    adaptc.set_active(m, each=["b", "b"])
    assert torch.equal(logits(m), alone)


def test_forced_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are asked for and cannot run say so, and name the layer."""
    lin = nn.ModuleDict({"lin": nn.Linear(6, 4)})
    adaptc.attach(lin, adapter(lin__weight=low(4, 6)))
    monkeypatch.setenv("ADAPTC_KERNELS", "fast")
    with pytest.raises(adaptc.AdaptcError, match="lin: ADAPTC_KERNELS is fast, not one of auto, naive, triton, native"):
        lin["lin"](torch.randn(2, 6))
