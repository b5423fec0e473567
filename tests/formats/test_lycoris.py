from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import CONV, CONV_KEY, PLAIN, PLAIN_KEY, assert_verbatim, close, dense, put, read, t, under
from torch import Tensor

import adaptc
from adaptc.adapter import Adapter, Origin, same
from adaptc.delta import Dense, Hadamard, Kron, LowRank, NeedsBase, Sparse, Sum
from adaptc.errors import FormatError, LossError, UnsupportedError
from adaptc.formats.sniff import recognise
from adaptc.formats.source import open_source
from adaptc.measure import relative_error
from adaptc.tensorfile import TensorFile

META = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "4", "ss_network_alpha": "3.0"}
ALPHA = torch.tensor(3.0, dtype=torch.float16)
S = 0.75
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"


def tucker(mid: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """sum_ij mid[i, j, k, l] out[i, o] into[j, n], entry by entry as a dense tensor (o, n, k, l)."""
    return torch.einsum("ijkl,io,jn->onkl", mid.double(), out.double(), into.double())


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """The Kronecker product on rows and columns, kernel untouched: entry (p b + q, i d + j, k, l)."""
    full = torch.einsum("pi,qjkl->pqijkl", w1.double(), w2.double())
    return full.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])


def h(*shape: int, seed: int = 0) -> Tensor:
    return t(*shape, seed=seed, dtype=torch.float16)


def cases() -> dict[str, tuple[str, dict[str, Tensor], Tensor]]:
    """name -> (stem, tensors, dense dW by hand). Linear layers are (12, 20), convolutions (8, 6, 3, 3)."""
    up, down, mid = h(8, 4, 1, 1), h(4, 6, 1, 1), h(4, 4, 3, 3)
    w1a, w1b, w2a, w2b = h(12, 4), h(4, 20), h(12, 4, seed=1), h(4, 20, seed=1)
    c1a, c1b, c2a, c2b = h(8, 4), h(4, 54), h(8, 4, seed=1), h(4, 54, seed=1)
    t1, t2, o1, o2, i1, i2 = h(4, 4, 3, 3), h(4, 4, 3, 3, seed=1), h(4, 8), h(4, 8, seed=1), h(4, 6), h(4, 6, seed=1)
    f1, f2 = h(3, 4), h(4, 5)
    product = (w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double())
    return {
        "tucker": (CONV, {"lora_up": up, "lora_mid": mid, "lora_down": down, "alpha": ALPHA},
                   tucker(mid, up[..., 0, 0].mT, down[..., 0, 0]) * S),
        "loha": (PLAIN, {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": ALPHA},
                 product * S),
        "loha conv": (CONV, {"hada_w1_a": c1a, "hada_w1_b": c1b, "hada_w2_a": c2a, "hada_w2_b": c2b},
                      ((c1a.double() @ c1b.double()) * (c2a.double() @ c2b.double())).reshape(8, 6, 3, 3)),
        "loha tucker": (CONV, {"hada_w1_a": o1, "hada_w1_b": i1, "hada_w2_a": o2, "hada_w2_b": i2, "hada_t1": t1,
                               "hada_t2": t2, "alpha": ALPHA}, tucker(t1, o1, i1) * tucker(t2, o2, i2) * S),
        "lokr full": (PLAIN, {"lokr_w1": f1, "lokr_w2": f2, "alpha": ALPHA}, torch.kron(f1.double(), f2.double())),
        "lokr w2 pair": (PLAIN, {"lokr_w1": f1, "lokr_w2_a": h(4, 2), "lokr_w2_b": h(2, 5), "alpha": ALPHA},
                         torch.kron(f1.double(), h(4, 2).double() @ h(2, 5).double()) * 1.5),
        "lokr both pairs": (PLAIN, {"lokr_w1_a": h(3, 2), "lokr_w1_b": h(2, 4), "lokr_w2_a": h(4, 2),
                                    "lokr_w2_b": h(2, 5)},
                            torch.kron(h(3, 2).double() @ h(2, 4).double(), h(4, 2).double() @ h(2, 5).double())),
        "lokr conv": (CONV, {"lokr_w1": h(2, 2), "lokr_w2": h(4, 3, 3, 3), "alpha": ALPHA},
                      kron(h(2, 2), h(4, 3, 3, 3))),
        "lokr conv pair": (CONV, {"lokr_w1": h(2, 2), "lokr_w2_a": h(4, 4), "lokr_w2_b": h(4, 27), "alpha": ALPHA},
                           kron(h(2, 2), (h(4, 4).double() @ h(4, 27).double()).reshape(4, 3, 3, 3)) * S),
        "lokr conv flat": (CONV, {"lokr_w1_a": h(2, 1), "lokr_w1_b": h(1, 6), "lokr_w2": h(4, 9)},
                           torch.kron(h(2, 1).double() @ h(1, 6).double(), h(4, 9).double()).reshape(8, 6, 3, 3)),
        "lokr tucker": (CONV, {"lokr_w1": h(2, 2), "lokr_w2_a": h(4, 4), "lokr_w2_b": h(4, 3), "lokr_t2": t1,
                               "alpha": ALPHA}, kron(h(2, 2), tucker(t1, h(4, 4), h(4, 3))) * S),
        "full": (CONV, {"diff": h(8, 6, 3, 3)}, h(8, 6, 3, 3).double()),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_every_layout_is_what_its_formula_says(tmp_path: Path, name: str) -> None:
    stem, tensors, want = cases()[name]
    a = read(tmp_path, under(stem, **tensors), META)
    key = CONV_KEY if stem == CONV else PLAIN_KEY
    assert list(a.deltas) == [key]
    assert a.deltas[key].shape == want.shape
    assert close(dense(a, key), want)
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))


