"""Switching sparse adapters: exact in, bit for bit out, sums that commute."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from runtime_models import TARGETS, ids, model
from torch import Tensor, nn

from adaptc.adapter import Adapter, Origin, Rows
from adaptc.delta import LowRank, NeedsBase, Sparse
from adaptc.errors import FormatError, NeedsError, UnsupportedError, UsageError
from adaptc.kernels import SparseSwitch
from adaptc.kernels.sparse import native
from adaptc.quant.golomb import Golomb

FAMILIES = sorted(TARGETS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(m: nn.Module, family: str) -> list[str]:
    return [f"{n}.weight" for n, _ in m.named_modules() if n.rpartition(".")[2] in TARGETS[family]]


def sparse(m: nn.Module, family: str, seed: int, share: float = 0.05, part: tuple[int, int] = (0, 1)) -> Adapter:
    """Return entries of every target weight, at positions that are part[0] modulo part[1]."""
    random, deltas = torch.Generator().manual_seed(seed), {}
    for key in weights(m, family):
        stored = tuple(m.get_parameter(key).shape)
        shape = stored[::-1] if family == "gpt2" else stored
        size = shape[0] * shape[1]
        places = torch.randperm(size // part[1], generator=random)[: int(share * size)].sort().values
        places = places * part[1] + part[0]
        deltas[key] = Sparse(places, torch.randn(len(places), generator=random), 0.5, shape)
    return Adapter(deltas, {}, Origin("peft"))


def state(m: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in m.state_dict().items()}


def same(m: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in m.state_dict().items())


def expected(before: dict[str, Tensor], family: str, *added: tuple[Adapter, float]) -> dict[str, Tensor]:
    """Return the weights with dense deltas added, rounded once."""
    out = dict(before)
    for key in added[0][0].deltas:
        total = sum((a.deltas[key].dense() * s for a, s in added), torch.zeros(1))
        total = total.T if family == "gpt2" else total
        out[key] = (before[key].double() + total).to(before[key].dtype)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_is_exact_and_restore_bit_exact(family: str, dtype: torch.dtype) -> None:
    m = model(family).to(dtype)
    before, a, b = state(m), sparse(m, family, 1), sparse(m, family, 2)
    switch = SparseSwitch(m, {"a": a, "b": b})
    assert same(m, before)
    for _ in range(3):
        switch.apply("a")
        assert same(m, expected(before, family, (a, 1.0)))
        assert not same(m, before)
        switch.apply("b")
        assert same(m, expected(before, family, (b, 1.0)))
    switch.restore()
    assert same(m, before)
    switch.restore()
    assert same(m, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_commutes_and_takes_scales(family: str) -> None:
    m = model(family).to(torch.bfloat16)
    before = state(m)
    some = {n: sparse(m, family, i) for i, n in enumerate("abc")}
    switch = SparseSwitch(m, some)
    scales = {"a": 1.0, "b": -0.25, "c": 3.0}
    wanted = expected(before, family, *((some[n], s) for n, s in scales.items()))
    for order in permutations("abc"):
        switch.apply(*order, scales=[scales[n] for n in order])
        assert same(m, wanted)
        assert switch.active == order
    switch.restore()
    assert same(m, before)


def test_disjoint_adapters_fused_are_each_overwritten() -> None:
    m = model("llama")
    before = state(m)
    a, b = sparse(m, "llama", 1, part=(0, 2)), sparse(m, "llama", 2, part=(1, 2))
    one, two = SparseSwitch(m, {"a": a}), SparseSwitch(m, {"b": b})
    one.apply("a")
    two.apply("b")  # supports do not meet, so neither sees the other
    sequential = state(m)
    two.restore()
    one.restore()
    assert same(m, before)
    both = SparseSwitch(m, {"a": a, "b": b})
    both.apply("a", "b")
    assert same(m, sequential)


def test_logits_change_with_the_adapter_and_come_back() -> None:
    m = model("gpt2")
    switch = SparseSwitch(m, {"a": sparse(m, "gpt2", 4)})
    with torch.no_grad():
        plain = m(ids()).logits
        with switch.applied("a") as changed:
            assert not torch.equal(changed(ids()).logits, plain)
        assert torch.equal(m(ids()).logits, plain)


def test_a_while_ends_where_it_began() -> None:
    m = model("bert")
    before, a = state(m), sparse(m, "bert", 1)
    switch = SparseSwitch(m, {"a": a, "b": sparse(m, "bert", 2)})
    switch.apply("a")
    with pytest.raises(RuntimeError, match="inside"), switch.applied("b"):
        raise RuntimeError("inside")
    assert same(m, expected(before, "bert", (a, 1.0)))


def test_heads_are_replaced_and_come_back() -> None:
    m = model("bert")
    before = state(m)
    head, rows = torch.ones_like(m.get_parameter("classifier.weight")), torch.full((2, 48), 0.5)
    a = sparse(m, "bert", 1)
    name = "bert.embeddings.word_embeddings.weight"
    a = Adapter(a.deltas, {"classifier.weight": head, name: Rows((3, 5), rows)}, Origin("peft"))
    switch = SparseSwitch(m, {"a": a, "b": Adapter({}, {"classifier.weight": head * 2}, Origin("peft"))})
    switch.apply("a")
    assert torch.equal(m.get_parameter("classifier.weight"), head)
    assert torch.equal(m.get_parameter(name)[[3, 5]], rows)
    with pytest.raises(UsageError, match="both replace it"):
        switch.apply("a", "b")
    switch.restore()
    assert same(m, before)


def test_coded_positions_and_those_of_an_unknown_shape_switch_alike() -> None:
    m = model("llama")
    before, key = state(m), "model.layers.0.self_attn.q_proj.weight"
    places, values = torch.tensor([3, 70, 4000]), torch.tensor([1.0, -2.0, 0.5])
    coded = Sparse(Golomb.encode(places, 4096, 64), values, 1.0, (64, 64))
    at = torch.stack([places // 64, places % 64]).int()
    pairs = NeedsBase("sparse", {"indices": at, "values": values}, {}, (0, 0))
    for delta in (coded, pairs):
        switch = SparseSwitch(m, {"a": Adapter({key: delta}, {}, Origin("peft"))})
        switch.apply("a")
        wanted = before[key].clone()
        wanted.view(-1)[places] += values
        assert torch.equal(m.get_parameter(key), wanted)
        switch.restore()
        assert same(m, before)


def test_what_it_refuses_leaves_the_model_alone() -> None:
    m = model("llama")
    before, key = state(m), "model.layers.0.self_attn.q_proj.weight"
    switch = SparseSwitch(m, {"a": sparse(m, "llama", 1)})
    low = LowRank(torch.ones(1, 64), torch.ones(64, 1), None, 1.0, (64, 64))

    def one(name: str, delta: object) -> Adapter:
        return Adapter({name: delta}, {}, Origin("peft"))  # type: ignore[dict-item]

    with pytest.raises(UnsupportedError, match="a lowrank delta changes every entry"):
        switch.add("low", one(key, low))
    with pytest.raises(FormatError, match=r"for shape \(64, 32\)"):
        switch.add("narrow", one(key, Sparse(torch.tensor([1]), torch.ones(1), 1.0, (64, 32))))
    with pytest.raises(NeedsError, match="no such parameter"):
        switch.add("lost", one("model.nothing.weight", Sparse(torch.tensor([1]), torch.ones(1), 1.0, (64, 64))))
    with pytest.raises(UsageError, match="there already"):
        switch.add("a", sparse(m, "llama", 2))
    with pytest.raises(UsageError, match=r"b is not known \(known: a\)"):
        switch.apply("b")
    with pytest.raises(UsageError, match="not all different"):
        switch.apply("a", "a")
    with pytest.raises(UsageError, match="2 scales for 1 adapters"):
        switch.apply("a", scales=(1.0, 2.0))
    assert switch.names == ("a",)
    assert same(m, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_loop_writes_what_index_copy_does(dtype: torch.dtype, threads: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llvmlite")
    monkeypatch.setattr(native, "_PIECE", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for k in (native._WORTH, 9999, 1 << 15):
        flat = torch.randn(1 << 15).to(dtype)
        index = torch.randperm(1 << 15)[:k].sort().values
        new, wanted = torch.randn(k).to(dtype), flat.clone()
        some = native.packed(flat, index)
        assert some.dtype == torch.int32
        native.put(flat, some, new)
        assert torch.equal(flat, wanted.index_copy_(0, index, new))
    flat = torch.zeros(9)
    native.put(flat, native.packed(flat, torch.tensor([0, 8])), torch.ones(2))  # too few to pay: torch's own
    assert flat.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_other_weights_and_choices_take_torchs_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.arange(native._WORTH)
    assert native.packed(torch.zeros(1 << 13, dtype=torch.float64), index) is index
    monkeypatch.setenv("ADAPTC_KERNELS", "naive")
    assert native.packed(torch.zeros(1 << 13), index) is index


def test_a_large_layer_is_switched_by_the_compiled_loop() -> None:
    m = nn.ModuleDict({"up": nn.Linear(300, 200, bias=False)})
    places = torch.randperm(60_000)[:9000].sort().values
    delta = Sparse(places, torch.randn(9000), 1.0, (200, 300))
    before, a = state(m), Adapter({"up.weight": delta}, {}, Origin("peft"))
    switch = SparseSwitch(m, {"a": a})
    switch.apply("a")
    assert torch.equal(m["up"].weight.double(), (before["up.weight"].double() + delta.dense()).float().double())
    switch.restore()
    assert same(m, before)


def test_removing_restores_and_forgets() -> None:
    m = model("bert")
    before = state(m)
    switch = SparseSwitch(m, {"a": sparse(m, "bert", 1)})
    held = switch.nbytes
    switch.apply("a")
    assert switch.nbytes > held > 0
    switch.remove("a")
    assert same(m, before)
    assert (switch.names, switch.active, switch.nbytes) == ((), (), 0)
