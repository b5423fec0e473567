"""The pass on small models: budgets, bases, trained adapters, errors at the outputs, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file  # noqa: TID251

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.base import Base
from adaptc.calibration import Calibration, write_calibration
from adaptc.delta import LowRank, Sparse
from adaptc.errors import AdaptcError, FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.fingerprint import fingerprint
from adaptc.passes import Context
from adaptc.quant.grid import grid_of, round_to_nearest
from adaptc.quant.qwha import QWHA, rounded
from adaptc.quant.qwha_base import layers, rewritten
from adaptc.spec import parse
from adaptc.spectral import Spectral

SHAPES = {"model.a.weight": (40, 96), "model.b.weight": (96, 64), "model.c.weight": (32, 96)}


class Toy:
    """A folder with a base of three layers and statistics of correlated inputs, the second split kept aside."""

    def __init__(self, folder: Path, about: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(0)
        self.folder = folder / "base"
        self.folder.mkdir(parents=True)
        weights = {k: (torch.randn(*s, generator=g) * 0.05).to(dtype) for k, s in SHAPES.items()}
        weights |= {"model.norm.weight": torch.ones(96, dtype=dtype), "lm_head.weight": torch.randn(7, 96, generator=g)}
        save_file(weights, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text('{"model_type": "toy", "_name_or_path": "maker/toy"}')
        self.inputs = {}
        for split in ("train", "held"):
            for n in (96, 64):
                mix = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
                self.inputs[split, n] = (torch.randn(400, n, generator=g) @ mix).double()
        moments = {s: {k: self.inputs[s, m[1]].T @ self.inputs[s, m[1]] / 400 for k, m in SHAPES.items()}
                   for s in ("train", "held")}
        train = moments["train"] | {"lm_head.weight": moments["train"]["model.a.weight"]}
        write_calibration(folder / "stats.safetensors", train,
                          {"tokens": 400, "held_tokens": 400} if about is None else about, held=moments["held"])
        self.base, self.calibration = Base(self.folder), Calibration(folder / "stats.safetensors")
        self.ctx = Context(self.base, self.calibration, jobs=1)

    def zero(self) -> Adapter:
        return layers(self.base, self.calibration, None)

    def outputs(self, key: str, left: torch.Tensor, target: torch.Tensor, split: str = "train") -> float:
        x = self.inputs[split, left.shape[1]]
        return float((left @ x.T).norm() / (target @ x.T).norm())


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


@pytest.mark.parametrize("quant", ["int2", "int3", "nf4"])
@pytest.mark.parametrize("gptq", [False, True])
def test_errors_are_those_of_the_outputs_on_both_splits(toy: Toy, quant: str, gptq: bool) -> None:
    outcome, found = QWHA(quant=quant, rank_budget=3, gptq=gptq, group=32).measured(toy.zero(), toy.ctx)
    assert list(found) == list(SHAPES)
    for key, made in found.items():
        delta, w0 = outcome.adapter.deltas[key], toy.base[key]
        wq = round_to_nearest(w0, grid_of(quant, 32)).double()
        assert isinstance(delta, Spectral)
        m, n = delta.shape
        assert delta.values.numel() == 3 * (m + n)
        if not gptq:
            target = w0.double() - wq
            left = target - delta.dense()
            for split in ("train", "held"):
                assert made.outputs[split] == pytest.approx(toy.outputs(key, left, target, split), rel=1e-4)
            assert made.error == pytest.approx(float(left.norm() / target.norm()), rel=1e-9)
        assert made.outputs["train"] < 0.95
    assert outcome.adapter.history[-1].spec == str(QWHA(quant=quant, rank_budget=3, gptq=gptq, group=32))


def test_the_forward_of_both_parts_is_that_of_the_sum(toy: Toy) -> None:
    delta = QWHA(quant="int3", rank_budget=4)(toy.zero(), toy.ctx).adapter.deltas["model.a.weight"]
    wq = round_to_nearest(toy.base["model.a.weight"], grid_of("int3", 64)).double()
    x = toy.inputs["train", 96][:5]
    torch.testing.assert_close(x @ wq.T + delta.apply(x), x @ (wq + delta.dense()).T, rtol=1e-10, atol=1e-10)


def test_more_coefficients_and_better_choices_leave_less(toy: Toy) -> None:
    def total(**options: Any) -> float:
        _, found = QWHA(quant="int2", **options).measured(toy.zero(), toy.ctx)
        return math.fsum(f.outputs["train"] ** 2 for f in found.values())

    assert total(rank_budget=4) < total(rank_budget=2) < total(rank_budget=1)
    plain = total(rank_budget=3, rounds=1)
    assert total(rank_budget=3, rounds=4) < total(rank_budget=3) < plain
    assert plain < total(rank_budget=3, refine=False, rounds=1)
    assert plain <= total(rank_budget=3, selection="coefficient", rounds=1) * 1.02
    _, full = QWHA(quant="int2", density=1.0, dtype="fp32", rounds=1).measured(toy.zero(), toy.ctx)
    assert max(f.error for f in full.values()) < 1e-3  # all coefficients are the quantiser's whole error


def test_entries_of_the_weights_themselves_are_kept_without_a_basis(toy: Toy) -> None:
    delta = QWHA(quant="int3", density=0.05, basis="none")(toy.zero(), toy.ctx).adapter.deltas["model.b.weight"]
    assert isinstance(delta, Sparse)
    assert delta.values.numel() == round(0.05 * 96 * 64)


def test_a_trained_adapter_is_absorbed(toy: Toy) -> None:
    g = torch.Generator().manual_seed(5)
    trained = {"model.a.weight": LowRank(torch.randn(2, 96, generator=g) * 0.05, torch.randn(40, 2, generator=g), None,
                                         0.5, (40, 96)),
               "model.other.weight": LowRank(torch.randn(2, 8), torch.randn(4, 2), None, 1.0, (4, 8))}
    start = layers(toy.base, toy.calibration, Adapter(trained, {}, Origin("peft")))
    assert list(start.deltas) == ["model.a.weight", "model.other.weight", "model.b.weight", "model.c.weight"]
    outcome, found = QWHA(quant="int4", density=0.5).measured(start, toy.ctx)
    made, w0 = outcome.adapter.deltas["model.a.weight"], toy.base["model.a.weight"]
    target = w0.double() - round_to_nearest(w0, grid_of("int4", 64)).double() + trained["model.a.weight"].dense()
    measured = toy.outputs("", target - made.dense(), target)
    assert found["model.a.weight"].outputs["train"] == pytest.approx(measured, rel=1e-4)
    assert measured < 0.3
    assert outcome.adapter.deltas["model.other.weight"] is trained["model.other.weight"]
    assert "no statistics" in next(r.note for r in outcome.rows if r.key == "model.other.weight")
    assert outcome.adapter.origin.fingerprint is None  # one weight was not quantised here


def test_it_belongs_to_its_quantised_base_and_is_refused_on_the_old_one(toy: Toy, tmp_path: Path) -> None:
    with rewritten(toy.base, tmp_path / "q") as put:
        outcome, _ = QWHA(quant="int3", rank_budget=2).measured(toy.zero(), toy.ctx, put)
    quantised = Base(tmp_path / "q")
    adapter = outcome.adapter
    assert adapter.origin.fingerprint == fingerprint(quantised, adapter) != fingerprint(toy.base, adapter)
    assert adapter.origin.notes == ("made for its base quantised by int3:group=64",)
    for key in SHAPES:
        assert torch.equal(quantised[key], round_to_nearest(toy.base[key], grid_of("int3", 64)))
    held = load_file(tmp_path / "q" / "model.safetensors")
    for key in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(held[key], toy.base[key])
    assert (tmp_path / "q" / "config.json").read_text() == (toy.folder / "config.json").read_text()
    again, _ = QWHA(quant=str(tmp_path / "q"), rank_budget=2).measured(toy.zero(), toy.ctx)
    assert again.adapter.origin.fingerprint == adapter.origin.fingerprint
    assert all(torch.equal(again.adapter.deltas[k].dense(), adapter.deltas[k].dense()) for k in SHAPES)


def test_a_bfloat16_base_holds_the_quantised_weights_exactly(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "t", dtype=torch.bfloat16)
    with rewritten(toy.base, tmp_path / "q") as put:
        _, found = QWHA(quant="int4", rank_budget=2).measured(toy.zero(), toy.ctx, put)
    key = "model.a.weight"
    stored = Base(tmp_path / "q")[key]
    assert stored.dtype == torch.bfloat16
    made = QWHA(quant="int4", rank_budget=2).fitter(toy.ctx)(key, toy.zero().deltas[key])
    assert torch.equal(made.quantised, stored)
    target = toy.base[key].double() - stored.double()
    assert found[key].outputs["train"] == pytest.approx(toy.outputs(key, target - made.delta.dense(), target), rel=1e-4)


def test_weights_that_are_stored_turned_are_written_turned(tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    w = torch.randn(64, 64) * 0.1
    save_file({"h.0.attn.c_attn.weight": w}, folder / "model.safetensors")
    x = torch.randn(300, 64)
    write_calibration(tmp_path / "s.safetensors", {"h.0.attn.c_attn.weight": x.T @ x / 300}, {"tokens": 300})
    base, calibration = Base(folder), Calibration(tmp_path / "s.safetensors")
    with rewritten(base, tmp_path / "q") as put:
        QWHA(quant="int3", rank_budget=1).measured(layers(base, calibration, None), Context(base, calibration), put)
    stored = load_file(tmp_path / "q" / "model.safetensors")["h.0.attn.c_attn.weight"]
    assert torch.equal(stored, round_to_nearest(w.T.contiguous(), grid_of("int3", 64)).T)


def test_it_is_deterministic_over_threads_and_kept_by_the_container(toy: Toy, tmp_path: Path) -> None:
    step = QWHA(quant="int3", rank_budget=3)
    one = step(toy.zero(), toy.ctx).adapter
    two = step(toy.zero(), Context(toy.base, toy.calibration, jobs=3)).adapter
    assert same(one, two)
    adaptc.save(one, tmp_path / "a.adaptc.safetensors")
    read = adaptc.load(tmp_path / "a.adaptc.safetensors")
    assert same(one, read)
    assert read.nbytes == one.nbytes
    assert read.origin.fingerprint == one.origin.fingerprint


def test_values_use_all_the_digits_of_their_dtype() -> None:
    values = torch.tensor([3e-9, -7e-6, 5e-7], dtype=torch.float64)
    stored, scale = rounded(values, torch.float16)
    assert math.log2(scale) == round(math.log2(scale))
    assert 0.5 <= float(stored.abs().max()) < 1
    torch.testing.assert_close(stored.double() * scale, values, rtol=2**-10, atol=1e-13)
    assert rounded(torch.zeros(0), torch.float16)[1] == 1.0


def test_a_weight_the_quantiser_holds_exactly_needs_no_adapter(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with rewritten(toy.base, tmp_path / "q") as put:
        QWHA(quant="int3", rank_budget=2).measured(toy.zero(), toy.ctx, put)
    _, found = QWHA(quant=str(toy.folder), rank_budget=2).measured(toy.zero(), toy.ctx)
    for made in found.values():
        assert made.delta.values.numel() == 0
        assert (made.error, made.outputs) == (0.0, {"train": 0.0, "held": 0.0})


@pytest.mark.parametrize(("options", "message"), [
    ({}, "one of rank_budget and density"), ({"rank_budget": 2, "density": 0.1}, "one of rank_budget and density"),
    ({"rank_budget": 0}, "rank budget is 0"), ({"density": 0.0}, "density is 0"), ({"density": 1.5}, "density is 1.5"),
    ({"rank_budget": 2, "quant": "int7"}, "quantizer int7 is not known"),
    ({"rank_budget": 2, "selection": "loud"}, "selection loud is not one of energy, coefficient"),
    ({"rank_budget": 2, "t": -1.0}, "t is -1"), ({"rank_budget": 2, "damping": 0.0}, "damping 0"),
    ({"rank_budget": 2, "rounds": 0}, "rounds is 0"), ({"rank_budget": 2, "refine": False}, "refine is off"),
    ({"rank_budget": 2, "quant": ".", "gptq": True}, "quantised already"),
])
def test_requests_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QWHA(**options)


def test_what_is_missing_or_does_not_fit_is_named(toy: Toy, tmp_path: Path) -> None:
    step = QWHA(quant="int3", rank_budget=2)
    with pytest.raises(NeedsError, match="qwha needs base"):
        step(toy.zero(), Context(None, toy.calibration))
    with pytest.raises(NeedsError, match="qwha needs calibration"):
        step(toy.zero(), Context(toy.base))
    with pytest.raises(UsageError, match=r"model\.a\.weight: a budget of 4080 coefficients does not fit 40 x 96"):
        QWHA(quant="int3", rank_budget=30)(toy.zero(), toy.ctx)
    few = Toy(tmp_path / "few", about={"tokens": 10})
    with pytest.raises(NeedsError, match=r"model\.a\.weight: calibration saw 10 tokens, 7 coefficients a row want"):
        step(few.zero(), few.ctx)
    other = tmp_path / "other.safetensors"
    write_calibration(other, {"model.a.weight": torch.eye(50)}, {"tokens": 999})
    with pytest.raises(FormatError, match=r"model\.a\.weight: statistics are of 50 inputs"):
        layers(toy.base, Calibration(other), None)
    write_calibration(tmp_path / "none.safetensors", {"x.weight": torch.eye(50)}, {"tokens": 999})
    with pytest.raises(NeedsError, match="has statistics of no layer"):
        layers(toy.base, Calibration(tmp_path / "none.safetensors"), None)
    wrong = Adapter({"model.a.weight": Sparse(torch.empty(0, dtype=torch.long), torch.empty(0), 1.0, (40, 90))}, {},
                    Origin("adaptc"))
    with pytest.raises(AdaptcError, match="base weight has shape"):
        step(wrong, toy.ctx)
    with pytest.raises(UnsupportedError, match="no folder of safetensors"), rewritten(
            Base(toy.folder / "model.safetensors"), tmp_path / "out"):
        pass


def test_the_spec_is_read_back() -> None:
    step = QWHA(quant="nf4", density=0.03, allocation="weight", rounds=1, t=0.5)
    assert parse(str(step)) == (step,)