@pytest.mark.parametrize("name", [n for n in cases() if n != "full"])
def test_as_kohya_it_is_a_pair_with_the_same_dw(tmp_path: Path, name: str) -> None:
    stem, tensors, want = cases()[name]
    a = read(tmp_path, under(stem, **tensors), META)
    out = adaptc.save(a, tmp_path / "out.safetensors", dialect="kohya")
    assert {k.split(".", 1)[1] for k in TensorFile(out)} <= {"lora_down.weight", "lora_up.weight", "alpha"}
    assert TensorFile(out).metadata["ss_network_module"] == "networks.lora"
    b = adaptc.load(out)
    key = next(iter(b.deltas))
    assert b.deltas[key].shape == want.shape
    # products of two half-precision numbers are exact in float32; contractions with a Tucker core round once
    assert close(dense(b, key), want, 1e-7 if "tucker" in name else 1e-14)


@pytest.mark.parametrize("name", [n for n in cases() if n != "full"])
@pytest.mark.parametrize("columns", [False, True])
def test_dora_over_every_layout(tmp_path: Path, name: str, columns: bool) -> None:
    stem, tensors, want = cases()[name]
    ones = [1] * (want.dim() - 2)
    m = t(1, want.shape[1], *ones).abs() if columns else t(want.shape[0], 1, *ones).abs()
    a = read(tmp_path, under(stem, **tensors, dora_scale=m), META)
    (delta,) = a.deltas.values()
    assert isinstance(delta, NeedsBase)
    w0 = t(*want.shape, seed=9).double()
    v = w0 + want
    over = [d for d in range(want.dim()) if d != int(columns)]
    assert close(delta.resolve(w0).dense(), m.double() / torch.linalg.vector_norm(v, dim=over, keepdim=True) * v - w0)
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))


def test_norms_and_biases_are_added(tmp_path: Path) -> None:
    tensors = {**under(NORM, w_norm=t(8), b_norm=t(8, seed=1)),
               **under(CONV, diff_b=t(8, seed=2), **cases()["full"][1]),
               **under(PLAIN, **cases()["lokr full"][1], diff_b=t(12))}
    a = read(tmp_path, tensors, META)
    norm = "unet.down_blocks.0.resnets.0.norm1"
    assert torch.equal(dense(a, f"{norm}.weight"), t(8).double())
    assert torch.equal(dense(a, f"{norm}.bias"), t(8, seed=1).double())
    assert torch.equal(dense(a, CONV_KEY.replace("weight", "bias")), t(8, seed=2).double())
    assert_verbatim(tmp_path / "in.safetensors", adaptc.save(a, tmp_path / "out.safetensors"))


def test_a_truncated_file_mixes_locon_with_what_was_left_alone(tmp_path: Path) -> None:
    tensors = {**under(PLAIN, lokr_w1=t(6, 6), lokr_w2=t(40, 40), alpha=torch.tensor(4.0)),
               **under(PLAIN.replace("to_q", "to_k"), lokr_w1=t(6, 6), lokr_w2_a=t(20, 1), lokr_w2_b=t(1, 20)),
               **under(CONV, lokr_w1=t(8, 8), lokr_w2=t(24, 24, 3, 3))}
    a = read(tmp_path, tensors, META)
    b = adaptc.compress(a, rank=2)
    kinds = {k: type(d) for k, d in b.deltas.items()}
    assert kinds == {PLAIN_KEY: LowRank, PLAIN_KEY.replace("to_q", "to_k"): Kron, CONV_KEY: LowRank}
    out = adaptc.save(b, tmp_path / "out.safetensors")
    held = TensorFile(out)
    assert held[f"{CONV}.lora_down.weight"].shape == (2, 192, 3, 3)
    assert held[f"{CONV}.lora_up.weight"].shape == (192, 2, 1, 1)
    assert float(held[f"{PLAIN}.alpha"]) == 2.0
    kept = PLAIN.replace("to_q", "to_k")
    assert all(torch.equal(held[f"{kept}.{n}"], tensors[f"{kept}.{n}"]) for n in ("lokr_w1", "lokr_w2_a", "lokr_w2_b"))
    assert recognise(open_source(out))[0].id == "lycoris"
    c = adaptc.load(out)
    assert same(b, c)
    assert relative_error(a.deltas[CONV_KEY], c.deltas[CONV_KEY]) == pytest.approx(b.history[-1].error, abs=0.2)


