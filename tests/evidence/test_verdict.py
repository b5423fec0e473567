"""Each of the usual mistakes is told by its name, on a network whose outputs are not linear in the adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adaptc.adapter import Adapter, Origin
from adaptc.delta import LowRank
from adaptc.errors import UsageError
from adaptc.evidence.verdict import Runs, compare_source, judge

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
W, V = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)) / 4 for s in (1, 2))
LORA = LowRank(torch.randn(3, 16, generator=torch.Generator().manual_seed(3)) / 4,
               torch.randn(16, 3, generator=torch.Generator().manual_seed(4)) / 4, None, 1.0, (16, 16))


def outputs(lora: LowRank | None = None, scale: float = 1.0, w: Tensor = W) -> Tensor:
    dw = torch.zeros_like(w) if lora is None else lora.dense().float() * scale
    return torch.tanh(X @ (w + dw).T) @ V.T


def turned(lora: LowRank) -> LowRank:
    return replace(lora, b=lora.b.reshape(2, 2, 4, 3).transpose(1, 2).reshape(16, 3))


def runs(given: Tensor, without: Tensor | None = None) -> Runs:
    def expected(guess: str, scale: float) -> Tensor:
        return outputs(turned(LORA) if guess else LORA, scale)

    return Runs(outputs() if without is None else without, given, outputs(), expected, 1e-3, 1e-3,
                {"rows": "rows are turned"})


@pytest.mark.parametrize(("given", "without", "cause"), [
    (outputs(LORA), None, ""), (outputs(LORA) + 1e-6, None, ""), (outputs(), None, "no effect"),
    (outputs(LORA, 2.0), None, "wrong scale"), (outputs(LORA, 1 / 16), None, "wrong scale"),
    (outputs(LORA, -1.0), None, "wrong scale"), (outputs(turned(LORA)), None, "wrong permutation"),
    (outputs(LORA, w=V), outputs(w=V), "wrong base"),
    (outputs(replace(LORA, a=LORA.a.flip(1))), None, "other outputs")])
def test_mistakes(given: Tensor, without: Tensor | None, cause: str) -> None:
    assert judge(runs(given, without)).cause == cause


@pytest.mark.parametrize("scale", [2.0, 0.5, 8.0, -1.0, 1 / 16])
def test_the_factor_is_found_though_outputs_are_not_linear_in_it(scale: float) -> None:
    verdict = judge(runs(outputs(LORA, scale)))
    assert verdict.figures["scale"] == pytest.approx(scale, rel=1e-3)


def test_an_adapter_that_changes_nothing_is_no_evidence() -> None:
    nothing = replace(LORA, scale=0.0)
    with pytest.raises(UsageError, match="changes no output"):
        judge(Runs(outputs(), outputs(), outputs(), lambda _, s: outputs(nothing, s), 1e-3, 1e-3))


def one(delta: LowRank) -> Adapter:
    return Adapter({"q.weight": delta}, {}, Origin("peft"))


def signs(delta: LowRank) -> LowRank:
    """A with one bit, and B as it is: a coarse code whose scale is right."""
    return replace(delta, a=delta.a.sign() * delta.a.abs().mean(1, keepdim=True))


@pytest.mark.parametrize(("made", "cause"), [
    (LORA, ""), (signs(LORA), ""), (replace(LORA, scale=2.0), "wrong scale"),
    (replace(signs(LORA), scale=0.5), "wrong scale"), (turned(LORA), "wrong permutation"),
    (replace(LORA, a=LORA.a.flip(1)), "another adapter")])
def test_what_an_artefact_holds(made: LowRank, cause: str) -> None:
    back = replace(made, b=made.b.reshape(2, 4, 2, 3).transpose(1, 2).reshape(16, 3))
    assert compare_source(one(made), one(LORA), [("rows", one(back))]).cause == cause


def test_missing_modules() -> None:
    both = Adapter({"q.weight": LORA, "k.weight": LORA}, {}, Origin("peft"))
    assert compare_source(one(LORA), both).said.startswith("1 of 2 modules")