def test_tucker_and_flat_convolutions_truncate_like_their_dense_form(tmp_path: Path) -> None:
    for name in ("tucker", "loha conv", "loha tucker", "lokr conv pair"):
        stem, tensors, want = cases()[name]
        a = read(tmp_path, under(stem, **tensors), META)
        b = adaptc.compress(a, rank=1, dtype="fp32")
        s = torch.linalg.svdvals(want.flatten(1))
        best = float(s[1:].norm() / s.norm())
        if type(b.deltas[CONV_KEY]) is LowRank:
            error = relative_error(Dense(want, 1.0, tuple(want.shape)), b.deltas[CONV_KEY])
            assert error == pytest.approx(best, rel=1e-6)
        else:
            assert b.deltas[CONV_KEY].nbytes < (want.shape[0] + want[0].numel()) * 4
        assert same(b, adaptc.load(adaptc.save(b, tmp_path / "out.safetensors", force=True)))


def foreign(**deltas: object) -> Adapter:
    return Adapter({f"unet.conv_in.{k}": d for k, d in deltas.items()}, {}, Origin("peft"))  # type: ignore[arg-type]


def factored(m: int, n: int, r: int, s: float = 1.0) -> LowRank:
    return LowRank(t(r, n), t(m, r), None, s, (m, n))


@pytest.mark.parametrize("delta", [
    Kron(Dense(t(3, 4), 2.0, (3, 4)), Dense(t(4, 5), -0.5, (4, 5)), 0.3, (12, 20)),
    Kron(factored(3, 4, 2, 2.0), Dense(t(4, 5), 3.0, (4, 5)), 0.3, (12, 20)),
    Kron(factored(3, 4, 2), factored(4, 5, 3), 0.3, (12, 20)),
    Hadamard(factored(12, 20, 2, 3.0), factored(12, 20, 2, 0.1), 0.7, (12, 20)),
    Hadamard(LowRank(t(3, 20), t(12, 2), t(2, 3), 1.0, (12, 20)), factored(12, 20, 3), 0.7, (12, 20)),
    Dense(t(12, 20), 0.3, (12, 20)),
    Sparse(torch.tensor([1, 7, 100]), t(3), 2.0, (12, 20)),
    Sum((factored(12, 20, 2), factored(12, 20, 1, 0.5)), (12, 20)),
    Sum((factored(12, 20, 2), Sparse(torch.tensor([1]), t(1), 1.0, (12, 20))), (12, 20)),
])
def test_deltas_from_elsewhere_keep_their_dw(tmp_path: Path, delta: Kron) -> None:
    a = foreign(weight=delta)
    out = adaptc.save(a, tmp_path / "out.safetensors", dialect="lycoris")
    assert relative_error(delta, adaptc.load(out, dialect="lycoris").deltas["unet.conv_in.weight"]) < 2e-7


def test_what_lycoris_cannot_say_is_refused(tmp_path: Path) -> None:
    a = foreign(weight=NeedsBase("oft", {"r": t(4)}, {}, (4, 6)), bias=factored(12, 20, 2))
    with pytest.raises(LossError) as caught:
        adaptc.save(a, tmp_path / "out.safetensors", dialect="lycoris")
    assert caught.value.losses == ("unet.conv_in.weight: oft changes the base weight",
                                   "unet.conv_in.bias: a bias change that is not dense has no key")


@pytest.mark.parametrize(("tensors", "error", "says"), [
    ({"oft_blocks": t(2, 4, 4)}, UnsupportedError, "OFT rotates the base weight"),
    ({"oft_blocks": t(2, 2, 4, 4), "rescale": t(8, 1)}, UnsupportedError, "OFT rotates the base weight"),
    ({"a1.weight": t(2, 4), "a2.weight": t(2, 4), "b1.weight": t(2, 4)}, UnsupportedError, "GLoRA multiplies the base"),
    ({"weight": t(8, 1), "on_input": torch.tensor(True)}, UnsupportedError, "IA3 scales the base weight"),
    ({"lora_up": t(12, 4), "lora_down": t(4, 20), "bias_indices": t(2, 3)}, UnsupportedError, "sparse part"),
    ({"hada_w1_a": t(12, 4), "hada_w1_b": t(4, 20), "hada_w2_a": t(12, 4)}, FormatError, "hada_w2_a has no hada_w2_b"),
    ({"hada_w1_a": t(12, 3), "hada_w1_b": t(4, 20), "hada_w2_a": t(12, 4), "hada_w2_b": t(4, 20)}, FormatError,
     "hada_w1_a has rank 3, hada_w1_b has rank 4"),
    ({"hada_w1_a": t(12, 4), "hada_w1_b": t(4, 21), "hada_w2_a": t(12, 4), "hada_w2_b": t(4, 20)}, FormatError,
     r"hada_w1 makes shape \(12, 21\), hada_w2 \(12, 20\)"),
    ({"lokr_w1": t(3, 4)}, FormatError, "lokr_w2_a is missing"),
    ({"lokr_w1": t(3, 4), "lokr_w1_a": t(3, 4), "lokr_w2": t(3, 4)}, FormatError, "whole and as a pair"),
    ({"lokr_w1": t(3), "lokr_w2": t(3, 4)}, FormatError, r"lokr_w1 has shape \(3,\), it must be a matrix"),
    ({"lokr_w1": t(3, 4, 2, 2), "lokr_w2": t(3, 4)}, FormatError, "it must be a matrix"),
    ({"lokr_w1_a": t(3, 2), "lokr_w1_b": t(2, 4), "lokr_w2_a": t(3, 3), "lokr_w2_b": t(3, 4)}, FormatError,
     "lokr_w1 has rank 2, lokr_w2 has rank 3"),
    ({"lokr_w1": t(3, 4), "lokr_w2_a": t(2, 3), "lokr_w2_b": t(2, 4), "lokr_t2": t(3, 2, 3, 3)}, FormatError,
     "lokr_t2 has shape"),
    ({"lora_up": t(8, 4, 1, 1), "lora_down": t(4, 6, 1, 1), "lora_mid": t(3, 4, 3, 3)}, FormatError,
     "lora_up has rank 4, lora_mid has rank 3"),
    ({"lora_up": t(8, 4, 1, 1), "lora_down": t(4, 6, 1, 1), "lora_mid": t(4, 5, 3, 3)}, FormatError,
     "lora_mid has shape"),
    ({"lora_mid": t(4, 4, 3, 3)}, FormatError, "lora_mid.weight has no lora_down.weight"),
    ({"lokr_w1": t(3, 4), "lokr_w2": t(0, 4)}, FormatError, r"lokr_w2: shape \(0, 4\)"),
    ({"lokr_w1": t(3, 4), "lokr_w2": t(3, 4), "diff": t(9, 16)}, FormatError, "tensors of lokr and diff on one module"),
    ({"w_norm": t(3), "diff_b": t(3)}, FormatError, "tensors of norm"),
    ({"diff": t(3).long()}, FormatError, "no difference of weights"),
    ({"lokr_w1": t(3, 4), "lokr_w2_a": t(3, 2), "lokr_w2_b": t(2, 4), "alpha": torch.tensor(float("inf"))}, FormatError,
     "alpha is inf"),
])
def test_damage_and_algorithms_on_the_base_are_one_clause(
        tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        read(tmp_path, under(PLAIN, **tensors), META)
    assert "\n" not in str(caught.value)


def test_recognition_by_keys_alone(tmp_path: Path) -> None:
    for stem, tensors, _ in cases().values():
        source = open_source(put(tmp_path / "x.safetensors", under(stem, **tensors)))
        fmt, evidence = recognise(source)
        assert (fmt.id, evidence.strength) == ("lycoris", 2)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["lycoris-smart_falcon_4_lokr", "lycoris-smart_falcon_8_lokr"])
def test_real_files(shared: Path, tmp_path: Path, name: str) -> None:
    (source,) = (shared / "corpus" / name).glob("*.safetensors")
    a = adaptc.load(source)
    held = TensorFile(source)
    stem = CONV
    parts = [held[f"{stem}.lokr_{p}"].double() for p in ("w1_a", "w1_b", "w2_a", "w2_b")]
    want = torch.kron(parts[0] @ parts[1], parts[2] @ parts[3])  # alpha equals the rank in both files
    assert len(a.deltas) == 350
    assert a.deltas[CONV_KEY].shape == (320, 320, 3, 3)
    assert a.deltas["unet.mid_block.attentions.0.proj_in.weight"].shape == (1280, 1280, 1, 1)
    assert close(dense(a, CONV_KEY).flatten(1), want)
    assert_verbatim(source, adaptc.save(a, tmp_path / "out.safetensors"))
    keys = [k for k in a.deltas if "down_blocks.0" in k or "encoder.layers.0." in k]
    b = adaptc.compress(a.with_deltas({k: a.deltas[k] for k in keys}), rank=2)
    assert same(b, adaptc.load(adaptc.save(b, tmp_path / "r2.safetensors")))
